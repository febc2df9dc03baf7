"""Rounds of feedback: which labels reach which model, and what is not done twice."""
import os
from pathlib import Path

import pytest
from helpers.start import script

from data import records
from feedback import rounds
from lab import stages


@pytest.fixture
def commands(tiny_inputs, tmp_path, monkeypatch):
    """A function that runs the rounds with scripts that leave a file each and do nothing else: the commands.
    status: what a script, by its name, ends with."""
    monkeypatch.chdir(tiny_inputs)
    done, status = [], {}

    def run(command, **how):
        words = [str(word) for word in command[1:] if word != "--overwrite"]
        flags = {w[2:]: words[i + 1] for i, w in enumerate(words) if w.startswith("--")}
        name = words[1] if words[0] == "-m" else os.path.basename(words[0])
        done.append((name, flags))
        file = flags["out"] if name == "feedback.label" else f"{flags['out']}/preferences.jsonl"
        os.makedirs(os.path.dirname(file), exist_ok=True)
        if name == "feedback.label" or name == "feedback.collect" and flags["by"] != "person":
            whose = os.path.basename(flags.get("model", ""))
            records.write(file, [{"prompt": f"{whose} {i}", "responses": ["It's 4.", "Go away.", "4"],
                                  "ranks": [1, 3, 1 if i else 2]} for i in range(2)])
        return type("Done", (), {"returncode": status.get(name, 0)})

    monkeypatch.setattr(stages.subprocess, "run", run)

    def start(**settings):
        done.clear()
        defaults = {"out": str(tmp_path / "loop"), "device": "cpu", "rounds": 2, "labels": 30}
        rounds.loop(rounds.Config(**defaults | settings))
        return done, str(tmp_path / "loop")
    start.status, start.done = status, done
    return start


def test_each_round_labels_the_last_policy_and_learns_from_all_labels(commands):
    done, out = commands()
    steps = [(name, flags.get("model", flags.get("init"))) for name, flags in done[:-1]]
    assert steps == [("feedback.collect", "out/sft"), ("reward_model.py", "out/sft"), ("ppo.py", "out/sft"),
                     ("feedback.collect", f"{out}/ppo_1"), ("reward_model.py", "out/sft"),
                     ("ppo.py", "out/sft")]
    data = [flags["data"] for name, flags in done if name == "reward_model.py"]
    asked = [[p.prompt[0]["content"] for p in records.read("preferences", file)] for file in data]
    assert asked == [["sft 0", "sft 1"], ["sft 0", "sft 1", "ppo_1 0", "ppo_1 1"]]
    rewards = [flags["reward"] for name, flags in done if name == "ppo.py"]
    assert rewards == [f"{out}/reward_model_ppo_1", f"{out}/reward_model_ppo_2"]
    assert [flags["prompts"] for name, flags in done if name == "feedback.collect"] == ["30", "30"]
    seeds = [flags["seed"] for name, flags in done if name == "feedback.collect"]
    assert len(set(seeds)) == len(seeds), "each round asks about prompts and answers of its own"
    assert done[-1][0] == "evaluate.py"


def test_what_is_there_is_not_made_again_and_a_further_round_goes_on(commands, capsys):
    commands()
    done, _ = commands()
    assert done == [] and "report.md compares the rounds" in capsys.readouterr().out
    done, out = commands(rounds=3)
    assert [name for name, _ in done] == ["feedback.collect", "reward_model.py", "ppo.py", "evaluate.py"]
    assert done[0][1]["model"] == f"{out}/ppo_2"


@pytest.mark.parametrize("changed", [{"labels": 31}, {"seed": 1}, {"by": "out/reward_model"},
                                     {"init": "out/reward_model"}])
@pytest.mark.parametrize("by", ["annotators", "person"])
def test_parts_of_other_flags_are_refused(commands, changed, by):
    """And nothing is run: the old parts stay as they were. So do those of a person who is not ready yet."""
    if by == "person":
        commands.status["feedback.label"] = 130
        with pytest.raises(ValueError, match="failed"):
            commands(by="person")
    else:
        commands()
    for _ in range(2):
        with pytest.raises(ValueError, match="labels_ppo_1/done.json: written by"):
            commands(**{"by": by} | changed)
        assert commands.done == []


def test_device_and_precision_reach_every_part(commands):
    done = list(commands(precision="bfloat16")[0])
    done += commands(precision="bfloat16", way="best")[0]
    scripts = {"feedback.collect", "reward_model.py", "ppo.py", "sft.py", "evaluate.py"}
    assert {name for name, _ in done} == scripts
    assert all((flags["device"], flags["precision"]) == ("cpu", "bfloat16") for _, flags in done)


@pytest.mark.parametrize("by, script, flag", [("out/sft", "feedback.collect", "constitution"),
                                              ("person", "feedback.label", "guidelines")])
def test_a_constitution_reaches_whoever_judges(commands, by, script, flag):
    done, _ = commands(by=by, constitution="rules.txt")
    for name, flags in done:
        assert flags.get(flag) == ("rules.txt" if name == script else None)
        assert name != "feedback.collect" or flags["by"] == by
    assert script in [name for name, _ in done]


def test_a_person_ranks_the_sampled_answers_on_the_page(commands):
    done, out = commands(by="person")
    names = ["feedback.collect", "feedback.label", "reward_model.py", "ppo.py"]
    assert [name for name, _ in done] == [*names, *names, "evaluate.py"]
    labelled = [flags for name, flags in done if name == "feedback.label"]
    assert [flags["tasks"] for flags in labelled] == [f"{out}/labels_ppo_{r}/tasks.jsonl" for r in (1, 2)]
    assert [flags["out"] for flags in labelled] == [f"{out}/labels_ppo_{r}/preferences.jsonl" for r in (1, 2)]
    seeds = [flags["seed"] for name, flags in done if name == "feedback.collect"]
    assert len(set(seeds)) == len(seeds), "each round asks about prompts of its own"


def test_a_person_who_stops_half_way_goes_on_where_they_stopped(commands, tmp_path):
    """An empty file of choices, or one with some of them, is no finished one."""
    commands.status["feedback.label"] = 130
    for _ in range(2):
        with pytest.raises(ValueError, match="`-m feedback.label .*` failed"):
            commands(by="person")
        assert commands.done[-1][0] == "feedback.label"
    Path(tmp_path / "loop/labels_ppo_1/preferences.jsonl").write_text("")
    with pytest.raises(ValueError, match="failed"):
        commands(by="person")
    assert [name for name, _ in commands.done] == ["feedback.label"]
    commands.status.clear()
    done, _ = commands(by="person")
    assert [name for name, _ in done][:3] == ["feedback.label", "reward_model.py", "ppo.py"]


def test_without_a_model_it_says_what_to_run_first_and_leaves_nothing(tmp_path):
    done = script("feedback.rounds", "", tmp_path)
    assert done.returncode == 1 and "rounds: no model in out/sft: run `python sft.py" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_best_answers_go_back_into_sft(commands):
    done, out = commands(way="best")
    assert [(name, flags.get("init")) for name, flags in done if name == "sft.py"] == [
        ("sft.py", "out/sft"), ("sft.py", f"{out}/best_1")]
    data = [flags["data"] for name, flags in done if name == "sft.py"]
    best = [m[-1]["content"] for m in records.read("demonstrations", data[0])]
    assert best == ["It's 4.", "It's 4."]                               # of two that are best, the first


def test_a_part_that_fails_ends_the_loop_and_is_run_again(commands):
    commands.status["reward_model.py"] = 1
    with pytest.raises(ValueError, match="reward_model.py .*` failed"):
        commands()
    commands.status.clear()
    done, _ = commands()
    assert done[0][0] == "reward_model.py"


def test_the_scripts_take_these_flags(commands, tmp_path):
    """What the rounds hand to each script is what it knows."""
    import evaluate
    import ppo
    import reward_model
    import sft
    from feedback import collect, label
    from runtime import flags as parser
    known = {"feedback.collect": collect, "feedback.label": label, "reward_model.py": reward_model,
             "ppo.py": ppo, "sft.py": sft, "evaluate.py": evaluate}
    ran = [command for settings in ({}, {"way": "best"}, {"by": "person", "constitution": "rules.txt",
                                                         "out": str(tmp_path / "person")})
           for command in list(commands(**settings)[0])]
    assert {name for name, _ in ran} == known.keys()
    for name, flags in ran:
        argv = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
        parser.parse(known[name].Config, "", argv)
