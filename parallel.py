"""Several processes as one: `torchrun --nproc_per_node=8 ppo.py` starts eight copies of a script, one a device.

Every process draws the same batch and works through its share of the rows; each one's loss is its share of the mean
over the whole batch, and PyTorch adds the gradients up. fully_shard (FSDP2) does it for both ways of going parallel,
on a mesh of N copies of one shard, or of N shards:

    ddp              every process keeps the whole training state, gradients are added up
    fsdp             every process keeps an N-th of parameters, gradients and optimiser state, and gathers a block's
                     parameters when it is the block's turn

So that a result never depends on N, rows carry their own noise (seeds), and sums run over all processes. Without
torchrun there is one process, and all of this does nothing.
"""
import contextlib
import os
import time
import uuid
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.rendezvous import rendezvous

from model import GPT

_store = None                           # what all processes can read and write
_copies = weakref.WeakSet()             # networks of which each process has its own: their gradients are added up once a step


def start(device, timeout):
    """Meet the other processes that torchrun started, if it did. timeout: seconds that one may wait for the others."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device == "mps":
            raise ValueError("--device mps: several processes need cuda or cpu")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        global _store
        limit = timedelta(seconds=timeout)
        try:
            store, number, many = next(rendezvous("env://", timeout=limit))
            _store = dist.PrefixStore(meet(store, number, many, time.monotonic() + timeout), store)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=_store, rank=number,
                                    world_size=many, timeout=limit)
        except (RuntimeError, TimeoutError) as e:
            raise ValueError(f"the processes did not meet within {timeout:.0f} s (--timeout): {str(e).splitlines()[0]}") from None


def meet(store, number, many, deadline):
    """A name for this life of the job, the same in all its processes. torchrun keeps one store over its restarts, and
    who followed what a dead process had written there would wait for it for ever.

    The first process writes a name, counts the others in, strikes the name out and opens the door. A name left over from
    a life that ended before that never gets its door opened, and is written over by the next."""
    name, joined = uuid.uuid4().hex, set()
    if number == 0:
        store.set("life", name)
    while time.monotonic() < deadline:
        if number == 0 and store.add(f"{name}/here", 0) == many - 1:
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
    """Part from the other processes after a run that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost(error):
    """Whether an error says that another process has gone, or did not answer in time."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or any(
        sign in str(error) for sign in ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out")))


def first_to_fail():
    """Whether no other process has failed before this one: the first one's words are those that count."""
    try:
        return world() == 1 or _store.add("failed", 1) == 1
    except RuntimeError:                                        # nobody is left to ask
        return True


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


# ---------------------------------------------------------------------------------------- work

def share(rows):
    """This process's part of a list or tensor of rows: every N-th one."""
    return rows[rank()::world()]


def micro_batches(rows, size, tokens=0, width=None):
    """This process's share of the rows in pieces of at most `size`, and if tokens is given, of at most so many with their
    padding, width(row) being a row's length: (piece, 1). The processes go through their networks together, so all get as
    many pieces; one that has no row left gets any row, and 0 to multiply its loss by. Under ddp the last piece's backward pass
    adds all gradients up: go through all of them."""
    def pieces(rows):
        cuts, start, widest = [], 0, 0
        for i, row in enumerate(rows):
            widest = max(widest, width(row)) if tokens else 0
            if i - start == size or (i > start and (i - start + 1) * widest > tokens > 0):
                cuts.append((start, i))
                start, widest = i, width(row) if tokens else 0
        return cuts + [(start, len(rows))] * (len(rows) > start)

    mine, n = share(rows), max(len(pieces(rows[r::world()])) for r in range(world()))
    cuts = pieces(mine)
    for i in range(n):
        for model in _copies:
            model.set_requires_all_reduce(i == n - 1)
        yield (mine[slice(*cuts[i])], 1) if i < len(cuts) else (rows[:1], 0)


def total(x):
    """The sum of a tensor over all processes, or of a number."""
    if world() == 1:
        return x
    out = x.detach().clone() if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(out)
    return out if isinstance(x, torch.Tensor) else out.item()


def everyone(x):
    """What each process has of something small: a list, one entry a process."""
    found = [x]
    if world() > 1:
        found = [None] * world()
        dist.all_gather_object(found, x)
    return found


def gather(mine):
    """All rows again, in the order that they had before share(), from a list of what became of this process's."""
    parts = everyone(mine)
    rows = [None] * sum(map(len, parts))
    for r, theirs in enumerate(parts):
        rows[r::world()] = theirs
    return rows


def gather_batch(mine):
    """gather() for a dict of tensors whose first dimension is rows; those of (rows, columns) are padded with zeros to the
    same width."""
    if world() == 1:
        return mine
    rows = gather([{name: x.clone() for name, x in zip(mine, row)} for row in zip(*(x.cpu() for x in mine.values()))])
    width, out = max(x.shape[0] for row in rows for x in row.values() if x.dim()), {}
    for name, x in mine.items():
        out[name] = torch.stack([F.pad(row[name], (0, width - len(row[name]))) if x.dim() == 2 else row[name] for row in rows]).to(x.device)
    return out


# ---------------------------------------------------------------------------------------- networks

def choose(kind, models, device):
    """"auto" to "fsdp" if the training state of these models, at 16 bytes a trained parameter and 4 a frozen one, would
    fill more than half of a GPU's memory, which activations and samples need too, else to "ddp"."""
    if kind != "auto" or device != "cuda":
        return "ddp" if kind == "auto" else kind
    need = sum(p.numel() * (16 if p.requires_grad else 4) for m in models for p in m.parameters())
    return "fsdp" if need > 0.5 * torch.cuda.get_device_properties(0).total_memory else "ddp"


def load(folder, head=None):
    """GPT.load. Where there are several processes, each holds no more of the file than spread() will let it keep, and a
    block for a moment."""
    return GPT.load(folder, head, mapped=world() > 1)


def is_frozen(model):
    return not any(p.requires_grad for p in model.parameters())


def spread(model, kind, device, bfloat16=False, offload=False):
    """Put a network on the device, to work with its copies, or sharded over the processes ("ddp" or "fsdp"); a frozen one
    needs no copies. Gradients are sums: a loss must be divided by what the whole batch holds. Changes the model in place;
    a block at a time moves to the device, so that it need not hold the whole. offload: the shards of a frozen one wait
    on the CPU."""
    if not dist.is_initialized() or (kind == "ddp" and is_frozen(model)):
        for p in model.parameters():
            p.data = p.data.to("cpu" if offload and is_frozen(model) else device, torch.get_default_dtype(), copy=world() > 1)
        return model
    from torch.distributed.device_mesh import init_device_mesh          # a second to import, and often not needed
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
    shape, names = ((world(), 1), ("copies", "shards")) if kind == "ddp" else ((world(),), ("shards",))
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bfloat16 else MixedPrecisionPolicy()
    for module in (*model.blocks, model):
        for p in module.parameters():
            if p.dtype != torch.get_default_dtype():            # a file of bfloat16 is not unrolled before its turn
                p.data = p.data.to(device).to(torch.get_default_dtype())
        # Resharded after every forward pass, the root too: an optimiser must never be given gathered parameters.
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True,
                    offload_policy=CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload and is_frozen(model) else OffloadPolicy())
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)          # gloo knows no other
    for name in ("logprobs", "generate"):
        register_fsdp_forward_method(model, name)
    model.whole_bytes = sum(p.numel() for p in model.parameters()) * (2 if bfloat16 else 4)
    if kind == "ddp":
        _copies.add(model)
    return model


def prepare(run, *models):
    """Networks on the run's device, spread over the processes, compiled and economical as its flags say. Before their
    optimisers are made."""
    run.kind = run.kind or choose(run.cfg.parallel, models, run.device)
    for model in models:
        model.checkpoint_blocks = run.cfg.checkpoint_blocks
        if run.cfg.compile:
            for block in model.blocks:
                block.compile(dynamic=True)
        spread(model, run.kind, run.device, run.bfloat16, run.cfg.offload)


@contextlib.contextmanager
def at_hand(run, *models):
    """Frozen networks on the device for as long as they are needed, if --offload keeps them on the CPU."""
    moved = [m for m in models if run.cfg.offload and not hasattr(m, "reshard")]       # FSDP moves its shards itself
    for model in moved:
        model.to(run.device)
    yield
    for model in moved:
        model.to("cpu")


def fits(model):
    """Whether every process's GPU has room for all of a network, besides what is there, and a fifth to spare."""
    if model.device.type != "cuda":
        return True
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return total(int(model.whole_bytes > 0.8 * free)) == 0


@contextlib.contextmanager
def gathered(model, at_once=True):
    """For sampling from a network that may be sharded: keep every block's parameters whole from its first use on, so that
    they travel once, not once a token, and nobody waits for others' rows. Where they do not fit, or with at_once=False,
    gather block by block at every token; then all processes must go on until the last row has ended, and what this yields
    is generate's `anyone`, which says so."""
    blocks = [block for block in model.blocks if hasattr(block, "reshard")]       # FSDP's
    if blocks and not (at_once and fits(model)):
        yield total
        return
    for block in blocks:
        block.set_reshard_after_forward(False)
    yield None
    for block in blocks:
        block.set_reshard_after_forward(True)
        block.reshard()


def whole(x):
    """A tensor that may be sharded as an ordinary one. All processes must call it together."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def mine(x):
    """What this process holds of a tensor that may be sharded."""
    return x.to_local() if hasattr(x, "to_local") else x


def is_split(x):
    """Whether no process holds all of a tensor."""
    return hasattr(x, "full_tensor") and x.device_mesh["shards"].size() > 1


def like(x, value):
    """An ordinary tensor cut to shards as x is, if x is."""
    if not hasattr(x, "full_tensor") or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(x.device), x.device_mesh, x.placements, src_data_rank=None)
