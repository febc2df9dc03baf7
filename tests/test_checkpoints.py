"""Checkpoints on disk: there whole or not at all, and read without running what is in them."""
import math
import os

import pytest
import torch
from test_run import a_run, a_step, steps

import ppo
from runtime import checkpoints as checkpoints_module
from runtime.checkpoints import Checkpoints
from runtime.optimizer import make_optimizer
from runtime.safetensors import save_tensors


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


def tensors_of(networks):
    return checkpoints_module.flatten(networks, step=3)


@pytest.mark.parametrize("name, tensors", [
    ("more networks than the run has", lambda nets: tensors_of(nets | {"third": torch.nn.Linear(2, 1)})),
    ("fewer", lambda nets: tensors_of({"actor": nets["actor"]})),
    ("other shapes", lambda nets: tensors_of(nets | {"critic": torch.nn.Linear(3, 1)})),
    ("another precision", lambda nets: tensors_of(nets | {"critic": torch.nn.Linear(2, 1).bfloat16()})),
    ("no step", lambda nets: {k: x for k, x in tensors_of(nets).items() if k != "step"}),
    ("a step that is no number", lambda nets: tensors_of(nets) | {"step": torch.tensor(math.inf)}),
    ("two steps", lambda nets: tensors_of(nets) | {"step": torch.tensor([3, 4])})], ids=lambda v: v)
def test_a_checkpoint_of_something_else_is_refused_in_one_line_and_changes_nothing(tmp_path, name, tensors):
    nets = {name: torch.nn.Linear(2, 1) for name in ("actor", "critic")}
    before, checkpoints = {k: x.clone() for k, x in tensors_of(nets).items()}, Checkpoints(str(tmp_path))
    save_tensors(checkpoints.path, {k: x + 1 for k, x in tensors(nets).items()})
    with pytest.raises(ValueError, match=r"does not fit this run \(another network\): add --no-resume$"):
        checkpoints.load(nets)
    assert all(torch.equal(x, before[k]) for k, x in tensors_of(nets).items())
    save_tensors(checkpoints.path, tensors_of(nets))
    assert checkpoints.load(nets) == 3


def test_shards_are_gathered_in_the_same_order_by_all_and_written_by_the_first(tmp_path, monkeypatch):
    parts = {"model": torch.nn.Linear(2, 3), "controller": ppo.AdaptiveKL(0.1, 3.0, 1000)}
    Checkpoints(str(tmp_path)).save(parts, 7)
    whole = (tmp_path / "resume.safetensors").read_bytes()
    gathered = {True: [], False: []}
    for first in (True, False):
        folder = tmp_path / str(first)
        folder.mkdir()
        monkeypatch.setattr(checkpoints_module, "is_first", lambda: first)
        monkeypatch.setattr(checkpoints_module, "collect", lambda x: gathered[first].append(x) or x)
        Checkpoints(str(folder)).save(parts, 7)
        assert [path.read_bytes() for path in folder.iterdir()] == [whole] * first
    assert len(gathered[True]) == len(tensors_of(parts))
    assert all(torch.equal(a, b) for a, b in zip(gathered[True], gathered[False], strict=True))


def test_numbers_that_have_run_off_are_not_saved(tmp_path):
    checkpoints, model = Checkpoints(str(tmp_path)), torch.nn.Linear(2, 1)
    for good in (True, False):
        with torch.no_grad():
            model.weight.fill_(1.0 if good else float("nan"))
        checkpoints.save({"model": model}, 7 if good else 8)
        assert checkpoints.load({"model": model}) == 7 and bool((model.weight == 1).all())


def test_a_part_of_plain_numbers_is_remembered(tmp_path):
    checkpoints, controller = Checkpoints(str(tmp_path)), ppo.AdaptiveKL(0.1, 3.0, 1000)
    controller.update(7.0, 64)
    checkpoints.save({"controller": controller}, 5)
    fresh = ppo.AdaptiveKL(0.1, 3.0, 1000)
    assert checkpoints.load({"controller": fresh}) == 5 and vars(fresh) == vars(controller)


def test_an_optimiser_takes_its_next_step_as_if_it_had_never_stopped(tmp_path):
    def start():
        model = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        return {"model": model, "optimizer": make_optimizer(model, 0.1)}

    def take_step(model, optimizer):
        model(torch.tensor([1.0, model.weight[0, 0].item()])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    parts, fresh, checkpoints = start(), start(), Checkpoints(str(tmp_path))
    for _ in range(3):
        take_step(**parts)
    checkpoints.save(parts, 3)
    assert checkpoints.load(fresh) == 3
    for _ in range(2):
        take_step(**parts), take_step(**fresh)
    assert torch.equal(parts["model"].weight, fresh["model"].weight)
