"""What a run remembers while it trains, on disk: written in the background, and there whole or not at all.

    out/ppo/resume.safetensors      where each process holds all of it (one process, or ddp)
    out/ppo/resume/STEP/            where it is sharded (fsdp): each process writes its part (torch.distributed.checkpoint)

Any number of processes reads either of them. Reading runs no code from the files.
"""
import contextlib
import os
import pickle
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist

import parallel
from model import load_tensors, save_tensors


class Checkpoints:
    """The checkpoint of the run in a folder: the last one alone is kept."""

    def __init__(self, folder, timeout=600):
        self.whole, self.shards, self.writing = os.path.join(folder, "resume.safetensors"), os.path.join(folder, "resume"), None
        self.pool = ThreadPoolExecutor(1)
        self.group = None                # of the processes, apart from what training sends
        if parallel.world() > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def last(self):
        """The newest one that is complete, a path, or None."""
        with contextlib.suppress(FileNotFoundError):
            done = [n for n in sorted(os.listdir(self.shards)) if os.path.exists(os.path.join(self.shards, n, ".metadata"))]
            if done:
                return os.path.join(self.shards, done[-1])
        return self.whole if os.path.exists(self.whole) else None

    def save(self, parts, step):
        """Begin to write the state of some parts ({name: network, optimiser, ...}) after a step, unless numbers in it have
        run off to infinity. All processes call it together, and change nothing before it returns: then it has copies."""
        self.wait()
        state = {f"{name}/{key}": x for name, part in parts.items() for key, x in flatten(part).items()}
        if not finite(state):
            return
        state["step"] = torch.tensor(step)
        if any(map(parallel.is_split, state.values())):
            import torch.distributed.checkpoint as dcp          # a second to import
            path = os.path.join(self.shards, f"{step:08}")
            # Two threads: a single one works through CUDA, and would take room on the first GPU for every process.
            self.writing = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(path, thread_count=2), process_group=self.group), path
        elif parallel.rank() == 0:
            copies = {key: parallel.mine(x).detach().to("cpu", copy=True) for key, x in state.items()}
            self.writing = self.pool.submit(save_tensors, self.whole, copies), self.whole

    def wait(self):
        """Until what save() began is on the disk, and what it replaces is gone. Raises OSError if it could not be written."""
        if self.writing:
            (future, path), self.writing = self.writing, None
            try:
                future.result()
            except BaseException as e:          # torch.distributed.checkpoint's own kind holds one exception a process
                raise next(iter(e.failures.values()))[0] if hasattr(e, "failures") else e
            if parallel.rank() == 0:
                self.remove(path)

    def remove(self, but=None):
        """Delete all checkpoints, but one."""
        if but != self.whole:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.whole)
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.shards):
                if os.path.join(self.shards, name) != but:
                    with contextlib.suppress(FileNotFoundError):        # first what makes it a checkpoint
                        os.remove(os.path.join(self.shards, name, ".metadata"))
                    shutil.rmtree(os.path.join(self.shards, name))
            if not os.listdir(self.shards):
                os.rmdir(self.shards)

    def load(self, parts):
        """Put the last checkpoint into the parts; returns its step. Raises ValueError if it does not fit or cannot be read."""
        path = self.last()
        try:
            tensors = load_tensors(path) if path == self.whole else load_shards(path, parts)
            for name, part in parts.items():
                restore(part, {key[len(name) + 1:]: x for key, x in tensors.items() if key.startswith(name + "/")})
            return int(tensors["step"])
        except (KeyError, ValueError, RuntimeError, TypeError, EOFError, OSError, pickle.UnpicklingError) as e:
            raise ValueError(f"{path} does not fit this run ({(str(e) or type(e).__name__).splitlines()[0]}): add --no-resume") from None


def flatten(part):
    """What a part of training remembers, as {name: tensor}: a network's weights, an optimiser's moments ("7.exp_avg")."""
    state = part.state_dict()
    if isinstance(part, torch.optim.Optimizer):
        return {f"{i}.{key}": x for i, moments in state["state"].items() for key, x in moments.items()}
    return state


def restore(part, tensors):
    """The reverse of flatten."""
    if isinstance(part, torch.optim.Optimizer):
        state, parameters = {}, [p for group in part.param_groups for p in group["params"]]
        for name, x in tensors.items():
            i, key = name.split(".")
            moment = x.shape == parameters[int(i)].shape                # or the number of steps
            state.setdefault(int(i), {})[key] = parallel.like(parameters[int(i)], x.clone()) if moment else x.clone()
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
    else:
        now = part.state_dict()
        part.load_state_dict({name: parallel.like(now[name], x) for name, x in tensors.items()})


def finite(tensors):
    """Whether all numbers are, in the shards of all processes. All call it together."""
    bad = sum(not bool(parallel.mine(x).isfinite().all()) for x in tensors.values())
    return parallel.total(bad) == 0


def load_shards(path, parts):
    """Read a folder of shards, whatever the number of processes that wrote it, each tensor sharded as the parts are."""
    import torch.distributed.checkpoint as dcp
    shapes, state = {}, {}
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            shapes |= {f"{name}/{i}": p for i, p in enumerate(p for group in part.param_groups for p in group["params"])}
        else:
            shapes |= {f"{name}/{key}": x for key, x in part.state_dict().items()}

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            with open(os.path.join(path, ".metadata"), "rb") as f:
                metadata = Metadata(f).load()
            metadata.storage_meta = dcp.metadata.StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    for key, saved in Reader(path).read_metadata().state_dict_metadata.items():
        like = shapes.get(key, shapes.get(key.rsplit(".", 1)[0]))
        same = like is not None and like.shape == saved.size
        state[key] = torch.empty_like(like) if same else torch.empty(saved.size, dtype=saved.properties.dtype)
    try:
        dcp.load(state, storage_reader=Reader(path), no_dist=parallel.world() == 1)
    except dcp.api.CheckpointException as e:                    # one exception a process
        raise ValueError(str(next(iter(e.failures.values()))[0])) from None
    return state


class Metadata(pickle.Unpickler):
    """The table of contents of torch.distributed.checkpoint is a pickle: read it without letting it name anything but
    what such a table is made of."""
    ALLOWED = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
               ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
               *(("torch.distributed.checkpoint.metadata", name) for name in (
                   "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
                   "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"))}

    def find_class(self, module, name):
        if (module, name) in self.ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a table of contents may not name {module}.{name}")


def fingerprints(cfg, world):
    """{path: checksum} of the files that the settings name: data, and the weights and tokenizer of a checkpoint folder.
    A run goes on only over the same ones. The processes, which call it together, share the reading."""
    pieces, size = [], 1 << 22
    for value in {world if v == "world" else v for k, v in vars(cfg).items() if k != "out" and isinstance(v, str) and v}:
        kinds = (".safetensors", ".tiktoken") + (".jsonl",) * (value == world)
        inside = sorted(n for n in os.listdir(value) if n.endswith(kinds)) if os.path.isdir(value) else []
        for path in [os.path.join(value, n) for n in inside] or [value] * os.path.isfile(value):
            pieces += [(path, start) for start in range(0, os.path.getsize(path) or 1, size)]
    mine, found = {}, {}
    for path, start in parallel.share(sorted(set(pieces))):
        with open(path, "rb") as f:
            f.seek(start)
            mine[path, start] = zlib.crc32(f.read(size))
    for (path, _), checksum in sorted(piece for part in parallel.everyone(mine) for piece in part.items()):
        found[path] = zlib.crc32(checksum.to_bytes(4, "big"), found.get(path, 0))
    return {path: f"{checksum:08x}" for path, checksum in found.items()}
