"""Checkpoints on disk: there whole or not at all, and read without running what is in them."""
import os

import pytest
from test_run import a_run, a_step, steps


def test_a_checkpoint_cut_short_while_it_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    parts = a_run(tmp_path)
    a_step(*parts)
    before = (tmp_path / "resume.safetensors").read_bytes()
    for moment in ("fsync", "replace"):
        def cut(*args):
            raise OSError(28, "No space left on device")
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, moment, cut)
            a_step(*parts)
        assert (tmp_path / "resume.safetensors").read_bytes() == before
        assert not (tmp_path / "resume.safetensors.tmp").exists()
    assert a_run(tmp_path)[0].step == 1 and steps(tmp_path) == 1


@pytest.mark.parametrize("spoil", [
    lambda b: b[:-8], lambda b: b[:20], lambda b: b"", lambda b: b"\x80\x04cos\nsystem\n(S'true'\ntR."])
def test_a_spoilt_checkpoint_is_one_line(tmp_path, spoil):
    a_step(*a_run(tmp_path))
    path = tmp_path / "resume.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match="resume.safetensors") as e:
        a_run(tmp_path)
    assert "\n" not in str(e.value)
