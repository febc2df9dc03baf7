"""DAPO's clip and length penalty on GRPO (Yu et al. 2025, arXiv 2503.14476).

    python -m variants.dapo
    python -m variants.dapo --clip_high 0.2 --overlong 0        GRPO with the mean over all tokens

The change to ppo.policy_loss, in variants/grpo.py, and to its reward:

    -   surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    +   surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip_high) * advantages)
    +   return self.reward(run, prompts, answers, batch) - penalty

Clip-higher: with ε = 0.2 a token of probability 0.01 may rise to 0.012 in one update, and one of 0.9 to 1. So
the clip holds back rare tokens most, the entropy falls, and all answers to a prompt become alike. A larger
range above 1 leaves rare tokens room (section 3.1).

Soft overlong penalty: if the score drops suddenly at one length, answers just below it get no warning. So the
last `overlong` tokens before --max_new_tokens cost more and more, up to 1 (eq. 13). An answer that is cut off
still gets --no_end_score. The logged score includes the penalty.

The loss is a mean over all tokens, so that a long answer counts by its length (section 3.3): here
--no-divide_by_length, the default of this file. Two parts of the paper are left out. It has no KL penalty
(--kl_coef 0 --no-adaptive_kl here, with a reward that cannot be hacked). And dynamic sampling (section 3.2)
replaces prompts whose answers all score alike: their advantages are 0, so they only cost time.
"""
import functools
from dataclasses import dataclass

import torch

from data.tokenizer import Tokenizer
from ppo import masked_mean
from runtime.flags import flag
from runtime.launch import main
from runtime.rewards import find_reward
from variants import grpo


@dataclass
class Config(grpo.Config):
    out: str = flag("out/dapo", "folder that the run writes")
    clip_high: float = flag(0.28, "the clip range above 1; --clip is the one below", 0)
    overlong: int = flag(16, "tokens before --max_new_tokens that cost more and more; 0: none", 0)
    divide_by_length: bool = flag(False, "give each answer the same weight, not each token")
    advantage: str = flag("grpo", "how an answer is compared with its group", choices=("grpo",))

    def __post_init__(self):
        super().__post_init__()
        if self.overlong > self.max_new_tokens:
            raise ValueError(f"--overlong {self.overlong} exceeds --max_new_tokens {self.max_new_tokens}")


def policy_loss(logprobs, old_logprobs, advantages, mask, clip, clip_high):
    """−E[min(ρ·A, clip(ρ, 1 − ε, 1 + ε_high)·A)]: ppo.policy_loss with another range above 1. The clip
    fraction is the share of tokens with ρ outside [1 − ε, 1 + ε_high]."""
    ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0).exp()
    advantages = advantages.detach()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip_high) * advantages)
    return -masked_mean(surrogate, mask), masked_mean((ratio < 1 - clip) | (ratio > 1 + clip_high), mask)


def overlong_penalty(lengths, longest, overlong):
    """0 up to longest − overlong tokens, then rising by 1/overlong with each token, up to 1 at the longest.
    lengths (B,) of the answers. Returns (B,)."""
    return ((lengths - (longest - overlong)) / max(1, overlong)).clamp(0, 1)


class Overlong:
    """Another reward less the penalty."""

    def __init__(self, reward, cfg):
        self.reward, self.cfg = reward, cfg
        self.networks, self.folder = reward.networks, reward.folder

    def __call__(self, run, prompts, answers, batch):
        penalty = overlong_penalty(batch["mask"].sum(1), self.cfg.max_new_tokens, self.cfg.overlong)
        return self.reward(run, prompts, answers, batch) - penalty


def train(cfg):
    reward = find_reward(cfg.reward, Tokenizer.load(cfg.init, cfg.system))
    grpo.train(cfg, Overlong(reward, cfg), functools.partial(policy_loss, clip_high=cfg.clip_high))


if __name__ == "__main__":
    main(Config, train, __doc__)
