"""Several processes of one job: start-up, sums over all processes, and shutdown.

`torchrun --nproc_per_node=8 script.py` starts eight copies of a script, one per device. Without torchrun
there is one process, and nothing here does anything: a sum over all processes is the number itself.
"""
import os
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_store = None                           # a table that all processes read and write


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_distributed():
    """Whether torchrun started this process, alone or with others."""
    return dist.is_initialized()


def is_first():
    """Whether this is the process that prints and writes for all."""
    return rank() == 0


# ------------------------------------------------------------------------ what they tell each other

def total(x):
    """The sum of a number or a tensor over all processes. A tensor is changed in place."""
    if not is_distributed():
        return x
    out = x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(out)
    return out if out is x else out.item()


def barrier():
    """Wait until all processes have come here."""
    total(0)


def gather(x):
    """The list of all processes' x, any Python object."""
    everyone = [x] * world_size()
    if is_distributed():
        dist.all_gather_object(everyone, x)
    return everyone


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
    """A new name, the same in all processes, for what they write to the store. torchrun keeps the store when
    it restarts the processes, and the new ones must not read what the old ones wrote there.

    So every process but the first writes a ticket of its own, and the first answers each ticket that it finds
    with the name. It may answer a dead process's ticket, but a living one only takes the answer to its own;
    and the first goes on answering until all have come."""
    ticket = uuid.uuid4().hex
    if number > 0:
        store.set(f"ticket/{number}", ticket)
        name = store.get(f"name for {ticket}").decode()                 # waits for it
        store.add(f"{name}/came", 1)
        return name
    name = ticket
    while time.monotonic() < deadline:
        for other in range(1, size):
            store.set(f"name for {store.get(f'ticket/{other}').decode()}", name)
        if store.add(f"{name}/came", 0) == size - 1:
            return name
        time.sleep(0.02)
    raise TimeoutError("too few came")


def stop():
    """Leave the other processes after a run that went well, and end this one at once. While Python shuts down
    as usual, a thread of the process group may still free its last tensor, which can crash the process. What
    follows `main()` in a script, and functions of atexit, are not run."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def is_lost_connection(error):
    """Whether an error says that another process has ended, or did not answer in time."""
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
    except RuntimeError:                                        # the store's process has ended too
        return True
