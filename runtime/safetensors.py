"""Files in the safetensors format: 8 bytes with the length of a JSON header, the header, the numbers. Reading
them runs no code."""
import json
import math
import mmap
import os
from pathlib import Path

import torch

from runtime.files import reading

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def types(tensors):
    """{name: (dtype, shape)} of named tensors, sharded or not."""
    return {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}


def save_tensors(path, tensors):
    """Write {name: tensor}, whole or not at all."""
    write_tensors(path, types(tensors), tensors.__getitem__)


def write_tensors(path, types, make, write=True):
    """Write tensors that are made one at a time, so that they need never be in memory together: types is
    {name: (dtype, shape)}, and make(name) gives the tensor. write: whether this process writes the file, and
    does not only make the tensors in the same order as the one that does, because they are sharded."""
    if not write:
        for name in types:
            make(name)
        return
    header, offset, names = {}, 0, {dtype: name for name, dtype in DTYPES.items()}
    for name, (dtype, shape) in types.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    head += b" " * (-len(head) % 8)
    try:
        with open(path + ".tmp", "wb") as f:
            f.write(len(head).to_bytes(8, "little") + head)
            for name in types:
                f.write(make(name).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    finally:                                                    # a full disk needs the space back
        Path(path + ".tmp").unlink(missing_ok=True)


def load_tensors(path):
    """{name: tensor} of a file. The numbers stay in the file, mapped into memory, until they are read; writes
    to a tensor do not reach the file. Raises ValueError if the file is cut short or not of this format."""
    try:
        with open(path, "rb") as f:
            body = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        first = 8 + int.from_bytes(body[:8], "little")              # where the numbers begin
        if first > len(body):
            raise ValueError("the header is cut short")
        tensors = {}
        for name, entry in json.loads(body[8:first]).items():
            if name == "__metadata__":
                continue
            dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = math.prod(shape)
            if not 0 <= start <= end <= len(body) - first or end - start != count * dtype.itemsize:
                raise ValueError(f"tensor {name} is cut short")
            numbers = torch.empty(0, dtype=dtype)                   # frombuffer refuses a count of 0
            if count > 0:
                numbers = torch.frombuffer(body, dtype=dtype, count=count, offset=first + start)
            tensors[name] = numbers.view(shape)
            tensors[name].mapping = body                            # for copy()
        return tensors
    except Exception as e:                              # a header can be wrong in any of many ways
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a readable safetensors file: {reason}") from None


def copy(x, dtype, mapped):
    """A copy of x, a part of a tensor that is mapped from a file, made some rows at a time. Their pages are
    released before the next are read, so that the file is never in memory as a whole."""
    out = torch.empty(x.shape, dtype=dtype)
    rows = max(1, 2 ** 22 // max(1, x[:1].numel()))                         # about 4 million numbers
    for some, source in zip(out.split(rows), x.split(rows)):
        some.copy_(source)
        if hasattr(mmap, "MADV_DONTNEED"):                              # not every system has it
            mapped.mapping.madvise(mmap.MADV_DONTNEED)
    return out


def load_folder(folder):
    """{name: tensor} of model.safetensors, or of the shards that its index names. Raises ValueError if there
    is neither."""
    index, names = os.path.join(folder, "model.safetensors.index.json"), ["model.safetensors"]
    if os.path.exists(index):
        with reading(index, "an index of shards") as value:
            names = sorted(set(value["weight_map"].values()))
            if any(os.path.basename(name) != name for name in names):
                raise ValueError("a shard must lie beside its index")
    elif not os.path.exists(os.path.join(folder, names[0])) and any(Path(folder).glob("*.bin")):
        raise ValueError(f"{folder}: pickled weights can run code, and are not read; to convert them: "
                         "python -c \"from transformers import AutoModelForCausalLM as M; "
                         f"M.from_pretrained('{folder}').save_pretrained('{folder}')\"")
    return {name: x for shard in names for name, x in load_tensors(os.path.join(folder, shard)).items()}
