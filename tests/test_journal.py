"""The file of a person's choices: whole after a power cut and on a full disk."""
import json
from types import SimpleNamespace

import pytest

from feedback import journal
from feedback.journal import Journal


def test_a_journal_loses_no_more_than_the_line_that_was_cut_wherever_it_was(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    lines = Journal(path)
    assert lines.append({"a": "β\n\r"}) == 0
    first = path.read_bytes()
    assert lines.append({"b": [1, 2]}) == len(first)
    whole = path.read_bytes()
    assert [json.loads(line) for line in whole.split(b"\n")[:-1]] == [{"a": "β\n\r"}, {"b": [1, 2]}]
    for end in range(len(first), len(whole)):
        for rest in (whole[len(first):end], b"\0" * (end - len(first))):
            path.write_bytes(first + rest)
            again = Journal(path)
            assert path.read_bytes() == first
            assert ("is dropped" in capsys.readouterr().err) == (len(rest) > 0)
            again.append({"b": [1, 2]})
            assert path.read_bytes() == whole
    again.cut(len(first))
    assert path.read_bytes() == first
    path.write_bytes(b"something else")
    Journal(path)
    assert path.read_bytes() == b"something else"


def no_space(file):
    raise OSError(28, "No space left")


@pytest.mark.parametrize("full", ["fsync", "write"])
def test_a_journal_on_a_full_disk_stays_as_it_was(tmp_path, monkeypatch, full):
    lines = Journal(tmp_path / "a.jsonl")
    lines.append({"a": 1})
    file = lines.file
    if full == "fsync":
        monkeypatch.setattr(journal.os, "fsync", no_space)
    else:                                       # half of it fits
        lines.file = SimpleNamespace(write=lambda line: file.write(line[:5]), truncate=file.truncate)
    with pytest.raises(OSError):
        lines.append({"b": 2})
    assert (tmp_path / "a.jsonl").read_text() == '{"a": 1}\n'
    monkeypatch.undo()
    lines.file = file
    lines.append({"c": 3})
    assert (tmp_path / "a.jsonl").read_text() == '{"a": 1}\n{"c": 3}\n'
