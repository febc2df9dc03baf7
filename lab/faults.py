"""Common mistakes, built into a healthy run one at a time, and what the log then shows.

    python -m lab.faults                                    their names
    python -m lab.faults reference_moves sampler_differs    each beside the healthy run, after `make demo`

docs/troubleshooting.md says how to read each log, why it looks so, and what to change. A fault is a flag, or
a function that takes the place of one of the project's own.
"""
import contextlib
import io
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

import ppo
from model import GPT, MLP
from runtime import launch
from runtime.compute import Compute
from runtime.flags import flag
from runtime.launch import main
from variants import grpo


@dataclass
class Config:
    names: tuple = flag((), "faults")
    models: str = flag("out/demo", "folder with world, sft and reward_model, as `make demo` leaves it")
    steps: int = flag(12, "steps of PPO and GRPO", 1)
    batch: int = flag(64, "answers per step", 2)
    debug: bool = flag(False, "show the traceback of an error")


@dataclass
class Fault:
    metrics: str                                            # what to look at
    flags: dict = field(default_factory=dict)               # of the faulty run alone
    replaced: list = field(default_factory=list)            # (object, name, what takes its place)
    shared: dict = field(default_factory=dict)              # flags of both runs
    stage: object = ppo


# ------------------------------------------------------------------- functions with a mistake, and right ones

sample, micro_batches, rollout, whiten, feed_forward = (
    Compute.sample, Compute.micro_batches, ppo.rollout, ppo.whiten, MLP.forward)


def score_in_last_column(scores, logprobs, ref_logprobs, mask, kl_coef):
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0)
    rewards[:, -1] += scores                                # padding, in all but the longest answers
    return rewards


def sample_without_end(*args, **how):
    batch = sample(*args, **how)
    last = F.one_hot(batch["lengths"] - 1, batch["mask"].shape[1]).bool()
    batch["mask"] = batch["mask"] & ~(last & batch["ended"][:, None])
    return batch


def sample_colder(*args, **how):
    return sample(*args, **how | {"temperature": 0.7})


def rollout_against_itself(run, tokenizer, prompts, policy, reference):
    return rollout(run, tokenizer, prompts, policy, policy)


def score_last_column(model, tokens, lengths):
    return model(tokens)[:, -1]


def feed_forward_with_dropout(mlp, x):
    return F.dropout(feed_forward(mlp, x), 0.1, training=torch.is_grad_enabled())


def shares_by_count(run, rows, weights, lengths=None):
    parts = list(micro_batches(run, rows, weights, lengths))
    with run.computing():
        yield from ((some, 1 / len(parts)) for some, _ in parts)


def whiten_with_shift(x, mask, shift_mean=True):
    return whiten(x, mask)


def advantages_across_prompts(returns, mask, cfg):
    order = torch.arange(len(returns)).view(-1, cfg.group).T.flatten()      # groups do not stand together
    advantages = torch.empty_like(returns)
    advantages[order] = grpo.advantages_in_groups(returns[order], mask[order], cfg)
    return advantages


FREE = dict(kl_coef=0.0, adaptive_kl=False)
FAULTS = {
    "score_on_padding": Fault("score judge kl", replaced=[(ppo, "kl_rewards", score_in_last_column)]),
    "end_not_learnt": Fault("score ended length", replaced=[(Compute, "sample", sample_without_end)]),
    "rate_too_high": Fault("score kl updates approx_kl", dict(lr=2e-2)),
    "rate_too_low": Fault("score kl approx_kl", dict(lr=1e-6)),
    "no_penalty": Fault("score judge kl length", FREE),
    "large_rewards": Fault("score judge kl kl_coef", dict(reward="30*{}/reward_model"), shared=dict(
        adaptive_kl=False)),
    "shifted_rewards": Fault("score length judge", replaced=[(ppo, "whiten", whiten_with_shift)], shared=dict(
        whiten_rewards=True)),
    "equal_micro_batches": Fault("score policy_loss value_loss", replaced=[
        (Compute, "micro_batches", shares_by_count)], shared=dict(micro_batch=4)),
    "sampler_differs": Fault("score approx_kl clip_fraction updates", replaced=[
        (Compute, "sample", sample_colder)]),
    "reference_moves": Fault("kl kl_coef score judge", replaced=[(ppo, "rollout", rollout_against_itself)]),
    "reward_at_padding": Fault("score judge", replaced=[(GPT, "score", score_last_column)]),
    "dropout": Fault("approx_kl clip_fraction score", replaced=[(MLP, "forward", feed_forward_with_dropout)]),
    "mixed_groups": Fault("score judge kl", replaced=[
        (grpo.train, "__defaults__", (None, ppo.policy_loss, advantages_across_prompts, grpo.rollout))],
        stage=grpo),
    "longer_answers": Fault("length ended score", dict(divide_by_length=True, divide_by_std=True), [], dict(
        divide_by_length=False, divide_by_std=False) | FREE, grpo),
    "one_answer": Fault("entropy score length", dict(lr=5e-3) | FREE),
}


def train(cfg, fault, flags, replaced):
    """The lines of metrics.jsonl of a run with these flags and functions."""
    common = dict(init=f"{cfg.models}/sft", data=f"{cfg.models}/world", reward="{}/reward_model",
                  steps=cfg.steps, batch=cfg.batch, max_dropped=1.0)
    settings = common | fault.shared | flags
    settings["reward"] = settings["reward"].format(cfg.models)
    with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as stack:
        for thing, name, instead in replaced:
            stack.enter_context(patch.object(thing, name, instead))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            fault.stage.train(fault.stage.Config(out=os.path.join(out, "run"), **settings))
        finally:
            launch.at_work = None
        text = Path(out, "run/metrics.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def compare(cfg, name, healthy):
    """The metrics of a fault in both runs: {metric: (healthy values, faulty values)}. healthy: a dict of runs
    without a fault, which many faults share; to it the run that this fault needs is added."""
    fault = FAULTS[name]
    kind = f"{fault.stage.__name__} {fault.shared}"
    if kind not in healthy:
        healthy[kind] = train(cfg, fault, {}, [])
    faulty = train(cfg, fault, fault.flags, fault.replaced)
    return {metric: tuple([step[metric] for step in steps] for steps in (healthy[kind], faulty))
            for metric in fault.metrics.split()}


def show(cfg):
    if not cfg.names:
        print("faults:", ", ".join(FAULTS))
    if unknown := set(cfg.names) - set(FAULTS):
        raise ValueError(f"{min(unknown)} is none of {', '.join(FAULTS)}")
    healthy = {}
    for name in cfg.names:
        found = compare(cfg, name, healthy)
        print(f"\n{name}\n{'step':>5}" + "".join(f"  {metric:>15} {'faulty':>9}" for metric in found))
        for i in sorted({*range(0, cfg.steps, max(1, cfg.steps // 6)), cfg.steps - 1}):
            numbers = "".join(f"  {a[i]:15.3g} {b[i]:9.3g}" for a, b in found.values())
            print(f"{i + 1:5}{numbers}", flush=True)


if __name__ == "__main__":
    main(Config, show, __doc__)
