"""This project beside TRL's PPO and DPO trainers, transformers' generate and peft: the same work, in turn,
each side in the precision in which it is faster.

    make bench                       everything, in an environment of its own
    python -m bench dpo sample       some tasks of bench/shapes.py

Prints a table, and writes it with all numbers to bench/results/.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from bench.shapes import PROMPT, SHAPES, TASKS, make

ROUNDS, STEPS = 3, 3                # processes in turn, and steps in each, of which the first warms up
# autocast: products in bfloat16, weights in float32, so that no update is lost; where nothing is trained, the
# weights may be in bfloat16 too.
OURS, THEIRS = ("float32", "bfloat16"), {"ppo": ("float32", "autocast"), "dpo": ("float32", "autocast"),
                                         "sample": ("float32", "bfloat16")}


def measure(side, name, precision, folder):
    """Median seconds of a step in a process of its own, with its peak memory and mean answer length."""
    command = [sys.executable, "-m", f"bench.{side}", name, precision, folder, str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    found["seconds"] = statistics.median(found["seconds"][1:])
    return found


def compare(name):
    """Both sides of a task: {side: {"precision", "seconds", "peak", ...}}, medians over the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        make(TASKS[name], folder)
        found = {}
        for side, precisions in (("ours", OURS), ("theirs", THEIRS[TASKS[name].kind])):
            for precision in precisions:
                found[side, precision] = [measure(side, name, precision, folder)]
                print(f"{name} {side} {precision}: {found[side, precision][0]['seconds']:.2f} s", flush=True)
        best = {side: min((p for s, p in found if s == side), key=lambda p: found[side, p][0]["seconds"])
                for side in ("ours", "theirs")}
        for _ in range(ROUNDS - 1):
            for side, precision in best.items():
                found[side, precision].append(measure(side, name, precision, folder))
    sides = {}
    for side, precision in best.items():
        runs = found[side, precision]
        sides[side] = {"precision": precision, "all": [run["seconds"] for run in runs],
                       "seconds": statistics.median(run["seconds"] for run in runs),
                       "peak": statistics.median(run["peak"] for run in runs)}
    lengths = [n for run in found["ours", best["ours"]] for n in run["lengths"]]
    return sides | {"length": statistics.mean(lengths)}


def matrix_peak(dtype):
    """Floating-point operations per second of a large matrix product."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    seconds = []
    for _ in range(12):
        began = time.time()
        a @ b
        seconds.append(time.time() - began)
    return 2 * 2048 ** 3 / statistics.median(seconds[2:])


def operations(task, length):
    """Floating-point operations of the matrix products in a step, by the weights that each token meets: twice
    their number forward, twice that backward (half of it where the weights are frozen)."""
    shape = SHAPES[task.shape]
    C, hidden = shape["n_embd"], shape.get("mlp_hidden", 4 * shape["n_embd"])
    kv = C * shape.get("n_kv_head", shape["n_head"]) // shape["n_head"]
    mlp = C * hidden * (3 if shape.get("mlp") == "swiglu" else 2)
    blocks, head = shape["n_layer"] * (2 * C * C + 2 * C * kv + mlp), C * shape["vocab_size"]
    rows = task.rows * (2 if task.kind == "dpo" else 1)
    trunk = 2 * rows * (PROMPT + length) * blocks               # one network reads all rows
    lm = trunk + 2 * rows * length * head
    training = 2 if task.lora_rank else 3
    return {"sample": lm, "dpo": (1 + training) * lm,
            "ppo": 2 * lm + 2 * trunk + task.epochs * training * (lm + trunk)}[task.kind]


def main(names):
    if unknown := sorted(set(names) - set(TASKS)):
        sys.exit(f"bench: no task {unknown[0]}: there are {', '.join(TASKS)}")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    peaks = {name: matrix_peak(dtype) for name, dtype in dtypes.items()}
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), "unknown")
    lines = [f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}; matrix products "
             + ", ".join(f"{name} {peak / 1e9:.0f} GFLOP/s" for name, peak in peaks.items()), "",
             "| task | theirs | ours | ratio | memory | tokens/s | of the peak |",
             "|---|---|---|---|---|---|---|"]
    results = {}
    for name in names:
        found = results[name] = compare(name)
        ours, theirs, task = found["ours"], found["theirs"], TASKS[name]
        share = operations(task, found["length"]) / ours["seconds"] / peaks[ours["precision"]]
        tokens = task.rows * found["length"] / ours["seconds"]
        lines.append(
            f"| {name} | {theirs['seconds']:.2f} s, {theirs['peak'] / 1e9:.1f} GB ({theirs['precision']}) "
            f"| {ours['seconds']:.2f} s, {ours['peak'] / 1e9:.1f} GB ({ours['precision']}) "
            f"| {theirs['seconds'] / ours['seconds']:.2f} | {ours['peak'] / theirs['peak']:.2f} "
            f"| {tokens:.0f} | {share:.0%} |")
        print(lines[-1], flush=True)
    os.makedirs("bench/results", exist_ok=True)
    base = f"bench/results/{time.strftime('%Y-%m-%d')}"
    with open(f"{base}.md", "w", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n")
    with open(f"{base}.json", "w", encoding="utf-8") as f:
        json.dump({"cpu": cpu, "peaks": peaks, "tasks": results}, f, indent=1)
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:] or TASKS)
