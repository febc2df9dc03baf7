"""Checksums of the files that a run reads: an unfinished run goes on only if they are the same."""
import os
import re
import zlib

from runtime.files import base_of
from runtime.processes import gather, rank, world_size


def fingerprints(cfg):
    """{path: checksum} of the files that the flags name. The processes share the reading. All call it
    together."""
    mine = {path: checksum(path) for path in named_files(cfg)[rank()::world_size()]}
    return dict(sorted(item for theirs in gather(mine) for item in theirs.items()))


def checksum(path):
    crc = 0
    with open(path, "rb") as f:
        while piece := f.read(1 << 22):
            crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def named_files(cfg):
    """The sorted paths of the input files that flags name: files, and the weights, adapters, tokenizers and
    records in folders. A flag may hold several names (`0.5*out/a,file.py:function`). Adapters name the folder
    of their base."""
    values = [x for name, x in vars(cfg).items() if name != "out" and isinstance(x, str)]
    names = {name for value in values for name in (value, *re.split("[,*:]", value)) if name}
    names |= {base_of(name) for name in names} - {None}
    files = {name for name in names if os.path.isfile(name)}
    endings = (".safetensors", "tokenizer.json", "adapter_config.json", ".jsonl")
    for folder in filter(os.path.isdir, names):
        files.update(os.path.join(folder, name) for name in os.listdir(folder)
                     if name.endswith(endings) and name != "metrics.jsonl")
    return sorted(files)
