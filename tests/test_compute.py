"""Devices, and rows in micro-batches: a weighted mean over rows and a map over rows, however the work is split."""
import pytest
import torch

from runtime import compute
from runtime.compute import pad


def test_a_device_that_is_not_there_is_refused():
    assert compute.pick_device("cpu") == "cpu" and compute.pick_device("auto") in ("cuda", "mps", "cpu")
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(ValueError, match=f"--device {name}"):
                compute.pick_device(name)


def test_pad_fills_on_the_right():
    out = pad([[1, 2, 3], [4]])
    assert out.dtype == torch.int64 and out.tolist() == [[1, 2, 3], [4, 0, 0]]


def test_pad_keeps_masks_bool():
    out = pad([[True], [False, True]])
    assert out.dtype == torch.bool and out.tolist() == [[True, False], [False, True]]
