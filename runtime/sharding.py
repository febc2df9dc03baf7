"""Networks that several processes train together.

Every process draws the same batch and works through its share of the rows. Its loss is its share of the mean
over the whole batch, so the sum of all processes' gradients is the batch's gradient.

    ddp     every process keeps the whole training state; gradients are summed once, before the optimiser's
            step
    fsdp    every process keeps 1/N of parameters, gradients and optimiser state (PyTorch's fully_shard), and
            gathers a block's parameters when they are needed
"""
import weakref
from dataclasses import replace

import torch
import torch.distributed as dist

from runtime.precision import placed_dtype
from runtime.processes import barrier, total, world_size


def is_frozen(model):
    return not any(p.requires_grad for p in model.parameters())


def choose(kind, models, device):
    """--parallel as "ddp" or "fsdp". "auto" is fsdp if the training state of these models, 16 bytes per
    trained parameter and 4 per frozen one, takes more than half of a GPU: activations need room too."""
    if kind != "auto":
        return kind
    if device != "cuda":
        return "ddp"
    trained = sum(p.numel() for model in models for p in model.parameters() if p.requires_grad)
    # Networks from one folder share their frozen parameters: see to_device.
    frozen = {(model.config.folder or id(model), name): p.numel() for model in models
              for name, p in model.named_parameters() if not p.requires_grad}
    need = 16 * trained + 4 * sum(frozen.values())
    return "fsdp" if need > 0.5 * torch.cuda.get_device_properties(0).total_memory else "ddp"


def to_device(model, device, frozen=None, bfloat16=False):
    """Move a network to a device, one parameter at a time, out of the file that it is mapped to. frozen:
    {name: parameters} of the networks placed before, so that frozen parameters which are equal, such as the
    base under several sets of adapters, are held once. bfloat16: compute in it."""
    for name, p in model.named_parameters():
        dtype = placed_dtype(model, name, p, bfloat16)
        p.data = p.data.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        if frozen is not None and not p.requires_grad:
            others = frozen.setdefault(name, weakref.WeakSet())     # a deleted network frees its memory
            p.data = next((x.data for x in others if x.dtype == dtype and torch.equal(x, p)), p.data)
            others.add(p)


def add_up(parameters):
    """Replace each gradient by its sum over all processes. The sums run at the same time."""
    if world_size() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for sum_of_one in [dist.all_reduce(x, async_op=True) for x in gradients]:
            sum_of_one.wait()


def shard(model, device, bfloat16=False, offload=False, gather_at_once=True):
    """Shard a network over the processes, in place. It moves to the device block by block, so no device needs
    room for all of it. offload: keep a frozen network's shards on the CPU. gather_at_once: see
    gather_to_sample."""
    from torch.distributed import fsdp  # takes a second, which one process does not need
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh(device, (world_size(),))
    # Inputs keep their precision: bfloat16 cannot tell the rotations of late positions apart.
    exact, waiting = fsdp.MixedPrecisionPolicy(cast_forward_inputs=False), fsdp.OffloadPolicy()
    precision = exact
    if bfloat16:
        precision = replace(exact, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if offload and is_frozen(model):
        waiting = fsdp.CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    parts = [(block, precision) for block in model.blocks] + [(model, precision)]
    if model.head_kind == "scalar":
        parts.insert(0, (model.head, exact))
    for module, policy in parts:
        for p in module.parameters():
            # Files may hold bfloat16, or transposed matrices (GPT-2).
            p.data = p.data.to(device, torch.get_default_dtype()).contiguous()
        # The root too is resharded after every forward pass: the optimiser must see shards.
        fsdp.fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=waiting,
                         reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)                  # a sum, not a mean: see the top
        module.set_force_sum_reduction_for_comms(True)          # gloo has no other
    for name in ("logprobs", "score", "last_state", "generate"):
        fsdp.register_fsdp_forward_method(model, name)
    gather_to_sample(model, gather_at_once)


def gather_to_sample(model, at_once):
    """Let `generate` gather each block once for all tokens: every parameter then travels once per answer, and
    no process waits for another's rows, but the whole network must fit beside the cache of keys and values.
    Not at_once: blocks are gathered for every token, and every process goes on until all rows of all
    processes have ended."""
    generate = model.generate
    waits_for = {} if at_once else {"rows_left": total}

    def generate_together(*args, **kwargs):
        for block in model.blocks:
            block.set_reshard_after_forward(not at_once)
        try:
            return generate(*args, **kwargs, **waits_for)
        finally:
            for block in model.blocks:
                block.set_reshard_after_forward(True)
                block.reshard()
    model.generate = generate_together


# ---------------------------------------------------------------------- tensors that may be sharded

def full_tensor(x):
    """The whole of x as an ordinary tensor. All processes call it together."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def collect(x):
    """full_tensor, after the first process has written the tensor before it to a file: the others wait for
    one tensor at a time, never for a whole file, and none gives up (--timeout)."""
    barrier()
    return full_tensor(x)


def local_tensor(x):
    """The shard of x that this process holds, or x if it is not sharded."""
    return x.to_local() if hasattr(x, "to_local") else x


def distribute_like(x, value):
    """An ordinary tensor, which every process has, sharded as x is."""
    if not hasattr(x, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(x.device), x.device_mesh, x.placements, src_data_rank=None)
