"""One GPU: sampling beside transformers' generate, the use of the machine, and where a PPO step's time goes.

    python -m bench.gpu                         into bench/results/gpu.json, in at most eight minutes
    python -m bench.gpu --device cpu --small    the same on tiny networks, to see that it runs

Each number is written as soon as it is there. What fails is written with its message, and the rest goes on.
"""
import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time

import torch

from bench import ours
from bench.ours import now
from bench.shapes import PROMPT, SHAPES, Task, make
from model import GPT, GPTConfig

SECONDS = 450                       # after which nothing new is begun


def product_peak(device):
    """Floating-point operations per second of a large matrix product in bfloat16."""
    n, seconds = 8192 if device == "cuda" else 512, []
    a = torch.randn(n, n, device=device).bfloat16()
    for _ in range(20):
        began = now()
        a @ a
        seconds.append(now() - began)
    return 2 * n ** 3 / statistics.median(seconds[5:])


def median_step(work, task, folder, flags):
    """Median seconds of a step after the first, which warms up."""
    return statistics.median(seconds for seconds, _ in work(task, folder, flags, 4)[1:])


def generate(task, folder, device):
    """Tokens per second of transformers' generate, on the same weights in bfloat16."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/lm", dtype=torch.bfloat16).to(device).eval()
    seconds = []
    for _ in range(3):
        ids = torch.randint(0, 256, (task.rows, PROMPT), device=device)
        began = now()
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                           max_new_tokens=task.answer, min_new_tokens=task.answer)
        seconds.append(now() - began)
    return task.rows * task.answer / statistics.median(seconds[1:])


def utilisation(task, folder, flags, shape, peak):
    """Share of the peak that a training step's matrix products reach, counted as 6 operations per weight and
    token that is trained on, and 2 for DPO's reference; attention's own products come on top."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**SHAPES[shape]))
    trunk = sum(p.numel() for p in model.blocks.parameters())
    head = model.config.n_embd * model.config.vocab_size
    rows = task.rows * (2 if task.kind == "dpo" else 1)
    forward = 2 * rows * ((PROMPT + task.answer) * trunk + task.answer * head)
    seconds = median_step(ours.RUN[task.kind], task, folder, flags)
    return forward * (4 if task.kind == "dpo" else 3) / seconds / peak


def parts(device, small):
    """(name, function of the folder and what was found before) of all that is measured."""
    flags = {"precision": "bfloat16", "device": device, "save_seconds": 1e6, "micro_batch": 16,
             "resume": False, "overwrite": True}
    yield "peak", None, lambda *_: product_peak(device)
    for shape in ("gpt2-6x384", "llama-6x384") if small else ("gpt2-small", "llama-1b"):
        for rows in (4, 8) if small else (64, 256):
            task = Task("sample", shape, rows, answer=8 if small else 128)
            yield f"{shape} sampling {rows}, tokens/s", shape, lambda folder, _, task=task: (
                task.rows * task.answer / median_step(ours.run_sample, task, folder, own(flags, folder)))
            yield f"{shape} generate {rows}, tokens/s", shape, lambda folder, _, task=task: (
                generate(task, folder, device))
        for kind, rows in (("sft", 32), ("dpo", 16)):
            task = Task(kind, shape, 2 if small else rows, answer=8 if small else 448)
            yield f"{shape} {kind}, share of peak", shape, lambda folder, found, task=task, shape=shape: (
                utilisation(task, folder, own(flags, folder), shape, found["peak"]["value"]))
        task = Task("ppo", shape, 4 if small else 64, answer=8 if small else 128, epochs=1)
        yield f"{shape} ppo, seconds", shape, lambda folder, _, task=task: (
            ours.ppo_parts(task, folder, own(flags, folder)))


def own(flags, folder):
    return flags | {"out": f"{folder}/out"}


def main(device, small, path):
    began, found, made = time.time(), {}, None
    with tempfile.TemporaryDirectory() as top:
        for name, shape, measure in parts(device, small):
            if time.time() - began > SECONDS:
                found[name] = {"error": "no time was left"}
                continue
            if shape and shape != made:
                make(Task("ppo", shape, 0), f"{top}/{shape}")
                made = shape
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                    found[name] = {"value": measure(f"{top}/{shape}", found)}
            except Exception as e:                  # a first time on a GPU: all that is wrong, in one go
                found[name] = {"error": f"{type(e).__name__}: {e}"}
            if device == "cuda":
                found[name]["peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
            print(name, found[name], flush=True)
            about = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                     "torch": torch.__version__, "seconds": time.time() - began, "found": found}
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="utf-8") as f:
                json.dump(about, f, indent=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.gpu", usage=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", default="bench/results/gpu.json")
    args = parser.parse_args()
    main(args.device, args.small, args.out)
