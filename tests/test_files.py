"""JSON files that appear whole, one run per folder, and where models are."""
import json
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


def test_a_missing_default_model_names_one_of_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out/demo/sft", "out/empty/sft"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "out/demo/sft/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"or name another folder \(out/demo/sft\)$"):
        files.find("out/sft")


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
