"""Tensor files in the safetensors format: 8 bytes of header length, a JSON header, numbers. Reading one runs
no code, nor does reading the JSON files beside it."""
import json
import math
import mmap
import os
import struct
from pathlib import Path

import torch

from runtime.files import reading

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def save_tensors(path, tensors):
    """Write {name: tensor}: the file appears whole or not at all."""
    write_tensors(path, {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}, tensors.__getitem__)


def write_tensors(path, about, make):
    """Write tensors that are made one at a time: about is {name: (dtype, shape)}, make(name) the tensor."""
    header, offset, kind = {}, 0, {dtype: name for name, dtype in DTYPES.items()}
    for name, (dtype, shape) in about.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    head += b" " * (-len(head) % 8)
    try:
        with open(path + ".tmp", "wb") as f:
            f.write(struct.pack("<Q", len(head)) + head)
            for name in about:
                f.write(make(name).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except OSError:                                             # a full disk needs the room back
        Path(path + ".tmp").unlink(missing_ok=True)
        raise


def load_tensors(path):
    """{name: tensor} of a safetensors file. They stay in it, mapped into memory, until they are read; what is
    written to them does not reach the file. Raises ValueError if it is not one, or is cut short."""
    try:
        with open(path, "rb") as f:
            body = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        first = 8 + struct.unpack("<Q", body[:8])[0]                # where the numbers begin
        if first > len(body):
            raise ValueError("the header is cut short")
        header = json.loads(body[8:first])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            dtype, shape, count = DTYPES[entry["dtype"]], entry["shape"], math.prod(entry["shape"])
            if not 0 <= start <= end <= len(body) - first or end - start != count * dtype.itemsize:
                raise ValueError(f"tensor {name} is cut short")
            flat = torch.empty(0, dtype=dtype)
            if count > 0:
                flat = torch.frombuffer(body, dtype=dtype, count=count, offset=first + start)
            tensors[name] = flat.view(shape)
            tensors[name].mapping = body                        # for copy()
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError,
            OverflowError, MemoryError, struct.error) as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a readable safetensors file: {reason}") from None


def copy(x, dtype, mapped):
    """A copy of x, a part of a mapped tensor, some rows at a time: the pages that hold them are given back
    before the next ones are read, so that the file is never in memory as a whole."""
    out = torch.empty(x.shape, dtype=dtype)
    rows = max(1, 2 ** 22 // max(1, x[:1].numel()))                         # some 4 million numbers
    for some, source in zip(out.split(rows), x.split(rows)):
        some.copy_(source)
        if hasattr(mmap, "MADV_DONTNEED"):                              # where the system has a word for it
            mapped.mapping.madvise(mmap.MADV_DONTNEED)
    return out


def load_folder(folder):
    """{name: tensor} of model.safetensors, or of the shards that its index names. Raises ValueError if there
    is neither."""
    index, names = os.path.join(folder, "model.safetensors.index.json"), ["model.safetensors"]
    if os.path.exists(index):
        with reading(index, "an index of shards") as about:
            names = sorted(set(about["weight_map"].values()))
            if any(os.path.basename(name) != name for name in names):
                raise ValueError("a shard must lie beside its index")
    elif (not os.path.exists(os.path.join(folder, "model.safetensors"))
          and any(name.endswith((".bin", ".pt", ".pth")) for name in os.listdir(folder))):
        raise ValueError(f"{folder}: pickled weights can run code, and are not read; to convert them: "
                         "python -c \"from transformers import AutoModelForCausalLM as M; "
                         f"M.from_pretrained('{folder}').save_pretrained('{folder}')\"")
    return {name: x for shard in names for name, x in load_tensors(os.path.join(folder, shard)).items()}
