"""Networks that several processes hold and train together.

Every process draws the same batch and works through its share of the rows. Its loss is its share of the mean
over the whole batch, and so the gradients of all processes, added up, are the batch's.

    ddp     every process keeps the whole training state; gradients are added up once, before the optimiser
            steps
    fsdp    every process keeps an N-th of parameters, gradients and optimiser state (PyTorch's fully_shard),
            and gathers a block's parameters when it is the block's turn
"""
import weakref
from dataclasses import replace

import torch

from runtime.precision import placed_dtype
from runtime.processes import total, world_size

BUCKET = 4e6                # numbers that travel between processes at once
LOGITS = 5                  # arrays (rows, V) in float32 that exist at once where tokens are chosen


def is_frozen(model):
    return not any(p.requires_grad for p in model.parameters())


def choose(kind, models, device):
    """"auto" to "fsdp" if the training state of these models, at 16 bytes per trained parameter and 4 per
    frozen one, would fill more than half of a GPU, where activations go too; else to "ddp"."""
    if kind != "auto":
        return kind
    if device != "cuda":
        return "ddp"
    trained = sum(p.numel() for model in models for p in model.parameters() if p.requires_grad)
    # Networks out of one folder share what is frozen: see to_device.
    frozen = {(model.folder or id(model), name): p.numel() for model in models
              for name, p in model.named_parameters() if not p.requires_grad}
    need = 16 * trained + 4 * sum(frozen.values())
    return "fsdp" if need > 0.5 * torch.cuda.get_device_properties(0).total_memory else "ddp"


def to_device(model, device, frozen=None, bfloat16=False):
    """Move a network, out of the file that still holds it, one parameter at a time. frozen, {name:
    parameters}, remembers what never changes: the base under several sets of adapters is held once. bfloat16:
    whether products are computed in it."""
    for name, p in model.named_parameters():
        dtype = placed_dtype(model, name, p, bfloat16)
        p.data = p.data.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        if frozen is not None and not p.requires_grad:
            others = frozen.setdefault(name, weakref.WeakSet())     # a network that is gone frees its memory
            p.data = next((x.data for x in others if x.dtype == dtype and torch.equal(x, p)), p.data)
            others.add(p)


def add_up(parameters):
    """Make each gradient the sum of all processes', about BUCKET numbers at a time."""
    gradients = [p.grad for p in parameters if p.grad is not None and world_size() > 1]
    while gradients:
        some = [gradients.pop(0)]
        while gradients and sum(x.numel() for x in some) + gradients[0].numel() <= BUCKET:
            some.append(gradients.pop(0))
        flat = total(torch.cat([x.flatten() for x in some]))
        for x, part in zip(some, flat.split([x.numel() for x in some])):
            x.copy_(part.view_as(x))


def shard(model, device, bfloat16=False, offload=False, gather_at_once=True):
    """Spread a network over the processes, in place. A block at a time moves to the device, so that no device
    need hold the whole. offload: the shards of a frozen network wait on the CPU.

    Gradients are added up, not averaged: a loss must be divided by what the whole batch holds."""
    from torch.distributed import fsdp  # takes a second, and one process does without
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh(device, (world_size(),))
    # Inputs stay as they are: rotations of late positions would be lost in bfloat16.
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
            # A file of bfloat16, or of matrices the other way round (GPT-2's), is made ours in its turn.
            p.data = p.data.to(device, torch.get_default_dtype()).contiguous()
        # Resharded after every forward pass, the root too: an optimiser must never be given gathered
        # parameters.
        fsdp.fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=waiting,
                         reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)          # gloo knows no other
    for name in ("logprobs", "score", "last_state", "generate"):
        fsdp.register_fsdp_forward_method(model, name)
    sample_from_shards(model, 2 if bfloat16 else 4, gather_at_once)


def sample_from_shards(model, itemsize, gather_at_once):
    """Let `generate` gather each block once for all tokens, where the whole network fits: then parameters
    travel once, not once per token, and no process waits for the others' rows. Where it does not fit, blocks
    are gathered at every token, and all processes must go on until the last row of all has ended. itemsize:
    bytes per number."""
    generate, rows_left = model.generate, model.rows_left
    weights = sum(p.numel() for p in model.parameters())

    def generate_together(prompts, lengths, max_new_tokens, *args, **kwargs):
        positions = len(prompts) * (int(lengths.max()) + max_new_tokens)
        size = itemsize * (weights + positions * cached_numbers(model.config))
        size += 4 * LOGITS * len(prompts) * model.config.vocab_size
        at_once = gather_at_once and fits(size, model.device)
        for block in model.blocks:
            block.set_reshard_after_forward(not at_once)
        model.rows_left = rows_left if at_once else total
        try:
            return generate(prompts, lengths, max_new_tokens, *args, **kwargs)
        finally:
            for block in model.blocks:
                block.set_reshard_after_forward(True)
                block.reshard()
    model.generate = generate_together


def cached_numbers(config):
    """Keys and values of one position, in all layers."""
    return 2 * config.n_layer * config.n_kv_head * config.head_dim


def fits(size, device):
    """Whether every process's GPU has room for this many bytes more, with a fifth to spare."""
    if device.type != "cuda":
        return True
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return total(int(size > 0.8 * free)) == 0


# ---------------------------------------------------------------------- tensors that may be sharded

def full_tensor(x):
    """An ordinary tensor of the whole. All processes must call it together."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def local_tensor(x):
    """What this process holds."""
    return x.to_local() if hasattr(x, "to_local") else x


def is_sharded(x):
    """Whether no process holds all of it."""
    return hasattr(x, "full_tensor") and x.device_mesh.size() > 1


def distribute_like(x, value):
    """An ordinary tensor cut to shards as x is, if x is."""
    if not hasattr(x, "full_tensor") or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(x.device), x.device_mesh, x.placements, src_data_rank=None)
