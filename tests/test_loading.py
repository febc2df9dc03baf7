"""The world's files, and what is held out."""
import json
import subprocess
import sys
import warnings

import pytest
from helpers.start import ROOT

from data import loading, records, world

FILES = sorted([f"{kind}{part}.jsonl" for kind in ("checkable", "demonstrations", "preferences", "prompts")
                for part in ("", "_heldout")]
               + ["prompts_development.jsonl", "run.json", "tokenizer.json", "tokenizer_config.json"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a small world."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "DEMONSTRATIONS", 400)
        patch.setattr(loading, "PREFERENCES", 200)
        patch.setattr(loading, "HELD_OUT_RECORDS", 40)
        loading.make_world(str(folder), seed=0)
    return folder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(loading, "DEMONSTRATIONS", 400)
    monkeypatch.setattr(loading, "PREFERENCES", 200)
    monkeypatch.setattr(loading, "HELD_OUT_RECORDS", 40)


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(made, small, tmp_path):
    loading.make_world(str(tmp_path / "again"), seed=0)
    loading.make_world(str(tmp_path / "other"), seed=1)
    assert sorted(f.name for f in made.iterdir()) == FILES
    for name in set(FILES) - {"run.json"}:                  # which holds the time
        assert (made / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    for name in ("demonstrations.jsonl", "preferences.jsonl"):
        assert (made / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_no_prompt_is_in_the_files_of_two_parts(made):
    asked = {"": set(), "_heldout": set()}
    development = {json.dumps(p) for p in records.read("prompts", made / "prompts_development.jsonl")}
    for part in asked:
        for conversation in records.read("demonstrations", made / f"demonstrations{part}.jsonl"):
            asked[part].add(json.dumps(conversation[:-1]))
        for preference in records.read("preferences", made / f"preferences{part}.jsonl"):
            asked[part].add(json.dumps(preference.prompt))
        for prompt in records.read("prompts", made / f"prompts{part}.jsonl"):
            asked[part].add(json.dumps(prompt))
    assert asked[""] and asked["_heldout"]
    assert not asked[""] & asked["_heldout"] and not development & (asked[""] | asked["_heldout"])
    # The prompts' files hold them all.
    assert len(asked[""]) + len(asked["_heldout"]) + len(development) == len(world.items())


def test_no_held_out_prompt_is_an_earlier_turn_of_training():
    held_out = {item.prompt for item in world.items() if item.part != "training" and len(item.messages) == 1}
    earlier = {text for item in world.items() if item.part == "training"
               for role, text in item.messages[:-1] if role == "user"}
    assert earlier and not earlier & held_out


def test_preferences_hold_four_answers_to_prompts_of_the_world(made):
    for preference in records.read("preferences", made / "preferences.jsonl"):
        assert len(preference.responses) == 4
        assert 0 <= world.judge(preference.prompt, preference.responses[0]) <= 1


def test_held_out_preferences_are_one_persons(made):
    for preference in records.read("preferences", made / "preferences_heldout.jsonl"):
        assert sorted(preference.ranks) == [1, 2, 3, 4]                 # one person never ties


def test_the_worlds_tokenizer_reads_what_the_world_says(made):
    tok = loading.load_tokenizer(str(made), loading.WORLD)
    for conversation in records.read("demonstrations", made / "demonstrations_heldout.jsonl"):
        for message in conversation:
            assert tok.decode(tok.encode(message["content"])) == message["content"]
            assert len(tok.encode(message["content"])) < len(message["content"])


def test_the_world_is_made_once_where_it_is_missing(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train, held_out = loading.load("prompts", loading.WORLD)
    assert len(train) + len(held_out) == sum(item.part != "development" for item in world.items())
    assert capsys.readouterr().out.count("\n") == 1                     # says that it does
    assert loading.load("prompts", loading.WORLD) == (train, held_out)
    assert capsys.readouterr().out == ""
    assert loading.load_tokenizer("", loading.WORLD).vocab_size == 1024


def test_ties_are_left_out_but_count_in_what_is_held_out(tmp_path, capsys):
    path = str(tmp_path / "pairs.jsonl")
    records.write(path, [{"prompt": str(i), "responses": ["a", "b"], "ranks": [1, 1 if i in (3, 19) else 2]}
                         for i in range(20)])
    train, held_out = loading.load("preferences", path)
    assert len(train) == 17 and [p.prompt[-1]["content"] for p in held_out] == ["9"]
    assert "1 of 18 comparisons are ties" in capsys.readouterr().out


def test_what_is_of_no_use_is_left_out_but_counts_in_what_is_held_out(tmp_path, capsys):
    path = str(tmp_path / "pairs.jsonl")
    records.write(path, [{"prompt": str(i), "chosen": "a", "rejected": "a" if i in (3, 19) else "b"}
                         for i in range(20)])
    train, held_out = loading.load("preferences", path, max_dropped=0.1)
    assert len(train) == 17 and [p.prompt[-1]["content"] for p in held_out] == ["9"]
    assert "2 of 20 records of no use are left out: line 4: " in capsys.readouterr().out
    with pytest.raises(records.RecordError, match="--max_dropped is 0.05"):
        loading.load("preferences", path, max_dropped=0.05)


def test_a_file_alone_holds_out_every_tenth_record(tmp_path):
    records.write(tmp_path / "a.jsonl", [{"prompt": str(i)} for i in range(1, 26)])
    train, held_out = loading.load("prompts", str(tmp_path / "a.jsonl"))
    assert [m[0]["content"] for m in held_out] == ["10", "20"]
    assert [m[0]["content"] for m in train] == [str(i) for i in range(1, 26) if i not in (10, 20)]


def test_a_second_file_is_what_is_held_out(made, tmp_path):
    records.write(tmp_path / "a.jsonl", [{"prompt": str(i)} for i in range(25)])
    records.write(tmp_path / "b.jsonl", [{"prompt": "b"}])
    train, held_out = loading.load("prompts", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert len(train) == 25 and held_out == [[{"role": "user", "content": "b"}]]


ENGLISH = ["Explain briefly why the Mediterranean climate favours olives.",
           "Rewrite this sentence in the passive voice."]


@pytest.mark.parametrize("data, texts, warned", [
    (loading.WORLD, [i.prompt for i in world.items()[:50]], False),
    ("mine.jsonl", [i.prompt for i in world.items()[:50]], False),
    ("mine.jsonl", ["What is the capital of Kenya?"], False), ("mine.jsonl", ENGLISH, True)])
def test_text_that_a_model_of_the_world_cannot_read_is_warned_about(made, data, texts, warned):
    tok = loading.load_tokenizer(str(made), loading.WORLD)
    prompts = [[{"role": "user", "content": text}] for text in texts if isinstance(text, str)]
    with warnings.catch_warnings(record=True) as caught:
        loading.warn_if_foreign(tok, prompts, data, "out/sft")
    assert len(caught) == (1 if warned else 0)
    if warned:
        text = str(caught[0].message)
        assert "out/sft knows 1024 tokens, which were made for other text than mine.jsonl" in text
        assert "--init" in text and "\n" not in text


def test_reading_data_loads_no_torch_and_of_runtime_only_files_and_flags():
    code = ("import sys, data.__main__, data.batches, data.loading, data.records, data.tokenizer\n"
            "print(sorted(name for name in sys.modules if name.split('.')[0] in ('torch', 'runtime')))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "['runtime', 'runtime.files', 'runtime.flags']\n", done.stdout + done.stderr


@pytest.mark.parametrize("flags, status, said", [
    ("--out {}/file/x", 1, "Not a directory"), ("--seed x", 2, "--seed"), ("--show 99", 2, "not 99")])
def test_an_error_of_the_data_command_is_one_line(tmp_path, flags, status, said):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "data", *flags.format(tmp_path).split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("python -m data: ") and said in done.stderr
