"""Stages as commands: what runs, what does not run twice, and how a failure is told."""
import json

import pytest

from lab import stages


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """The words of all commands that have been run, without running them; the status that each ends with."""
    commands, status = [], [0]

    def run(words, **how):
        commands.append(words[1:])
        return type("Done", (), {"returncode": status[0]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages.subprocess, "run", run)
    return commands, status


def test_a_command_gets_its_flags_and_is_run_once(ran):
    commands, _ = ran
    for _ in range(2):
        seconds = stages.run_stage("ppo.py --steps 3", "done.json", out="a folder", seed=2)
    assert commands == [[stages.ROOT / "ppo.py", "--steps", "3", "--out", "a folder", "--seed", "2"]]
    assert seconds == json.loads(open("done.json").read())["seconds"]


def test_a_command_that_fails_is_run_again(ran):
    commands, status = ran
    status[0] = 1
    with pytest.raises(ValueError, match="^`-m data --out x` failed in .*: see above"):
        stages.run_stage("-m data", "done.json", out="x")
    status[0] = 0
    stages.run_stage("-m data", "done.json", out="x")
    assert commands == [["-m", "data", "--out", "x"]] * 2


def test_the_result_of_other_flags_is_refused(ran):
    stages.run_stage("ppo.py", "done.json", seed=1)
    with pytest.raises(ValueError, match="done.json: written by `ppo.py --seed 1`, not by"):
        stages.run_stage("ppo.py", "done.json", seed=2)


def test_scripts_are_found_from_any_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`ppo.py --init nowhere --out out` failed"):
        stages.run_stage("ppo.py", "done.json", init="nowhere", out="out")
    assert "ppo.py: no model in nowhere" in capfd.readouterr().err and not (tmp_path / "done.json").exists()
