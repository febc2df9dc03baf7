"""A small chain of all stages, run once through the command lines for all tests that need one."""
import importlib
import os
import signal
import subprocess
import sys

import pytest
import torch

import runtime
from data import loading

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = {
    "sft": "--n_layer 1 --n_head 2 --n_embd 32 --evals 2",
    "reward_model": "--normalize 32",
    "dpo": "--records 40",
    "ppo": "--steps 3 --batch 16 --max_new_tokens 12 --micro_batch 8 --ptx_coef 0.1 --whiten_rewards",
    "evaluate": "--samples 2 --best_of 4 --show 1 --max_new_tokens 12",
}


def on_cpu(name):
    return ["--device", "cpu"] if name in SMALL else []


def command(name, flags):
    """How to start a stage: on the CPU with the same threads each time, for the same weights."""
    return {"args": [sys.executable, "-u", os.path.join(ROOT, f"{name}.py"), *on_cpu(name), *flags.split()], "text": True,
            "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def pytest_configure(config):
    """Only `-m gpu` sees GPUs: the other tests count on what the CPU does bit for bit."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def script(name, flags, folder, stdin=""):
    return subprocess.run(**command(name, flags), cwd=folder, input=stdin, capture_output=True)


@pytest.fixture
def inside(monkeypatch, capsys):
    """script(), but in this process, which is faster: (status, stderr)."""
    def run(name, flags, folder):
        stage, handlers, threads = importlib.import_module(name), {n: signal.getsignal(n) for n in runtime.SIGNALS}, torch.get_num_threads()
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *on_cpu(name), *flags.split()])
        torch.set_num_threads(1)
        capsys.readouterr()
        try:
            runtime.main(stage.Config, stage.train, stage.__doc__)
            return 0, capsys.readouterr().err
        except SystemExit as e:
            text = isinstance(e.code, str)                          # Python prints it, and ends with 1
            return (1, capsys.readouterr().err + e.code + "\n") if text else (e.code, capsys.readouterr().err)
        finally:
            runtime.Run.at_work = None
            torch.set_num_threads(threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return run


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A folder in which every stage has run on a small world: its path and {stage: what it printed}."""
    folder, printed = tmp_path_factory.mktemp("chain"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "DEMONSTRATIONS", 400)
        patch.setattr(loading, "PREFERENCES", 80)
        patch.setattr(loading, "HELD_OUT_RECORDS", 40)
        loading.make_world(str(folder / "out/world"))
    for stage, flags in SMALL.items():
        done = script(stage, flags, folder)
        assert done.returncode == 0, f"{stage}.py {flags}:\n{done.stdout}{done.stderr}"
        printed[stage] = done.stdout
    return folder, printed
