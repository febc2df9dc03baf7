"""The demo: which commands it runs, and what happens if one of them fails or is stopped."""
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
from helpers.start import ROOT

import demo
from data import loading
from data.__main__ import Config as World
from data.__main__ import make

SAYS = "import sys, time; print('{0} begins', flush=True); time.sleep({1}); sys.exit({2})"


@pytest.fixture
def program(monkeypatch, tmp_path):
    """A function that makes small programs the demo's commands: {name: (seconds, status, threads, inputs)}.
    """
    def make(**commands):
        monkeypatch.setattr(demo, "COMMANDS", {name: (f"title of {name}", threads, inputs)
                                               for name, (*_, threads, inputs) in commands.items()})
        monkeypatch.setattr(demo, "words_of", lambda cfg, name: [str(tmp_path / f"{name}.py")])
        for name, (seconds, status, *_) in commands.items():
            (tmp_path / f"{name}.py").write_text(SAYS.format(name, seconds, status))
        return demo.Config(out=str(tmp_path))
    return make


def test_every_command_is_run_and_has_the_seed_and_the_folder():
    stages = ["sft", "reward_model", "dpo", "ppo_no_kl", "ppo"]
    assert [demo.inputs_of(name) for name in demo.COMMANDS] == [
        [], ["world"], ["world", "sft"], ["world", "sft"], *[["world", "sft", "reward_model"]] * 2,
        ["world", *stages]]
    for name in demo.COMMANDS:
        words = demo.words_of(demo.Config(out="a folder", seed=3), name)
        out, seed = words[words.index("--out") + 1], words[words.index("--seed") + 1]
        assert out.startswith("a folder") and seed == "3"
        assert "--overwrite" not in words
        again = demo.words_of(demo.Config(overwrite=True), name)
        assert ("--overwrite" in again) == (name != "report")          # a report replaces the one before


def test_commands_begin_when_their_inputs_and_a_core_are_free_and_print_one_after_the_other(program, capfd):
    cfg = program(one=(0.1, 0, 2, ""), two=(1.5, 0, 1, "{out}/one"), three=(0.5, 0, 1, "{out}/one"),
                  four=(0.5, 0, 1, "{out}/three"), five=(0.1, 0, 2, "{out}/two"))
    began = {}
    popen = demo.subprocess.Popen

    def noted(words, **more):
        began[words[2].stem] = time.time()
        return popen(words, **more)
    with mock.patch.object(demo.subprocess, "Popen", noted):
        demo.demo(cfg)
    assert list(began) == ["one", "two", "three", "four", "five"]
    assert began["three"] - began["two"] < 0.3 and began["four"] - began["three"] > 0.5
    assert began["five"] - began["two"] > 1.5                       # it needs both cores
    printed = capfd.readouterr().out
    parts = [part for i, name in enumerate(began, 1)
             for part in (f"{i} of 5  title of {name}", f"{name} begins")]
    assert [printed.index(part) for part in parts] == sorted(printed.index(part) for part in parts)


@pytest.mark.parametrize("bad, commands", [("one", {"one": (0.5, 1, 1, ""), "two": (30, 0, 1, "")}),
                                           ("two", {"one": (0.2, 0, 1, ""), "two": (0.5, 1, 1, "")})])
def test_a_command_that_fails_ends_the_demo_and_the_command_beside_it(program, bad, commands):
    cfg, began = program(**commands), time.time()
    with pytest.raises(ValueError, match=f"^{bad} failed, see above"):
        demo.demo(cfg)
    assert time.time() - began < 20


def test_a_stopped_demo_stops_what_it_has_started(tmp_path):
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "demo.py")], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "2 of 7" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    left = subprocess.run(["pgrep", "-f", "sft.py --out out/demo/sft"], capture_output=True, text=True).stdout
    assert not [pid for pid in left.split() if os.readlink(f"/proc/{pid}/cwd") == str(tmp_path)]


def test_a_world_is_made_once_and_one_of_another_seed_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "DEMONSTRATIONS", 50)
    monkeypatch.setattr(loading, "PREFERENCES", 10)
    monkeypatch.setattr(loading, "HELD_OUT_RECORDS", 10)
    loading.make_world(str(tmp_path), seed=1)
    prompts = (tmp_path / "demonstrations.jsonl").read_text()
    make(World(out=str(tmp_path), seed=1))
    assert "holds this world already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds the world of seed 1: name another --out, or add --overwrite"):
        make(World(out=str(tmp_path), seed=2))
    assert (tmp_path / "demonstrations.jsonl").read_text() == prompts
    with monkeypatch.context() as patch:                    # stopped at half: nothing says that it is whole
        patch.setattr(loading, "learn", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(World(out=str(tmp_path), seed=2, overwrite=True))
    make(World(out=str(tmp_path), seed=2))
    assert (tmp_path / "demonstrations.jsonl").read_text() != prompts
