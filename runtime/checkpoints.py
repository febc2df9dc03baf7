"""What a run remembers while it trains, on disk: written in the background, and there whole or not at all.

    out/ppo/resume.safetensors      where each process holds all of it (one process, or ddp)
    out/ppo/resume/STEP/            where it is sharded (fsdp): each process writes its part, through
                                    torch.distributed.checkpoint

Any number of processes reads either of them. Reading runs no code from the files.
"""
import contextlib
import glob
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.processes import is_first, total, world_size
from runtime.safetensors import load_tensors, save_tensors
from runtime.sharding import distribute_like, is_sharded, local_tensor


class Checkpoints:
    """The checkpoint of the run in a folder: only the last one is kept."""

    def __init__(self, folder, timeout=600):
        self.whole, self.shards = os.path.join(folder, "resume.safetensors"), os.path.join(folder, "resume")
        self.writing = None             # (future, path) of the save that is under way
        self.pool = ThreadPoolExecutor(1)
        self.group = None               # of the processes, apart from what training sends
        if world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def last(self):
        """The newest one that is complete, a path, or None."""
        complete = sorted(glob.glob("*/.metadata", root_dir=self.shards))
        if complete:
            return os.path.join(self.shards, os.path.dirname(complete[-1]))
        return self.whole if os.path.exists(self.whole) else None

    def save(self, parts, step):
        """Begin to write the state of some parts ({name: network, optimiser, ...}) after a step, unless
        numbers in it have run off to infinity. All processes call it together, and change nothing before it
        returns: then it has copies."""
        self.wait()
        state = flatten_all(parts, step)
        if not is_finite(state):
            return
        if any(is_sharded(x) for x in state.values()):
            import torch.distributed.checkpoint as dcp  # a second to import
            path = os.path.join(self.shards, f"{step:08}")
            # Two threads: a single one works through CUDA, and would take room on the first GPU for every
            # process.
            writer = dcp.FileSystemWriter(path, thread_count=2)
            self.writing = dcp.async_save(state, storage_writer=writer, process_group=self.group), path
        elif is_first():
            copies = {key: local_tensor(x).detach().to("cpu", copy=True) for key, x in state.items()}
            self.writing = self.pool.submit(save_tensors, self.whole, copies), self.whole

    def wait(self):
        """Until what save() began is on the disk, and what it replaces is gone. Raises OSError if it could
        not be written."""
        if not self.writing:
            return
        (future, path), self.writing = self.writing, None
        try:
            future.result()
        except BaseException as e:
            raise one_failure(e)
        if is_first():
            self.remove(but=path)

    def remove(self, but=None):
        """Delete all checkpoints, but one."""
        if but != self.whole:
            Path(self.whole).unlink(missing_ok=True)
        for name in glob.glob("*", root_dir=self.shards):
            path = os.path.join(self.shards, name)
            if path != but:
                Path(path, ".metadata").unlink(missing_ok=True)         # first what makes it a checkpoint
                shutil.rmtree(path)
        with contextlib.suppress(OSError):                      # it is not there, or not empty
            os.rmdir(self.shards)

    def load(self, parts):
        """Put the last checkpoint into the parts, and return its step. Raises ValueError if it does not fit
        or cannot be read."""
        path = self.last()
        try:
            tensors = load_tensors(path) if path == self.whole else load_shards(path, parts)
            for name, part in parts.items():
                mine = {key: x for key, x in tensors.items() if key.startswith(f"{name}/")}
                restore(part, {key.removeprefix(f"{name}/"): x for key, x in mine.items()})
            return int(tensors["step"])
        except (KeyError, ValueError, RuntimeError, TypeError, EOFError, OSError,
                pickle.UnpicklingError) as e:
            reason = (str(e) or type(e).__name__).splitlines()[0]
            raise ValueError(f"{path} does not fit this run ({reason}): add --no-resume") from None


def one_failure(e):
    """torch.distributed.checkpoint's own error holds one exception per process: one of them will do."""
    return next(iter(e.failures.values()))[0] if hasattr(e, "failures") else e


def flatten(part):
    """What a part of training remembers, as {name: tensor}: what is trained of a network, an optimiser's
    moments ("7.exp_avg"), the numbers of any other object."""
    if isinstance(part, torch.nn.Module):
        return {name: p.detach() for name, p in part.named_parameters() if p.requires_grad}
    if not hasattr(part, "state_dict"):
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in vars(part).items()}
    state = part.state_dict()
    return {f"{i}.{key}": x for i, moments in state["state"].items() for key, x in moments.items()}


def flatten_all(parts, step):
    """The same of all parts, "actor/norm.weight", and the step."""
    state = {f"{name}/{key}": x for name, part in parts.items() for key, x in flatten(part).items()}
    return state | {"step": torch.tensor(step)}


@torch.no_grad()
def restore(part, tensors):
    """The reverse of flatten."""
    now = flatten(part)
    if {name: x.shape for name, x in now.items()} != {name: x.shape for name, x in tensors.items()}:
        raise ValueError("another network")
    for name, x in tensors.items():
        now[name].copy_(distribute_like(now[name], x))
    if not hasattr(part, "state_dict"):
        vars(part).update({name: x.item() for name, x in now.items()})


def is_finite(tensors):
    """Whether all numbers are, in the shards of all processes. All call it together."""
    bad = sum(not bool(local_tensor(x).isfinite().all()) for x in tensors.values())
    return total(bad) == 0


def load_shards(path, parts):
    """Read a folder of shards, however many processes wrote it, each tensor sharded as the parts are."""
    import torch.distributed.checkpoint as dcp
    with open(os.path.join(path, ".metadata"), "rb") as f:
        contents = Metadata(f).load()
    reader = dcp.FileSystemReader(path)
    reader.read_metadata = lambda: contents             # whose own unpickler would run what the file names
    state = {key: torch.empty_like(x) for key, x in flatten_all(parts, 0).items()}
    if contents.state_dict_metadata.keys() != state.keys():
        raise ValueError("another network")
    try:
        dcp.load(state, storage_reader=reader, no_dist=world_size() == 1)
    except dcp.api.CheckpointException as e:
        raise ValueError(str(one_failure(e))) from None
    return state


class Metadata(pickle.Unpickler):
    """The table of contents of torch.distributed.checkpoint is a pickle: read it without letting it name
    anything but what such a table is made of."""
    ALLOWED = {("torch", "Size"), ("torch.serialization", "_get_layout"),
               ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
               ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
               *(("torch.distributed.checkpoint.metadata", name) for name in (
                   "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
                   "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"))}

    def find_class(self, module, name):
        if (module, name) == ("builtins", "getattr"):   # how Python 3.11.2 names the only enum in there
            from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
            return lambda enum, member: _MEM_FORMAT_ENCODING[member]
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a table of contents may not name {module}.{name}")
