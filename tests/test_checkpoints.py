"""Checkpoints on disk: there whole or not at all, and read without running what is in them."""
import io
import os
import pickle
import threading

import pytest
import torch
from test_run import a_run, a_step, steps

import ppo
from runtime import checkpoints as checkpoints_module
from runtime.checkpoints import Checkpoints, Metadata


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


def test_the_newest_checkpoint_that_is_complete_is_the_last(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.last() is None
    (tmp_path / "resume.safetensors").write_bytes(b"")
    assert checkpoints.last() == str(tmp_path / "resume.safetensors")
    for step, complete in ((3, True), (20, True), (100, True), (101, False)):
        folder = tmp_path / f"resume/{step:08}"
        folder.mkdir(parents=True)
        if complete:
            (folder / ".metadata").write_bytes(b"")
    assert checkpoints.last() == str(tmp_path / "resume/00000100")
    checkpoints.remove(but=checkpoints.last())
    assert os.listdir(tmp_path / "resume") == ["00000100"] and not (tmp_path / "resume.safetensors").exists()
    checkpoints.remove()
    assert not (tmp_path / "resume").exists()


class Got:
    """Pickled as a call of getattr, as Python 3.11.2 does with an enum's member."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_shards_of_more_or_fewer_networks_are_refused_in_one_line(tmp_path):
    import torch.distributed.checkpoint as dcp
    nets = {name: torch.nn.Linear(2, 1) for name in ("actor", "critic")}
    state = checkpoints_module.flatten_all(nets, step=3)
    dcp.save(state, checkpoint_id=str(tmp_path / "resume" / "00000003"), no_dist=True)
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.load(nets) == 3
    for others in ({"actor": nets["actor"]}, nets | {"third": torch.nn.Linear(2, 1)}):
        with pytest.raises(ValueError, match=r"does not fit this run \(another network\): add --no-resume$"):
            checkpoints.load(others)


def test_a_table_of_contents_reads_an_enum_however_python_pickles_it_and_no_other_attribute():
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as Encoding
    from torch.distributed.checkpoint.metadata import StorageMeta
    for pickled in (Got(Encoding, "TORCH_CHANNELS_LAST"), Encoding.TORCH_CHANNELS_LAST):
        assert Metadata(io.BytesIO(pickle.dumps(pickled))).load() is Encoding.TORCH_CHANNELS_LAST
    for thing, error in ((Got(StorageMeta, "__init__"), KeyError), (os.system, pickle.UnpicklingError)):
        with pytest.raises(error):
            Metadata(io.BytesIO(pickle.dumps(thing))).load()


def test_numbers_that_have_run_off_are_not_saved(tmp_path):
    checkpoints, model = Checkpoints(str(tmp_path)), torch.nn.Linear(2, 1)
    for good in (True, False):
        with torch.no_grad():
            model.weight.fill_(1.0 if good else float("nan"))
        checkpoints.save({"model": model}, 7 if good else 8)
        checkpoints.wait()
        assert checkpoints.load({"model": model}) == 7 and bool((model.weight == 1).all())


def test_a_part_of_plain_numbers_is_remembered(tmp_path):
    checkpoints, controller = Checkpoints(str(tmp_path)), ppo.AdaptiveKL(0.1, 3.0, 1000)
    controller.update(7.0, 64)
    checkpoints.save({"controller": controller}, 5)
    checkpoints.wait()
    fresh = ppo.AdaptiveKL(0.1, 3.0, 1000)
    assert checkpoints.load({"controller": fresh}) == 5 and vars(fresh) == vars(controller)


def test_what_is_written_in_the_background_is_as_it_was_when_the_save_began(tmp_path, monkeypatch):
    checkpoints, model, may_write = Checkpoints(str(tmp_path)), torch.nn.Linear(2, 1), threading.Event()
    save_tensors = checkpoints_module.save_tensors

    def late(*args):
        may_write.wait()
        save_tensors(*args)
    monkeypatch.setattr(checkpoints_module, "save_tensors", late)
    torch.nn.init.ones_(model.weight)
    checkpoints.save({"model": model}, 1)
    torch.nn.init.zeros_(model.weight)                          # training goes on
    may_write.set()
    checkpoints.wait()
    checkpoints.load({"model": model})
    assert bool((model.weight == 1).all())
