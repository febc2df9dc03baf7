"""Sample many answers, learn from few: max-variance down-sampling (PODS, Xu et al. 2025, arXiv 2504.13818)
and dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2).

    python -m variants.downsample --select rewards.py:right --reward rewards.py:right,0.1*out/reward_model

The change to `rollout` of variants/grpo.py:

    -   asked = run.rng.choices(prompts, k=run.cfg.batch // run.cfg.group)
    -   asked = [prompt for prompt in asked for _ in range(run.cfg.group)]
    +   asked = run.rng.choices(prompts, k=cfg.draw_prompts * cfg.batch // cfg.group)
    +   asked = [prompt for prompt in asked for _ in range(cfg.draw_answers * cfg.group)]
    +   rows = informative(scores.view(-1, cfg.draw_answers * cfg.group), cfg.group, cfg.batch // cfg.group)

On a few processor cores, sampling an answer takes much less time than learning from it, for which reference,
reward model and policy read it, the last one forwards and backwards. And many answers teach nothing: where
all answers to a prompt earn the same, their advantages are 0. So this samples more prompts than a step needs,
and more answers to each; a program, which costs nothing, scores them; and only some are learnt from: of each
prompt the answers at both ends of its scores, and of all prompts those whose chosen scores differ most.

The mean over chosen answers is no longer the mean over the policy's. A prompt where one answer of sixteen is
right counts like one where eight are: much as if advantages were divided by a standard deviation, which is
therefore left out (`--no-divide_by_std` is the default here). `score`, `kl` and `length` in the log are means
over the chosen answers; `sampled_score` is the mean of --select over all.
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
    select: str = flag("", "program (file.py:function) whose scores choose the answers; without it, --reward")
    draw_prompts: int = flag(2, "prompts that are drawn for each one that is learnt from", 1)
    draw_answers: int = flag(2, "answers that are sampled for each one that is learnt from", 1)
    divide_by_std: bool = flag(False, "with grpo: divide advantages by their group's standard deviation")


def informative(scores, group, n):
    """The answers to learn from. scores (P, K): of K answers to each of P prompts. Returns row numbers of the
    flattened scores (n·group,): the n prompts with the largest variance among the `group` answers that are
    chosen of each, the worst ⌊group/2⌋ and the best.

    Of all choices of so many numbers, the one with the largest variance takes some of the lowest and the rest
    of the highest (lemma 3.1 of PODS). Half of each is that choice for scores that are 0 or 1 where both are
    frequent enough, and near it elsewhere."""
    order = scores.argsort(dim=1)
    ends = torch.cat([order[:, :group // 2], order[:, scores.shape[1] - (group - group // 2):]], dim=1)
    prompts = scores.gather(1, ends).var(dim=1).topk(n).indices
    return (prompts[:, None] * scores.shape[1] + ends[prompts]).flatten()


def rollout(run, tokenizer, prompts, policy, reference, score):
    """grpo.rollout of the informative ones among more answers. score: what --select names."""
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
    # From here on as in ppo.rollout: only chosen answers are read.
    batch["old_logprobs"] = sampled = batch.pop("logprobs")
    if run.bfloat16:
        batch["old_logprobs"] = run.logprobs(policy, batch, cfg.temperature)
        run.note(sampler_kl=ppo.approximate_kl(batch["old_logprobs"], sampled, batch["mask"]))
    batch["ref_logprobs"] = run.logprobs(reference, batch, cfg.temperature)
    return asked, answers, batch


def train(cfg):
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    reward = find_reward(cfg.reward, tokenizer)
    score = find_reward(cfg.select, tokenizer) if cfg.select else reward
    if any(network not in reward.networks for network in score.networks):
        raise ValueError(f"--select {cfg.select}: a program is needed, not a reward model")
    grpo.train(cfg, reward, rollout=functools.partial(rollout, score=score))


if __name__ == "__main__":
    main(Config, train, __doc__)
