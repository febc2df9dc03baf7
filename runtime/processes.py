"""Several processes that work as one: how they meet, what they tell each other, and how they end together.

`torchrun --nproc_per_node=8 ppo.py` starts eight copies of a script, one per device. Without torchrun there
is one process, and everything here does nothing: a sum over all processes is the number itself.
"""
import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_store = None                           # a table that all processes can read and write


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_distributed():
    """Whether torchrun started this process, alone or with others."""
    return dist.is_initialized()


def is_first():
    """Whether this is the process that prints and writes for all."""
    return rank() == 0


# ------------------------------------------------------------------------ what they tell each other

def total(x):
    """The sum over all processes of a number, or of a tensor, which it takes the place of."""
    if world_size() == 1:
        return x
    out = x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(out)
    return out if out is x else out.item()


def barrier():
    """Wait until all processes have come here."""
    total(0)


def gather(x):
    """What each process has of something (any Python object): a list, one entry per process."""
    found = [x]
    if world_size() > 1:
        found = [None] * world_size()
        dist.all_gather_object(found, x)
    return found


# ---------------------------------------------------------------------------- how they meet and end

def start(device, timeout):
    """Meet the other processes, if torchrun started any. timeout: seconds that one waits for the others."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    if device == "mps":
        raise ValueError("--device mps: several processes need cuda or cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    global _store
    try:
        store, number, size = next(rendezvous("env://", timeout=limit))
        _store = dist.PrefixStore(agree_on_a_name(store, number, size, time.monotonic() + timeout), store)
        dist.init_process_group(backend, store=_store, rank=number, world_size=size, timeout=limit)
    except (RuntimeError, TimeoutError) as e:
        raise ValueError(f"the processes did not meet within {timeout:.0f} s (--timeout): "
                         f"{str(e).splitlines()[0]}") from None


def agree_on_a_name(store, number, size, deadline):
    """A name for this life of the job, the same in all its processes. torchrun keeps one store over its
    restarts, so a new life must not read what a dead process has written there: it would wait for that
    process forever.

    The first process writes a name and waits until all the others have signed in under it. Then it takes the
    name back and marks it as open, and only now does anyone use it. A name that a life which ended earlier
    left behind is never marked as open, and the next life writes over it."""
    name, joined = uuid.uuid4().hex, set()
    if number == 0:
        store.set("life", name)
    while time.monotonic() < deadline:
        if number == 0 and store.add(f"{name}/here", 0) == size - 1:
            store.set("life", "")
            store.set(f"{name}/open", "")
            return name
        if number > 0:
            name = store.get("life").decode()
            if name and name not in joined:
                joined.add(name)
                store.add(f"{name}/here", 1)
            for name in joined:
                if store.check([f"{name}/open"]):
                    return name
        time.sleep(0.02)
    raise TimeoutError("too few came")


def stop():
    """Leave the other processes after a run that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_connection(error):
    """Whether an error says that another process has gone, or did not answer in time."""
    if not dist.is_initialized():
        return False
    signs = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def is_first_to_fail():
    """Whether no other process has failed before this one: its message explains the others'."""
    if world_size() == 1:
        return True
    try:
        return _store.add("failed", 1) == 1
    except RuntimeError:                                        # nobody is left to ask
        return True
