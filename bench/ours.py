"""One task with this project: python -m bench.ours TASK PRECISION FOLDER REPEATS [FLAG=VALUE ...], also under
torchrun. Prints a line of JSON."""
import json
import os
import random
import sys
import time
import types

import torch

import dpo
import ppo
import sft
from bench.shapes import GROWTH, PROMPT, TASKS
from data.batches import Comparison, Demonstration
from data.tokenizer import Tokenizer
from runtime import processes
from runtime.compute import Meter
from runtime.models import load, load_reward_model
from runtime.optimizer import make_optimizer
from runtime.run import Run, peak_memory


def random_ids(n):
    return torch.randint(0, 256, (n,)).tolist()


def prepare_ppo(task, folder, flags, repeats):
    """All that a step of PPO needs: (cfg, run, nets, optimizers, tokenizer, prompts)."""
    cfg = ppo.Config(steps=repeats, batch=task.rows, max_new_tokens=task.answer, epochs=task.epochs,
                     minibatches=1, update_kl=0.0, lr=1e-5, critic_lr=1e-5, data="bench", **flags)
    nets = {"actor": load(f"{folder}/lm"), "reference": load(f"{folder}/lm").requires_grad_(False),
            "critic": load_reward_model(f"{folder}/scalar"),
            "reward": load_reward_model(f"{folder}/scalar").requires_grad_(False)}
    run = Run(cfg, repeats)
    run.place(*nets.values())
    optimizers = {name: make_optimizer(nets[name], 1e-5) for name in ("actor", "critic")}
    run.resume(**nets)
    whole = Tokenizer.load(f"{folder}/lm")
    tokenizer = types.SimpleNamespace(prompt=whole.prompt, decode=whole.decode,
                                      end=whole.end if task.uneven else -1)
    letters = PROMPT - len(whole.prompt([{"role": "user", "content": ""}]))         # a token each
    texts = ["".join(random.choices("abcdefgh", k=letters)) for _ in range(task.rows)]
    return cfg, run, nets, optimizers, tokenizer, [[{"role": "user", "content": text}] for text in texts]


def run_ppo(task, folder, flags, repeats):
    cfg, run, nets, optimizers, tokenizer, prompts = prepare_ppo(task, folder, flags, repeats)
    controller = ppo.AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    for _ in range(repeats):
        began = time.time()
        metrics = ppo.step(cfg, run, prompts, nets, optimizers, controller, tokenizer, None, None)
        yield time.time() - began, float(metrics["length"])


def prepare(cfg, folder, repeats):
    """(run, model, optimizer) to train the language model alone."""
    model = load(f"{folder}/lm")
    run = Run(cfg, repeats)
    run.place(model)
    optimizer = make_optimizer(model, cfg.lr)
    run.resume(model=model)
    return run, model, optimizer


def run_sft(task, folder, flags, repeats):
    cfg = sft.Config(batch=task.rows, lr=1e-5, **flags)
    run, model, optimizer = prepare(cfg, folder, repeats)
    for _ in range(repeats):
        rows = [Demonstration(random_ids(PROMPT + task.answer), [False] * PROMPT + [True] * task.answer)
                for _ in range(task.rows)]
        began = time.time()
        stats = Meter()
        for some, share in run.micro_batches(rows, weights=[sum(d.learn) for d in rows]):
            loss = sft.demonstrations_loss(model, run, some)
            (share * loss).backward()
            stats.add(share, loss=loss)
        run.optimizer_step(optimizer, cfg.lr, stats.means()["loss"], "bench")
        yield time.time() - began, task.answer


def run_dpo(task, folder, flags, repeats):
    cfg = dpo.Config(batch=task.rows, nll_coef=0.0, lr=1e-5, **flags)
    run, model, optimizer = prepare(cfg, folder, repeats)
    for _ in range(repeats):
        pairs = []
        for _ in range(task.rows):
            prompt = random_ids(PROMPT)
            answers = [prompt + random_ids(task.answer) for _ in range(2)]
            pairs.append(Comparison(answers, PROMPT, [1, 2], 0.0))
        began = time.time()
        dpo.add_reference(model, run, pairs)
        stats = Meter()
        for some, share in run.micro_batches(pairs, weights=[len(c.pairs) for c in pairs]):
            loss, seen = dpo.pair_loss(model, run, some)
            (share * loss).backward()
            stats.add(share, loss=loss, **seen)
        run.optimizer_step(optimizer, cfg.lr, stats.means()["loss"], "bench")
        yield time.time() - began, task.answer


def run_sample(task, folder, flags, repeats):
    model = load(f"{folder}/lm").requires_grad_(False)
    run = Run(dpo.Config(**flags), repeats)
    run.place(model)
    for _ in range(repeats):
        prompts = [random_ids(PROMPT) for _ in range(task.rows)]
        began = time.time()
        run.sample(model, prompts, run.seeds(task.rows), task.answer, 1.0, -1)
        yield time.time() - began, task.answer


if __name__ == "__main__":
    name, precision, folder, repeats, *more = sys.argv[1:]
    task, said = (TASKS | GROWTH)[name], sys.stdout
    sys.stdout = open(os.devnull, "w")                              # progress is not what is asked for
    flags = dict(out=f"{folder}/out", precision=precision, lora_rank=task.lora_rank, save_seconds=1e6)
    for text in more:
        key, value = text.split("=")
        flags[key] = int(value) if value.isdigit() else value
    processes.start("cpu", 300)
    torch.manual_seed(0)                                            # all processes draw the same rows
    random.seed(0)
    work = {"ppo": run_ppo, "sft": run_sft, "dpo": run_dpo, "sample": run_sample}[task.kind]
    seconds, lengths = zip(*work(task, folder, flags, int(repeats)))
    if processes.is_first():
        print(json.dumps({"seconds": seconds, "lengths": lengths, "peak": peak_memory("cpu")}), file=said)
