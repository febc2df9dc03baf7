"""Files of a run: written whole or not at all, one run per folder, checksums of what it
reads, and a journal of lines."""
import contextlib
import json
import os
import re
import zlib

from runtime.processes import gather, rank, world_size

try:
    import fcntl
except ImportError:                     # Windows has none: there, two runs in one folder go unnoticed
    fcntl = None

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))       # of this repository
ADAPTER_CONFIG = "adapter_config.json"      # a folder that holds one holds LoRA adapters in PEFT's format
held_locks = {}                             # the locks that this process holds: {path: open file}


def write_json(path, value):
    """The file appears whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
    os.replace(path + ".tmp", path)


@contextlib.contextmanager
def reading(path, kind):
    """A context manager that yields the value of a JSON file. Raises ValueError saying that the file is not
    of this kind ("a model's config") if it cannot be read, or if the block finds that it lacks a key or
    holds a wrong value."""
    try:
        with open(path, encoding="utf-8") as f:
            yield json.load(f)
    except KeyError as e:
        raise ValueError(f"{path}: not {kind}: {e} is missing") from None
    except (ValueError, AttributeError, TypeError, RecursionError, OSError) as e:
        raise ValueError(f"{path}: not {kind}: {e}") from None


def find(name):
    """The folder that holds the model called name: name itself if it is a folder with a model, otherwise
    the one into which huggingface_hub, where it is installed, downloads a model of the hub ("gpt2", or
    "owner/name"). Raises ValueError if there is none."""
    if any(os.path.exists(os.path.join(name, file)) for file in ("config.json", ADAPTER_CONFIG)):
        return name
    script = os.path.basename(os.path.normpath(name)) + ".py"
    if script != "model.py" and os.path.exists(os.path.join(ROOT, script)):
        raise ValueError(f"no model in {name}: run `python {script}` first, or name another folder")
    if os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"no model in {name}: name another folder")
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
    except ImportError:
        raise ValueError(f"no model in {name}: name another folder (where huggingface_hub is installed, it "
                         "can be a name of the hub)") from None
    except Exception as e:                              # a download can fail with any of many exceptions
        raise ValueError(f"no model in {name}, and the hub does not give it ({type(e).__name__}): put its "
                         "config.json, model.safetensors and tokenizer.json into a folder") from None


def base_of(folder):
    """The name of the model to which a folder's adapters belong; None if the folder holds no adapters."""
    path = os.path.join(folder, ADAPTER_CONFIG)
    if not os.path.exists(path):
        return None
    with reading(path, "adapters") as config:
        if not config["base_model_name_or_path"]:
            raise ValueError("base_model_name_or_path is empty: write the name of their model there")
        return config["base_model_name_or_path"]


def lock(folder, name=""):
    """Claim a folder, or of it only what has this name, for this process until it ends, however it ends.
    ValueError if another one has it."""
    folder = os.path.realpath(folder)
    path = os.path.join(folder, f"{name}.lock")
    if fcntl is None or path in held_locks:
        return
    file = open(path, "a+", encoding="utf-8")
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
    held_locks[path] = file


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
    one of their base) or of data."""
    found = set()
    values = [x for name, x in vars(cfg).items() if name != "out" and isinstance(x, str) and x]
    parts = [part.rpartition("*")[2] for value in values for part in value.split(",")]             # --reward
    values += [part.rpartition(":")[0] or part for part in parts]
    values += [base for base in map(base_of, values) if base]
    for value in values:
        if os.path.isdir(value):
            endings = (".safetensors", "tokenizer.json", "adapter_config.json", ".jsonl")
            found.update(os.path.join(value, name) for name in os.listdir(value)
                         if name.endswith(endings) and name != "metrics.jsonl")
        elif os.path.isfile(value):
            found.add(value)
    return sorted(found)


class Journal:
    """A file of JSON objects, one per line, of which each is on the disk once append() returns. Half a line,
    which a power cut may leave at the end, is dropped; what else ends without a newline is not touched."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "a+b", buffering=0)
        self.file.seek(0)
        lines = self.file.read().splitlines(keepends=True)
        if lines and lines[-1][:1] in b"{\0" and not lines[-1].endswith(b"\n"):
            print(f"{path}: its last line was not written to its end, and is left out")
            self.file.truncate(self.size() - len(lines[-1]))

    def size(self):
        return os.path.getsize(self.path)

    def append(self, record):
        """Returns where the line begins, for cut(). If it cannot be written, the file stays as it was."""
        start, line = self.size(), json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            if self.file.write(line) < len(line):
                raise OSError("the disk is full")
            os.fsync(self.file)
        except OSError:
            self.file.truncate(start)
            raise
        return start

    def cut(self, start):
        """Take back all lines from this one on."""
        self.file.truncate(start)
        os.fsync(self.file)
