"""DAPO's clip and length penalty on GRPO (Yu et al. 2025, arXiv 2503.14476).

    python -m variants.dapo
    python -m variants.dapo --clip_high 0.2 --overlong 0        GRPO with the mean over all tokens

The change to ppo.policy_loss, in variants/grpo.py, and to its reward:

    -   surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    +   surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip_high) * advantages)
    +   return self.reward(run, prompts, answers, batch) - penalty

Clip-higher: with ε = 0.2 a token of probability 0.01 may rise to 0.012 in one update, and one of 0.9 to 1. So
the clip holds back rare tokens most, the entropy falls, and the answers to a prompt become one. A larger
range above 1 leaves them room (section 3.1).

Soft overlong penalty: an answer that is cut off is a bad one, however good it was so far, and a jump of the
score at one length is noise for the rest. So the last `overlong` tokens before the limit cost more and more,
up to 1 (eq. 13).

The loss is a mean over all tokens, so that a long answer counts by its length (section 3.3): here
--no-divide_by_length, the default of this file. Dynamic sampling (section 3.2) replaces prompts whose answers
all score alike, for which the advantages are 0; with a learnt reward no two scores are alike, so it is left
out.
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


def policy_loss(logprobs, old_logprobs, advantages, mask, clip, clip_high):
    """−E[min(ρ·A, clip(ρ, 1 − ε, 1 + ε_high)·A)]: ppo.policy_loss with another range above 1. The clip
    fraction is the share of tokens outside both ranges."""
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
