"""GSPO: the ratio of a whole answer in place of each token's (Zheng et al. 2025, arXiv 2507.18071).

    python -m variants.gspo

The change to ppo.policy_loss, in variants/grpo.py:

    -   ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0).exp()
    +   log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0)
    +   ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()

GRPO gives all tokens of an answer one advantage, but weights and clips each by its own ratio π/π_old. What
was sampled and judged is the whole answer, so importance sampling needs the ratio of whole-answer
probabilities. That is the product of the tokens' ratios, and its variance is enormous. GSPO takes their
geometric mean (eq. 7), at the price that it is no longer an unbiased weight:

    s = (π(y|x) / π_old(y|x))^(1/|y|) = exp(mean of log π − log π_old over the tokens of y)

It weights and clips all tokens of the answer alike. Noise in single tokens cancels in the mean: the authors
need that where rounding, or a mixture of experts, makes the tokens' own ratios unreliable. s is usually much
closer to 1 than the tokens' ratios, hence the small clip range; theirs is 3e-4 below and 4e-4 above.
"""
from dataclasses import dataclass

import torch

from ppo import masked_mean
from runtime.flags import flag
from runtime.launch import main
from variants import grpo


@dataclass
class Config(grpo.Config):
    out: str = flag("out/gspo", "folder that the run writes")
    clip: float = flag(0.01, "ε, the clip range of the answer's ratio s", 0)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """−E[min(s·A, clip(s, 1 − ε, 1 + ε)·A)]. Arguments and results as in ppo.policy_loss; the clip fraction
    is the share of tokens whose answer has |s − 1| > ε."""
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0)
    ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()              # (B, 1)
    advantages = advantages.detach()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    beyond = ((ratio - 1).abs() > clip).expand_as(mask)
    return -masked_mean(surrogate, mask), masked_mean(beyond, mask)


def train(cfg):
    grpo.train(cfg, policy_loss=policy_loss)


if __name__ == "__main__":
    main(Config, train, __doc__)
