"""One task with this project: python -m bench.ours TASK PRECISION FOLDER REPEATS [FLAG=VALUE ...], also under
torchrun. Prints a line of JSON.

A stage's own `train` runs on random texts, and metrics.jsonl says how long each step took.
"""
import json
import os
import random
import sys
import time
from pathlib import Path

import torch

import dpo
import ppo
import sft
from bench.shapes import GROWTH, PROMPT, TASKS
from data import records
from data.tokenizer import Tokenizer
from runtime import processes
from runtime.compute import Compute
from runtime.models import load
from runtime.run import Run, peak_memory


def text(length):
    """Random letters, each of which is one token."""
    return "".join(random.choices("abcdefgh", k=length))


def write_texts(folder, count, answer):
    """Write prompts of PROMPT tokens, each with two answers of `answer` tokens, which every stage reads."""
    letters = PROMPT - len(Tokenizer.load(f"{folder}/lm").prompt([{"role": "user", "content": ""}]))
    rows = [{"prompt": text(letters), "chosen": text(answer - 1), "rejected": text(answer - 1),
             "response": text(answer - 1)} for _ in range(count)]       # and the end token
    records.write(f"{folder}/texts.jsonl", rows)
    records.write(f"{folder}/held_out.jsonl", rows[:1])


def steps_of(stage, cfg):
    """Run a stage; returns the metrics of each step, whose "seconds" are its wall-clock time."""
    stage.train(cfg)
    return [json.loads(line) for line in Path(cfg.out, "metrics.jsonl").read_text("utf-8").splitlines()]


def timed(owner, name):
    """Replace a function by one that keeps the seconds of each call; returns the list of them."""
    function, seconds = getattr(owner, name), []

    def measured(*args, **kwargs):
        began = now()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(now() - began)
    setattr(owner, name, measured)
    return seconds


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def run_ppo(task, folder, flags, repeats):
    """(seconds, mean length of an answer) of each step."""
    write_texts(folder, max(10, task.rows), task.answer)
    cfg = ppo.Config(steps=repeats, batch=task.rows, max_new_tokens=task.answer, epochs=task.epochs,
                     minibatches=1, update_kl=0.0, lr=1e-5, critic_lr=1e-5, warmup=0, init=f"{folder}/lm",
                     reward=f"{folder}/scalar", data=f"{folder}/texts.jsonl", **flags)
    return [(step["seconds"], step["length"]) for step in steps_of(ppo, cfg)]


def run_sft(task, folder, flags, repeats):
    write_texts(folder, repeats * task.rows, task.answer)
    cfg = sft.Config(batch=task.rows, lr=1e-5, warmup=0, evals=1, init=f"{folder}/lm",
                     data=f"{folder}/texts.jsonl", held_out=f"{folder}/held_out.jsonl", **flags)
    return [(step["seconds"], task.answer) for step in steps_of(sft, cfg)]


def run_dpo(task, folder, flags, repeats):
    """A step's seconds include its share of the reference's log-probabilities, computed before the first."""
    write_texts(folder, repeats * task.rows, task.answer)
    reference = timed(dpo, "add_reference")
    cfg = dpo.Config(batch=task.rows, lr=1e-5, warmup=0, init=f"{folder}/lm", data=f"{folder}/texts.jsonl",
                     held_out=f"{folder}/held_out.jsonl", **flags)
    return [(step["seconds"] + sum(reference) / repeats, task.answer) for step in steps_of(dpo, cfg)]


def run_sample(task, folder, flags, repeats):
    model, steps = load(f"{folder}/lm").requires_grad_(False), []
    run = Run(dpo.Config(**flags), repeats)
    run.place(model)
    for _ in range(repeats):
        prompts = torch.randint(0, 256, (task.rows, PROMPT)).tolist()
        began = now()
        run.sample(model, prompts, run.seeds(task.rows), task.answer)
        steps.append((now() - began, task.answer))
    return steps


def ppo_parts(task, folder, flags):
    """Seconds of the parts of a PPO step: the last of three, after two that warm up."""
    parts = {"sampling": timed(Compute, "sample"), "reference": timed(Compute, "logprobs"),
             "scores": timed(Compute, "score")}
    last = run_ppo(task, folder, flags, 3)[-1][0]
    seconds = {name: calls[-1] for name, calls in parts.items()}
    return seconds | {"values and update": last - sum(seconds.values())}


RUN = {"ppo": run_ppo, "sft": run_sft, "dpo": run_dpo, "sample": run_sample}

if __name__ == "__main__":
    name, precision, folder, repeats, *more = sys.argv[1:]
    task, said = (TASKS | GROWTH)[name], sys.stdout
    sys.stdout = open(os.devnull, "w")                              # progress is not what is asked for
    flags = dict(out=f"{folder}/out", precision=precision, lora_rank=task.lora_rank, save_seconds=1e6,
                 resume=False, overwrite=True)
    for word in more:
        key, value = word.split("=")
        flags[key] = int(value) if value.isdigit() else value
    processes.start("cpu", 300)
    torch.manual_seed(0)                                            # all processes draw the same rows
    random.seed(0)
    seconds, lengths = zip(*RUN[task.kind](task, folder, flags, int(repeats)))
    if processes.is_first():
        print(json.dumps({"seconds": seconds, "lengths": lengths, "peak": peak_memory("cpu")}), file=said)
