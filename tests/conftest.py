"""A small chain of all stages, run once through the command lines for all tests that need one."""
import importlib
import os
import signal
import sys

import pytest
import torch
from helpers.start import EVALUATE, FLAGS, SMALL, in_float64, on_cpu, script

from data import loading
from runtime import files, launch


def pytest_configure(config):
    """Only `-m gpu` sees GPUs: the other tests count on what the CPU does bit for bit."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def inside(monkeypatch, capsys):
    """script(), but in this process, which is faster: (status, stderr)."""
    def run(name, flags, folder):
        stage, threads = importlib.import_module(name), torch.get_num_threads()
        handlers = {number: signal.getsignal(number) for number in launch.SIGNALS}
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *on_cpu(name), *flags.split()])
        torch.set_num_threads(1)
        capsys.readouterr()
        try:
            launch.main(stage.Config, stage.train, stage.__doc__)
            return 0, capsys.readouterr().err
        except SystemExit as e:
            error = capsys.readouterr().err
            if isinstance(e.code, str):                         # Python prints it, and ends with 1
                return 1, error + e.code + "\n"
            return e.code, error
        finally:
            launch.at_work = None
            files.held_locks.clear()                            # as when the process ends
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


@pytest.fixture(scope="session")
def alone(chain):
    """The chain's folder, in which one process has run each stage once more in float64, to out/alone/."""
    commands = [f"{stage}.py {flags} --out out/alone/{stage}" for stage, flags in FLAGS.items()]
    in_float64([*commands, f"evaluate.py {EVALUATE} --out out/alone"], chain[0])
    return chain[0]
