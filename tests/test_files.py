"""Files that appear whole, one run per folder, and checksums of what a run reads."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers.start import ROOT

from runtime import files


def test_write_json_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(str(path), {"β": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"β": [1, 2.5, None]}
    with pytest.raises(TypeError):
        files.write_json(str(path), {"fine": 1, "not": object()})
    assert json.loads(path.read_text()) == {"β": [1, 2.5, None]}
    files.write_json(str(path), 3)
    assert path.read_text() == "3" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


CLAIM = "import sys; sys.path.insert(0, sys.argv[1]); from runtime import files; " \
        "files.lock(sys.argv[2]); print('mine'); sys.stdout.flush(); sys.stdin.read()"


@pytest.mark.skipif(files.fcntl is None, reason="no locks here")
def test_a_folder_belongs_to_one_process_until_it_ends_however_it_ends(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", CLAIM, ROOT, str(tmp_path)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "mine\n"
    said = f"another run is at work here .process {owner.pid}.*name another --out"
    with pytest.raises(ValueError, match=said) as e:
        files.lock(str(tmp_path))
    assert "\n" not in str(e.value)
    files.lock(str(tmp_path.parent))                            # any other folder is free
    owner.kill()
    owner.wait()
    files.lock(str(tmp_path))
    files.lock(str(tmp_path))                                   # its own process may come again
    files.held_locks.clear()


def test_named_files_are_those_that_a_run_depends_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out/world/prompts.jsonl", "out/world/tokenizer.json", "out/world/run.json",
                 "model/model.safetensors", "model/metrics.jsonl", "data.jsonl", "mine/model.safetensors"):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        open(name, "w").write(name)
    os.mkdir("adapters")
    files.write_json("adapters/adapter_config.json", {"peft_type": "LORA", "lora_alpha": 2, "task_type": "",
                                                      "base_model_name_or_path": "model"})
    cfg = SimpleNamespace(out="mine", data="out/world", init="adapters", more="data.jsonl", none="", n=3,
                          word="cosine")
    found = files.fingerprints(cfg)
    assert list(found) == ["adapters/adapter_config.json", "data.jsonl", "model/model.safetensors",
                           "out/world/prompts.jsonl", "out/world/tokenizer.json"]
    assert len(set(found.values())) == 5
    open("model/model.safetensors", "a").write(".")
    changed = {name for name, checksum in files.fingerprints(cfg).items() if checksum != found[name]}
    assert changed == {"model/model.safetensors"}


def test_a_large_file_is_read_in_pieces_by_several_processes(tmp_path, monkeypatch):
    path = tmp_path / "large.jsonl"
    path.write_bytes(os.urandom(9 << 20))
    cfg, sent = SimpleNamespace(data=str(path)), []
    alone = files.fingerprints(cfg)

    def as_process(r, gather):
        for name, value in (("rank", lambda: r), ("world_size", lambda: 2), ("gather", gather)):
            monkeypatch.setattr(files, name, value)
        return files.fingerprints(cfg)

    def send(x):
        sent.append(x)
        raise InterruptedError
    for r in range(2):
        with pytest.raises(InterruptedError):
            as_process(r, send)
    assert sorted(map(len, sent)) == [1, 2]                     # pieces of 4 MiB
    assert as_process(0, lambda x: sent) == as_process(1, lambda x: sent) == alone
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.undo()
    assert files.fingerprints(cfg) != alone


def test_a_journal_loses_no_more_than_the_line_that_was_cut_wherever_it_was(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    journal = files.Journal(path)
    assert journal.append({"a": "β\n\r"}) == 0
    first = path.read_bytes()
    assert journal.append({"b": [1, 2]}) == len(first)
    whole = path.read_bytes()
    assert [json.loads(line) for line in whole.split(b"\n")[:-1]] == [{"a": "β\n\r"}, {"b": [1, 2]}]
    for end in range(len(first), len(whole)):
        for rest in (whole[len(first):end], b"\0" * (end - len(first))):
            path.write_bytes(first + rest)
            again = files.Journal(path)
            assert path.read_bytes() == first
            assert ("left out" in capsys.readouterr().out) == (len(rest) > 0)
            again.append({"b": [1, 2]})
            assert path.read_bytes() == whole
    again.cut(len(first))
    assert path.read_bytes() == first
    path.write_bytes(b"something else")
    files.Journal(path)
    assert path.read_bytes() == b"something else"


@pytest.mark.parametrize("full", ["fsync", "write"])
def test_a_journal_on_a_full_disk_stays_as_it_was(tmp_path, monkeypatch, full):
    journal = files.Journal(tmp_path / "a.jsonl")
    journal.append({"a": 1})
    file = journal.file
    if full == "fsync":
        monkeypatch.setattr(files.os, "fsync", lambda f: (_ for _ in ()).throw(OSError(28, "No space left")))
    else:                                       # half of it fits
        journal.file = SimpleNamespace(write=lambda line: file.write(line[:5]), truncate=file.truncate)
    with pytest.raises(OSError):
        journal.append({"b": 2})
    assert (tmp_path / "a.jsonl").read_text() == '{"a": 1}\n'
    monkeypatch.undo()
    journal.file = file
    journal.append({"c": 3})
    assert (tmp_path / "a.jsonl").read_text() == '{"a": 1}\n{"c": 3}\n'


@pytest.mark.skipif(files.fcntl is None, reason="no locks here")
def test_a_lock_with_a_name_leaves_the_rest_of_the_folder_free(tmp_path):
    claim = CLAIM.replace("sys.argv[2])", "sys.argv[2], '.ann')")
    owner = subprocess.Popen([sys.executable, "-c", claim, ROOT, str(tmp_path)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "mine\n"
    with pytest.raises(ValueError, match=f"process {owner.pid}"):
        files.lock(str(tmp_path), ".ann")
    files.lock(str(tmp_path), ".bob")
    files.lock(str(tmp_path))
    owner.kill()
    owner.wait()
    files.held_locks.clear()


def test_a_folder_without_a_model_says_what_to_run_first(tmp_path):
    said = r"no model in .*/sft: run `python sft\.py` first, or name another"
    with pytest.raises(ValueError, match=said) as e:
        files.find(str(tmp_path / "sft"))
    assert "\n" not in str(e.value)
    for name in ("mine", "model"):                          # model.py is no stage that makes one
        with pytest.raises(ValueError, match=f"no model in .*/{name}: name another folder"):
            files.find(str(tmp_path / name))
    (tmp_path / "config.json").write_text("{}")
    assert files.find(str(tmp_path)) == str(tmp_path)


def test_a_name_of_the_hub_is_fetched_where_that_can_be_done(monkeypatch):
    hub = SimpleNamespace(snapshot_download=lambda name, allow_patterns: f"/fetched/{name}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert files.find("owner/some-model.1") == "/fetched/owner/some-model.1"

    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")
    hub.snapshot_download = fail
    with pytest.raises(ValueError, match="no model in gpt2, and the hub does not give it .*: put its") as e:
        files.find("gpt2")
    assert "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="no model in owner/name: .*huggingface_hub is installed"):
        files.find("owner/name")
