"""CISPO: clip the weight, and keep every token's gradient (MiniMax 2025, arXiv 2506.13585, eq. 4 and 5).

    python -m variants.cispo

The change to ppo.policy_loss, in variants/grpo.py:

    -   surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    +   surrogate = ratio.detach().clamp(max=1 + clip) * advantages * logprobs

PPO's clip takes the gradient from tokens that have moved far enough. The authors observed that after the
first optimiser step of a rollout these are often rare words that begin a new thought ("however", "wait"):
their ratios grow fastest, so they drop out first. CISPO is REINFORCE with importance weights,
−E[sg(ρ̂)·A·log π], where ρ̂ = min(ρ, 1 + ε) limits the noise of the weight, and sg stops its gradient. (Eq. 5
also has a lower bound, which the authors do not use.) At ρ = 1 the gradient is that of PPO, E[A·∇log π].
Later, nothing but the learning rate and `update_kl` keeps π near π_old. The mean is over all tokens, as in
variants/dapo.py.
"""
from dataclasses import dataclass

import torch

from ppo import masked_mean
from runtime.flags import flag
from runtime.launch import main
from variants import grpo


@dataclass
class Config(grpo.Config):
    out: str = flag("out/cispo", "folder that the run writes")
    clip: float = flag(1.0, "ε: a weight is at most 1 + ε", 0)
    divide_by_length: bool = flag(False, "give each answer the same weight, not each token")
    advantage: str = flag("grpo", "how an answer is compared with its group", choices=("grpo",))


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """−E[sg(min(ρ, 1 + ε))·A·log π]. Arguments and results as in ppo.policy_loss; the clip fraction is the
    share of tokens with ρ > 1 + ε."""
    ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0).exp()
    advantages = advantages.detach()
    surrogate = ratio.detach().clamp(max=1 + clip) * advantages * logprobs
    return -masked_mean(surrogate, mask), masked_mean(ratio > 1 + clip, mask)


def train(cfg):
    grpo.train(cfg, policy_loss=policy_loss)


if __name__ == "__main__":
    main(Config, train, __doc__)
