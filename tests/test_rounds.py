"""The loop: which labels reach which model, and what is not done twice."""
import os
import shutil

import pytest
from helpers.start import script

from data import records
from feedback import rounds as loop


@pytest.fixture
def commands(tiny_inputs, tmp_path, monkeypatch):
    """A function that runs the loop with scripts that leave a file each and do nothing else: the commands."""
    monkeypatch.chdir(tiny_inputs)
    done = []

    def run(command, **how):
        words = command[1:]
        flags = {w[2:]: words[i + 1] for i, w in enumerate(words) if w.startswith("--")}
        name = words[1] if words[0] == "-m" else os.path.basename(words[0])
        done.append((name, flags))
        file = flags["out"] if name == "feedback.label" else f"{flags['out']}/preferences.jsonl"
        os.makedirs(os.path.dirname(file), exist_ok=True)
        if name in ("feedback.collect", "feedback.label"):
            answers = ["It's 4.", "Go away.", "4"]
            records.write(file, [{"prompt": f"{os.path.basename(flags['model'])} {i}", "responses": answers,
                                  "ranks": [1, 3, 1 if i else 2]} for i in range(2)])
        elif name == "reward_model.py":
            shutil.copytree("out/reward_model", flags["out"], dirs_exist_ok=True)
        else:
            open(f"{flags['out']}/model.safetensors", "w").close()
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(loop.subprocess, "run", run)
    monkeypatch.setattr(loop.annotators, "accuracy", lambda labelled: len(labelled) / 4)

    def start(**settings):
        done.clear()
        loop.loop(loop.Config(out=str(tmp_path / "loop"), device="cpu", rounds=2, labels=30, **settings))
        return done, str(tmp_path / "loop")
    return start


def test_each_round_labels_the_last_policy_and_learns_from_all_labels(commands, capsys):
    done, out = commands()
    steps = [(name, flags.get("model", flags.get("init"))) for name, flags in done[:-1]]
    assert steps == [("feedback.collect", "out/sft"), ("reward_model.py", "out/sft"), ("ppo.py", "out/sft"),
                     ("feedback.collect", f"{out}/ppo_1"), ("reward_model.py", "out/sft"),
                     ("ppo.py", "out/sft"),
                     ("feedback.collect", "out/sft"), ("reward_model.py", "out/sft"), ("ppo.py", "out/sft"),
                     ("feedback.collect", f"{out}/ppo_2")]
    asked = [p.prompt[0]["content"] for p in records.read("preferences", f"{out}/labels_ppo_2.jsonl")]
    assert asked == ["sft 0", "sft 1", "ppo_1 0", "ppo_1 1"]
    once = [flags for name, flags in done if flags["out"].endswith("labels_once")]
    assert [flags["prompts"] for flags in once] == ["60"]               # as many labels in all
    rewards = [flags["reward"] for name, flags in done if name == "ppo.py"]
    assert rewards == [f"{out}/reward_model_{n}" for n in ("ppo_1", "ppo_2", "once")]
    seeds = [flags["seed"] for name, flags in done if name == "feedback.collect"]
    assert len(set(seeds)) == len(seeds), "each round asks about prompts and answers of its own"
    printed = capsys.readouterr().out
    assert printed.count("reward model of") == 3
    assert "the annotators' own mean utility: 50.0%" in printed     # of the last labels


def test_what_is_there_is_not_made_again(commands):
    commands()
    done, _ = commands()
    assert [name for name, _ in done] == ["evaluate.py"]


def test_a_person_ranks_on_the_page(commands):
    done, out = commands(by="person")
    assert {name for name, _ in done} == {"feedback.label", "reward_model.py", "ppo.py", "evaluate.py"}
    seeds = [flags["seed"] for name, flags in done if name == "feedback.label"]
    assert len(set(seeds)) == len(seeds), "each round asks about prompts of its own"


def test_its_scripts_are_found_from_any_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="feedback.collect did not end well"):
        loop.run("feedback.collect", "labels.jsonl", model="out/sft")
    assert "no model in out/sft: run `python sft.py` first" in capfd.readouterr().err


def test_without_a_model_it_says_what_to_run_first_and_leaves_nothing(tmp_path):
    done = script("loop", "", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("loop.py: no model in out/sft: run `python sft.py")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_best_answers_go_back_into_sft(commands):
    done, out = commands(way="best")
    assert [(name, flags.get("init")) for name, flags in done if name == "sft.py"] == [
        ("sft.py", "out/sft"), ("sft.py", f"{out}/best_1")]
    data = [flags["data"] for name, flags in done if name == "sft.py"]
    best = [m[-1]["content"] for m in records.read("demonstrations", data[0])]
    assert best == ["It's 4.", "It's 4."]                               # of two that are best, the first


def test_a_part_that_fails_ends_the_loop(commands, monkeypatch):
    monkeypatch.setattr(loop.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 1}))
    with pytest.raises(ValueError, match="feedback.collect did not end well"):
        commands()
