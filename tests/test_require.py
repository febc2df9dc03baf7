"""Bounds for a report's numbers."""
import json
import subprocess
import sys

import pytest
from helpers.start import ROOT

from lab import require


def test_conditions_are_held_against_the_numbers():
    conditions = ["win_rate>=0.7", " kl < 5", "safe_declined<=0.05", "reward>-1"]
    good = {"win_rate": 0.7, "kl": 4.9, "safe_declined": 0.05, "reward": -0.9}
    assert require.unmet(conditions, good) == require.unmet([], good) == []
    bad = {"win_rate": 0.69, "kl": 5.0, "safe_declined": 0.0501, "reward": -1.0}
    assert require.unmet(conditions, bad) == [
        "win_rate is 0.69, not >= 0.7", "kl is 5.0, not < 5", "safe_declined is 0.0501, not <= 0.05",
        "reward is -1.0, not > -1"]
    assert require.unmet(["reward<1", "wins<1"], {"reward": None}) == ["reward is None, not < 1",
                                                                      "wins is None, not < 1"]
    assert require.unmet(["families<1"], {"families": {"sum": 0.5}}) != []


@pytest.mark.parametrize("text", ["win_rate=0.7", "", "kl=>5", "kl<=nan", "kl>=1 2", "kl"])
def test_what_is_no_condition_is_one_line_and_status_2(capsys, text):
    with pytest.raises(SystemExit) as e:
        require.unmet([text], {"kl": 1, "win_rate": 1})
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1 and repr(text) in error


def test_the_last_model_must_meet_what_is_required(tmp_path):
    models = {"sft": {"kl": 0.0}, "ppo": {"kl": 6.5}}
    (tmp_path / "report.json").write_text(json.dumps({"models": models}))
    for condition, status, said in (("kl<7", 0, ""), ("kl<5", 1, "ppo: kl is 6.5, not < 5\n")):
        done = subprocess.run([sys.executable, "-m", "lab.require", str(tmp_path / "report.json"), condition],
                              cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (status, said)
