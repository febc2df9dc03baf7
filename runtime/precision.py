"""Networks that compute in bfloat16 while their weights are kept in float32.

bfloat16 has 8 significant bits. That is enough for products, whose errors average out. But an update smaller
than about 1/250 of a weight would leave the weight unchanged, and most updates are smaller. So trained
weights stay in float32, and the network computes with a bfloat16 copy, which Compute.computing renews. Frozen
weights get no updates, and are kept in bfloat16 alone.
"""
import torch
from torch.nn import Parameter


def stays_exact(model, name):
    """Whether a parameter is used in float32 in any case: a scalar head, because scores and values differ by
    less than bfloat16 resolves, and the scales of weights in 4 bits."""
    return ".nf4." in name or (model.head_kind == "scalar" and name.startswith("head."))


def placed_dtype(model, name, p, bfloat16):
    """The dtype in which a parameter is kept on the device. bfloat16: whether networks compute in it."""
    if not p.dtype.is_floating_point:                                               # the bytes of NF4
        return p.dtype
    if bfloat16 and not p.requires_grad and not stays_exact(model, name):
        return torch.bfloat16
    return torch.get_default_dtype()


def bfloat16_copies(model):
    """[(module, name of its parameter, parameter, bfloat16 copy)] of a network's trained parameters. The
    copies' gradients are added to those of the parameters, whose places the copies take while it computes."""
    copies = []
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and not stays_exact(model, f"{prefix}.{name}"):
                copy = Parameter(torch.empty_like(p, dtype=torch.bfloat16))
                copy.register_post_accumulate_grad_hook(lambda copy, p=p: add_gradient(p, copy))
                copies.append((module, name, p, copy))
    return copies


def add_gradient(p, copy):
    """Gradients add up in float32, because a sum in bfloat16 would lose small terms."""
    p.grad = copy.grad.to(p.dtype) if p.grad is None else p.grad.add_(copy.grad)
    copy.grad = None
