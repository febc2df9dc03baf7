"""Tensor files: what is written is read, whole or not at all, and nothing else is."""
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.safetensors import load_tensors, save_tensors


def test_tensor_files_round_trip_all_types_shapes_and_strides(tmp_path):
    path = str(tmp_path / "t.safetensors")
    tensors = {"f64": torch.randn(2, 3).double(), "bf16": torch.randn(5).bfloat16(),
               "f16": torch.randn(3).half(), "i64": torch.arange(4) - 2,
               "u8": torch.tensor([0, 255], dtype=torch.uint8), "bool": torch.tensor([True, False, True]),
               "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4),
               "transposed": torch.randn(3, 4).T, "last": torch.randn(2)}
    save_tensors(path, tensors)
    loaded = load_tensors(path)
    assert loaded.keys() == tensors.keys()
    assert all(loaded[k].dtype == v.dtype and torch.equal(loaded[k], v) for k, v in tensors.items())


def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path):
    path = str(tmp_path / "t.safetensors")
    save_tensors(path, {"a": torch.ones(3)})
    with pytest.raises(Exception):
        save_tensors(path, {"a": torch.zeros(3), "b": "not a tensor"})
    assert torch.equal(load_tensors(path)["a"], torch.ones(3))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_tensor_file_cut_or_scribbled_over_is_read_or_refused_in_one_line(tensor_bytes, data):
    path, whole = tensor_bytes
    start = data.draw(st.integers(0, len(whole) - 1))
    pieces = st.sampled_from([b"[" * 9, b'"shape": [-1]', b"99999999999", b"}"])
    noise = data.draw(st.binary(max_size=12) | pieces)
    before, after = whole[:start], whole[start:]
    spoilt = data.draw(st.sampled_from([before, before + noise + after[len(noise):], before + noise + after]))
    path.write_bytes(spoilt)
    try:
        load_tensors(str(path))
    except ValueError as e:
        assert str(e).startswith(str(path)) and "\n" not in str(e)


@pytest.fixture(scope="module")
def tensor_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    save_tensors(str(path), {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int64),
                             "c": torch.tensor(True)})
    return path, path.read_bytes()


def test_a_header_nested_without_end_is_one_line(tmp_path):
    header = b"[" * 200_000
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="a.safetensors"):
        load_tensors(str(tmp_path / "a.safetensors"))
