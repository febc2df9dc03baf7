"""REINFORCE++: one baseline for the whole batch, and no groups (Hu 2025, arXiv 2501.03262).

    python -m variants.reinforce_pp

The change to variants/grpo.py:

    -   advantages = R - R.mean(1, keepdim=True)
    +   return (returns - returns.mean()) / (returns.std() + 1e-4)

Every prompt is answered once, so a batch holds as many prompts as answers. The price: a prompt that is easy
for any policy has a high advantage whatever it is answered, which adds noise but no bias, because a baseline
that does not depend on the answer leaves the mean gradient as it is. GRPO's own baseline removes this noise,
and divides each group by a standard deviation of few numbers, which is a bias; the batch's is nearly a
constant. The paper puts the KL penalty per token into the return of all tokens before it (eq. 5); as in
variants/grpo.py, all tokens share the answer's sum here.
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
