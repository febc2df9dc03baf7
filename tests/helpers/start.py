"""How tests start the scripts of this project: alone, under torchrun, in float64, and misbehaving."""
import os
import subprocess
import sys

import pytest
import torch

from runtime.safetensors import load_tensors

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STAGES, KINDS = ["sft", "reward_model", "dpo", "ppo"], ["ddp", "fsdp"]
SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]           # numbers of processes

# A chain of small stages.
SMALL = {
    "sft": "--n_layer 1 --n_head 2 --n_embd 32 --evals 2",
    "reward_model": "--normalize 32 --warmup 5",
    "dpo": "--warmup 2",
    "ppo": "--steps 3 --batch 16 --max_new_tokens 12 --micro_batch 8 --whiten_rewards",
    "evaluate": "--samples 2 --best_of 4 --show 1 --max_new_tokens 12",
}
# The same with rows that do not divide by the processes, of very different lengths, in several micro-batches
# per step.
FLAGS = {
    "sft": "--n_layer 2 --n_head 2 --n_embd 32 --evals 2 --batch 31 --micro_batch 7 --warmup 4",
    "reward_model": "--normalize 33 --batch 7 --micro_batch 8 --warmup 5",
    "dpo": "--nll_coef 2 --batch 7 --micro_batch 8 --warmup 5",
    "ppo": "--steps 3 --batch 17 --max_new_tokens 12 --micro_batch 3 --sample_batch 5 "
           "--whiten_rewards --entropy_coef 0.01",
}
FLAGS = {stage: f"--device cpu {flags}" for stage, flags in FLAGS.items()}
THRIFTY = "--checkpoint_blocks --offload --micro_tokens 300"
EVALUATE = "out/sft out/dpo --device cpu --samples 2 --best_of 4 --show 1 --max_new_tokens 12"


def on_cpu(name):
    return ["--device", "cpu"] if name in SMALL else []


def command(name, flags):
    """A script ("ppo") or a module ("variants.grpo") on the CPU, always with as many threads, for the same
    weights: arguments of subprocess.run."""
    what = ["-m", name] if "." in name else [os.path.join(ROOT, f"{name}.py")]
    return {"args": [sys.executable, "-u", *what, *on_cpu(name), *flags.split()],
            "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}}


def script(name, flags, folder, stdin=""):
    return subprocess.run(**command(name, flags), cwd=folder, input=stdin, capture_output=True)


def torchrun(processes, script, arguments, folder, restarts=0):
    """A script under torchrun, as arguments of subprocess.Popen."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc_per_node={processes}", f"--max_restarts={restarts}"]
    return {"args": [*launcher, os.path.join(ROOT, script), *arguments], "cwd": folder,
            "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True,
            "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def in_float64(commands, folder, processes=0):
    """Scripts one after another, with all numbers in float64: alone, or under torchrun."""
    start = torchrun(processes, "tests/helpers/in_float64.py", commands, folder)
    if processes == 0:
        start["args"] = [sys.executable, os.path.join(ROOT, "tests/helpers/in_float64.py"), *commands]
    done = subprocess.run(**start)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def misbehave(where, how, rank, flags, folder, processes=2, restarts=0, script="ppo.py"):
    """A script under torchrun, of which one process fails: see helpers/misbehave.py."""
    arguments = [where, how, str(rank), script, *flags.split()]
    return subprocess.run(**torchrun(processes, "tests/helpers/misbehave.py", arguments, folder, restarts))


def own_lines(stderr, script="ppo.py"):
    """The errors of our program, without its warnings and what torchrun says of it."""
    lines = [line for line in stderr.splitlines() if line.startswith(f"{script}:")]
    return [line for line in lines if not line.startswith(f"{script}: warning:")]


def assert_close(a, b):
    """The models of two runs in float64, within 1e-9."""
    ours, theirs = (load_tensors(str(path / "model.safetensors")) for path in (a, b))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-9,
                                   msg=lambda m: f"{name}: {m}")
