"""Sample many answers, learn from few: max-variance down-sampling (PODS, Xu et al. 2025, arXiv 2504.13818)
and a form of dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2).

    python -m variants.downsample --select my.py:right --reward my.py:right,0.1*out/reward_model

The change to `rollout` of variants/grpo.py:

    -   asked = run.rng.choices(prompts, k=run.cfg.batch // run.cfg.group)
    -   asked = [prompt for prompt in asked for _ in range(run.cfg.group)]
    +   asked = run.rng.choices(prompts, k=cfg.draw_prompts * cfg.batch // cfg.group)
    +   asked = [prompt for prompt in asked for _ in range(cfg.draw_answers * cfg.group)]
    +   scores = torch.where(batch["ended"], score(run, asked, answers, batch), cfg.no_end_score)
    +   rows = informative(scores.view(-1, cfg.draw_answers * cfg.group), cfg.group, cfg.batch // cfg.group)

On a few processor cores an answer is sampled in less time than it takes to learn from it: the reference, the
reward model and the policy each read prompt and answer, and the policy also goes backwards. And many answers
teach next to nothing: if all answers to a prompt earn the same, their advantages are 0. So this samples more
prompts than a step needs, and more answers to each. A program scores them (`--select`), which costs nothing.
For each prompt the answers with the lowest and the highest scores are kept; then the prompts are kept whose
kept scores vary most. The others are never read again. (DAPO goes on sampling until enough prompts differ;
here the number of samples is fixed.)

The mean over the kept answers is not the mean over the policy's answers. With groups of four, a prompt of
whose eight answers one is right counts nearly as much as one of whose eight answers four are. The log's
`score`, `kl`, `length` and `ended` are means over kept answers; `sampled_score` is the mean of --select over
all. An adaptive β would follow the KL of the kept ones.
"""
import functools
from dataclasses import dataclass

import torch

import ppo
from data.tokenizer import Tokenizer
from runtime.compute import select
from runtime.flags import flag
from runtime.launch import main
from runtime.rewards import find_reward
from variants import grpo


@dataclass
class Config(grpo.Config):
    out: str = flag("out/downsample", "folder that the run writes")
    select: str = flag("", "program (file.py:function) whose scores choose the answers")
    draw_prompts: int = flag(2, "prompts that are drawn for each one that is kept", 1)
    draw_answers: int = flag(2, "answers that are sampled for each one that is kept", 1)

    def __post_init__(self):
        super().__post_init__()
        if ".py:" not in self.select:
            raise ValueError("--select needs a program, file.py:function: a reward model would have to read "
                             "all answers")


def informative(scores, group, n):
    """The answers to learn from. scores (P, K): of K answers to each of P prompts. For each prompt the
    ⌊group/2⌋ lowest scores are chosen and the rest from the highest; then the n prompts whose chosen scores
    have the largest variance. Returns row numbers of the flattened scores, (n·group,).

    Of all subsets of a given size, one with the largest variance is made of some of the lowest scores and the
    rest of the highest (PODS, section 3). For scores that are 0 or 1, half of each is such a subset; for
    others it is close to one."""
    order = scores.argsort(dim=1)
    ends = torch.cat([order[:, :group // 2], order[:, -(group - group // 2):]], dim=1)
    prompts = scores.gather(1, ends).var(dim=1).topk(n).indices
    return (prompts[:, None] * scores.shape[1] + ends[prompts]).flatten()


def rollout(run, tokenizer, prompts, policy, reference, score):
    """As grpo.rollout, but samples more answers and keeps the informative ones. score: that of --select."""
    cfg = run.cfg
    asked = run.rng.choices(prompts, k=cfg.draw_prompts * cfg.batch // cfg.group)
    asked = [prompt for prompt in asked for _ in range(cfg.draw_answers * cfg.group)]
    batch = run.sample(policy, [tokenizer.prompt(p) for p in asked], run.seeds(len(asked)),
                       cfg.max_new_tokens, stop_token=tokenizer.end, temperature=cfg.temperature)
    answers = [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(batch["tokens"], batch["mask"])]
    scores = torch.where(batch["ended"], score(run, asked, answers, batch), cfg.no_end_score)
    run.note(sampled_score=scores.mean())
    rows = informative(scores.view(-1, cfg.draw_answers * cfg.group), cfg.group, cfg.batch // cfg.group)
    asked, answers, batch = [asked[i] for i in rows], [answers[i] for i in rows], select(batch, rows)
    # From here on as in ppo.rollout.
    batch["old_logprobs"] = sampled = batch.pop("logprobs")
    if run.bfloat16:
        batch["old_logprobs"] = run.logprobs(policy, batch, cfg.temperature)
        run.note(sampler_kl=ppo.approximate_kl(batch["old_logprobs"], sampled, batch["mask"]))
    batch["ref_logprobs"] = run.logprobs(reference, batch, cfg.temperature)
    return asked, answers, batch


def train(cfg):
    score = find_reward(cfg.select, Tokenizer.load(cfg.init, cfg.system))
    grpo.train(cfg, rollout=functools.partial(rollout, score=score))


if __name__ == "__main__":
    main(Config, train, __doc__)
