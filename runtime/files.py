"""Files of a run: written whole or not at all, one run per folder, and checksums of what it reads."""
import json
import os
import zlib

from runtime.adapters import base_of
from runtime.flags import WORLD
from runtime.processes import gather, rank, world_size

try:
    import fcntl
except ImportError:                     # Windows has none: there, two runs in one folder go unnoticed
    fcntl = None

held_locks = {}                             # the locks that this process holds: {folder: open file}


def write_json(path, value):
    """The file appears whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
    os.replace(path + ".tmp", path)


def lock(folder):
    """Claim a folder for this process until it ends, however it ends. ValueError if another one has it."""
    folder = os.path.realpath(folder)
    if fcntl is None or folder in held_locks:
        return
    file = open(os.path.join(folder, ".lock"), "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"{folder}: another run is at work here (process {file.read()}): "
                         "wait for it, or name another --out") from None
    except OSError:                     # a file system without locks
        return
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    held_locks[folder] = file


def fingerprints(cfg):
    """{path: checksum} of the files that the settings name: data, and the weights and tokenizer of a
    checkpoint folder. A run goes on only over the same ones. The processes share the reading."""
    size, chunks, mine, found = 1 << 22, [], {}, {}
    for path in named_files(cfg):
        chunks += [(path, start) for start in range(0, max(1, os.path.getsize(path)), size)]
    for path, start in chunks[rank()::world_size()]:
        with open(path, "rb") as f:
            f.seek(start)
            mine[path, start] = zlib.crc32(f.read(size))
    everyone = {piece: checksum for theirs in gather(mine) for piece, checksum in theirs.items()}
    for path, start in chunks:
        found[path] = zlib.crc32(everyone[path, start].to_bytes(4, "big"), found.get(path, 0))
    return {path: f"{checksum:08x}" for path, checksum in found.items()}


def named_files(cfg):
    """The input files that settings name, sorted: a file, or a folder of a checkpoint (of adapters, with the
    one of their base) or of the world."""
    found = set()
    values = [x for name, x in vars(cfg).items() if name != "out" and isinstance(x, str) and x]
    values += [part.rpartition(":")[0] or part for value in values for part in value.split(",")]   # --reward
    values += [base for base in map(base_of, values) if base]
    for value in values:
        endings = (".safetensors", "tokenizer.json", "adapter_config.json")
        if value == "world":
            value, endings = WORLD, (*endings, ".jsonl")
        if os.path.isdir(value):
            found.update(os.path.join(value, n) for n in os.listdir(value) if n.endswith(endings))
        elif os.path.isfile(value):
            found.add(value)
    return sorted(found)
