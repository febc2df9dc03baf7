"""A small chain of all stages, run once through the command lines for all tests that need one."""
import importlib
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from helpers.start import EVALUATE, FLAGS, SMALL, in_float64, on_cpu, script

from data import loading, records
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from runtime import files, launch


def pytest_configure(config):
    """Only `-m gpu` and `-m "gpu and ..."` see GPUs: the other tests count on what the CPU does bit for
    bit."""
    if config.option.markexpr.split(" and ")[0] != "gpu":
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
def small_world(tmp_path_factory):
    """The folder of a small world."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "DEMONSTRATIONS", 400)
        patch.setattr(loading, "PREFERENCES", 80)
        patch.setattr(loading, "HELD_OUT_RECORDS", 40)
        loading.make_world(str(folder))
    return folder


@pytest.fixture(scope="session")
def chain(small_world, tmp_path_factory):
    """A folder in which every stage has run on a small world: its path and {stage: what it printed}."""
    folder, printed = tmp_path_factory.mktemp("chain"), {}
    shutil.copytree(small_world, folder / "out/world")
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


@pytest.fixture(scope="session")
def tiny_inputs(small_world, tmp_path_factory):
    """A folder with a small world, files of preferences (pairs with margins and soft labels; rankings of two
    to four answers, with ties), a program that scores, and a language model and a reward model of random
    weights in float64, whose answers are short and end now and then: what the stages start from where they
    are held against plain loops."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(small_world, folder / "out/world")
    tokenizer = Tokenizer.load(str(folder / "out/world"))
    for name, head, seed in (("sft", "lm", 1), ("reward_model", "scalar", 2)):
        torch.manual_seed(seed)
        config = GPTConfig(vocab_size=1024, block_size=56, n_layer=1, n_head=2, n_embd=16, tied=False)
        model = GPT(config, head).double()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
            if head == "lm":
                model.norm.bias += 0.5
                model.head.weight[tokenizer.end] = 0.5      # some 5 nats more: one token in seven
        model.save(str(folder / "out" / name))
        tokenizer.save(str(folder / "out" / name))
    words = "Paris is the capital of France and not of Spain".split()
    answers = [" ".join(words[:1 + i % 10]) for i in range(100)]
    pairs, rankings = [], []
    for i in range(60):
        prompt, n = f"What is {i} plus {i}?", 2 + i % 3
        pairs.append({"prompt": prompt, "chosen": answers[i], "rejected": answers[7 * i % 100],
                      "margin": i % 3 / 2, "probability": 1.0 if i % 4 else 0.7})
        rankings.append({"prompt": prompt, "responses": answers[i:i + n], "ranks": [2, 1, 1 + i % 2, 2][:n]})
    records.write(folder / "pairs.jsonl", pairs)
    records.write(folder / "rankings.jsonl", rankings)
    (folder / "program.py").write_text("def words(messages, answer):\n"
                                       "    return len(answer.split()) - len(messages[-1]['content']) % 5\n")
    return folder


@pytest.fixture
def trained(tiny_inputs, tmp_path, monkeypatch):
    """A function that trains a stage in this process, in float64 on one thread: (its settings, the model, the
    lines of metrics.jsonl, run.json)."""
    def train(stage, **settings):
        settings.setdefault("max_dropped", 1.0)             # the tiny networks' blocks hold little
        cfg = stage.Config(out=str(tmp_path / "out"), device="cpu", overwrite=True, **settings)
        stage.train(cfg)
        lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
        return cfg, GPT.load(cfg.out), lines, json.loads((tmp_path / "out/run.json").read_text())
    monkeypatch.chdir(tiny_inputs)
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield train
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)
    launch.at_work = None
