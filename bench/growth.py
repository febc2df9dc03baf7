"""How cost grows: with length, batch and vocabulary, and what a second process loses.

    python -m bench.growth              everything, half an hour on two cores
    python -m bench.growth sizes        one of: sizes, memory, processes

Each comparison is made in turn, in processes of their own; what is printed are medians.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile

from bench.shapes import GROWTH, SIZES, TASKS, make

ROUNDS, STEPS = 3, 3                # processes in turn, and steps in each, of which the first warms up


def measure(name, folder, precision="bfloat16", processes=1, **flags):
    """(median seconds of a step, peak bytes) of a task of bench/shapes.py."""
    command = [sys.executable, "-m", "bench.ours", name, precision, folder, str(STEPS),
               *(f"{key}={value}" for key, value in flags.items())]
    environment = dict(os.environ)
    if processes > 1:
        command[1:2] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return statistics.median(found["seconds"][1:]), found["peak"]


def in_turn(runs, rounds=ROUNDS):
    """{name: (seconds, bytes)}, medians over rounds in which every run has its turn. runs: {name: (task,
    arguments of measure)}."""
    found = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as folder:
        for task in {task for task, _ in runs.values()}:
            make((TASKS | GROWTH)[task], f"{folder}/{task}")
        for _ in range(rounds):
            for name, (task, how) in runs.items():
                found[name].append(measure(task, f"{folder}/{task}", **how))
    return {name: tuple(map(statistics.median, zip(*pairs))) for name, pairs in found.items()}


def sizes():
    """Time per token and peak memory of a step of SFT and of PPO, while one size grows at a time. Linear cost
    is a constant time per token, apart from attention, where a token reads all tokens before it."""
    found = in_turn({(kind, name): (f"{kind}-{name}", {"precision": "float32"})
                     for name in SIZES for kind in ("sft", "ppo")}, rounds=2)
    print("| length | batch | vocabulary | SFT: µs per token | GB | PPO: µs per token | GB |\n"
          "|---|---|---|---|---|---|---|")
    for name, (length, rows, vocabulary) in SIZES.items():
        cells = [f"{seconds / (rows * length) * 1e6:.0f} | {peak / 1e9:.2f}"
                 for seconds, peak in (found["sft", name], found["ppo", name])]
        print(f"| {length:,} | {rows} | {vocabulary:,} | {' | '.join(cells)} |", flush=True)


def memory():
    """What 56 more sequences in a micro-batch take, with 4,096 tokens in the vocabulary and with 65,536."""
    for stage in ("sft", "dpo", "ppo"):
        runs = {(size, rows): (f"{stage}-{size}", {"micro_batch": rows})
                for size in ("4k", "64k") for rows in (8, 64)}
        found = in_turn(runs, rounds=1)                             # memory hardly varies
        more = {size: (found[size, 64][1] - found[size, 8][1]) / 1e9 for size in ("4k", "64k")}
        print(f"{stage}: micro-batches of 64 sequences take {more['4k']:.2f} GB more than of 8; "
              f"with 16 times the vocabulary {more['64k']:.2f} GB", flush=True)


def processes():
    for task, precision in (("ppo", "bfloat16"), ("ppo-world", "float32")):
        runs = {kind: (task, {"precision": precision, "processes": 2, "parallel": kind})
                for kind in ("ddp", "fsdp")}
        found = in_turn(runs | {"one": (task, {"precision": precision})})
        one, ddp, fsdp = (found[name][0] for name in ("one", "ddp", "fsdp"))
        print(f"{task} in {precision}: one process with two threads {one:.2f} s; two with one thread each: "
              f"ddp {ddp / one - 1:+.0%}, fsdp {fsdp / one - 1:+.0%}", flush=True)


if __name__ == "__main__":
    for part in sys.argv[1:] or ("sizes", "memory", "processes"):
        {"sizes": sizes, "memory": memory, "processes": processes}[part]()
