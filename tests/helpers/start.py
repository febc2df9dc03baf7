"""How tests start the scripts of this project: alone, under torchrun, in float64, and misbehaving."""
import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from runtime.safetensors import load_tensors

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STAGES, KINDS = ["sft", "reward_model", "dpo", "ppo"], ["ddp", "fsdp"]
SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]           # numbers of processes

# A chain of small stages.
SMALL = {
    "sft": "--n_layer 1 --n_head 2 --n_embd 32 --evals 2 --warmup 4",
    "reward_model": "--normalize 32 --warmup 5",
    "dpo": "--warmup 2",
    "ppo": "--steps 3 --batch 16 --max_new_tokens 12 --micro_batch 8 --whiten_rewards",
    "evaluate": "--samples 2 --best_of 4 --show 1 --max_new_tokens 12",
}
# The same with rows that do not divide by the processes, of very different lengths, in several micro-batches
# per step.
FLAGS = {
    "sft": "--n_layer 2 --n_head 2 --n_embd 32 --evals 2 --batch 31 --micro_batch 9 --warmup 4",
    "reward_model": "--normalize 33 --batch 7 --micro_batch 8 --warmup 5",
    "dpo": "--nll_coef 2 --batch 7 --micro_batch 8 --warmup 5",
    "ppo": "--steps 3 --batch 17 --max_new_tokens 12 --micro_batch 5 --sample_batch 7 "
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
    """Run a script, as a copy of a process that has imported PyTorch: what subprocess.run returns."""
    start = command(name, flags)
    return run_copies(start["args"][2:], folder, [start["env"]], stdin)


def in_background(name, flags, folder):
    start = command(name, flags)
    return Started(start["args"], start["env"], folder)


@lru_cache(maxsize=1)
def copier():
    """The process of helpers/forks.py, started once."""
    helper = os.path.join(ROOT, "tests/helpers/forks.py")
    process = subprocess.Popen([sys.executable, "-u", helper], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    atexit.register(process.stdin.close)
    return process


def ask(request):
    """The copier's answer to a request."""
    print(json.dumps(request), file=copier().stdin, flush=True)
    return json.loads(copier().stdout.readline())


def run_copies(args, folder, environments, stdin=""):
    """Run a script with these arguments once for each environment, side by side: what subprocess.run returns,
    with the highest status and what all have printed."""
    with tempfile.TemporaryDirectory() as streams:
        paths = {name: os.path.join(streams, name) for name in ("stdin", "stdout", "stderr")}
        for name, path in paths.items():
            with open(path, "w", encoding="utf-8") as f:
                f.write(stdin if name == "stdin" else "")
        numbers = ask({"args": args, "cwd": str(folder), "env": environments, **paths})
        statuses = [ask({"wait": number}) for number in numbers]
        stdout, stderr = (Path(paths[name]).read_text("utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(args, max(statuses, key=abs), stdout, stderr)


class Started:
    """A script or module at work in a copy (`command`'s words and environment): what the tests use of
    subprocess.Popen."""

    def __init__(self, args, env, folder):
        self.returncode = None
        with tempfile.TemporaryDirectory() as streams:
            paths = {name: os.path.join(streams, name) for name in ("stdout", "stderr")}
            for path in paths.values():
                os.mkfifo(path)
            [self.pid] = ask({"args": args[2:], "cwd": str(folder), "env": [env],
                              "stdin": os.devnull, **paths})
            self.stdout, self.stderr = (open(path, encoding="utf-8") for path in paths.values())

    def poll(self, how="poll"):
        if self.returncode is None:
            self.returncode = ask({how: self.pid})
        return self.returncode

    def wait(self):
        return self.poll("wait")

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self):
        """What it has printed since, on both streams, once it has ended."""
        printed = [stream.read() for stream in (self.stdout, self.stderr)]
        self.wait()
        return printed


def torchrun(processes, script, arguments, folder, restarts=0):
    """A script under torchrun, as arguments of subprocess.Popen."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc_per_node={processes}", f"--max_restarts={restarts}"]
    return {"args": [*launcher, os.path.join(ROOT, script), *arguments], "cwd": folder,
            "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True,
            "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def ranks(processes):
    """The environment of each process, as torchrun sets it; of one process alone if there are none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes == 0:
        return [environment]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    return [{**environment, **address, "RANK": str(rank), "LOCAL_RANK": str(rank),
             "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)} for rank in range(processes)]


def in_processes(processes, script, arguments, folder):
    """A script in several processes, which find each other as under torchrun."""
    return run_copies([os.path.join(ROOT, script), *arguments], folder, ranks(processes))


def in_float64(commands, folder, processes=0):
    """Scripts one after another, with all numbers in float64: alone, or in several processes."""
    done = in_processes(processes, "tests/helpers/in_float64.py", commands, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def misbehave(where, how, rank, flags, folder, processes=2, restarts=0, script="ppo.py"):
    """A script in copies of one process that torchrun makes, of which one fails: see helpers/misbehave.py."""
    arguments = [where, how, str(rank), script, *flags.split()]
    start = torchrun(processes, "tests/helpers/misbehave.py", arguments, folder, restarts)
    helper = os.path.join(ROOT, "tests/helpers/commands_in_copies.py")
    return run_copies([helper, *start["args"][2:]], folder, [start["env"]])


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
