"""REINFORCE++: one baseline for the whole batch, and no groups (Hu 2025, arXiv 2501.03262).

    python -m variants.reinforce_pp

The change to variants/grpo.py:

    -   advantages = R - R.mean(1, keepdim=True)
    +   return (returns - returns.mean()) / (returns.std() + 1e-4)

Prompts are drawn one for each answer, so a batch holds more of them. The price: a prompt that is easy for any
policy has a high advantage whatever it is answered. That is noise, and nearly no bias, because a baseline
that does not depend on the answer leaves the mean gradient as it is. (It contains the answer's own return, as
GRPO's does, but that is one of many.) GRPO's own baseline removes this noise, but divides each group by a
standard deviation of few numbers, which is a bias. The standard deviation of the whole batch hardly depends
on any one answer.

Two differences from the paper: there a token's return has only the KL penalties from that token on (eq. 5),
and the mean is over all tokens. As in variants/grpo.py, an answer's tokens share its sum here.
"""
from dataclasses import dataclass

import ppo
from runtime.flags import flag
from runtime.launch import main
from variants import grpo


@dataclass
class Config(ppo.OnPolicy):
    out: str = flag("out/reinforce_pp", "folder that the run writes")
    group = 1                   # answers per prompt: grpo.train asks for it, and nobody can choose it


def global_advantages(returns, mask=None, cfg=None):
    """(R − mean R) / std R over all answers of the batch. returns (B,). Returns (B,)."""
    return (returns - returns.mean()) / (returns.std() + 1e-4)


def train(cfg):
    grpo.train(cfg, advantages_of=global_advantages)


if __name__ == "__main__":
    main(Config, train, __doc__)
