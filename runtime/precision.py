"""Networks that compute in bfloat16 and remember in float32.

bfloat16 has 8 significant bits: enough for products, whose errors average out, but a weight would not notice
an update of less than about a 250th of itself, and most updates are smaller. So what is trained stays in
float32, and a copy in bfloat16 stands in for it while the network computes; the copy is renewed when the
weights have changed. What is frozen has no updates to lose, and is kept in bfloat16 alone.
"""
import torch
from torch.nn import Parameter


def stays_exact(model, name):
    """Whether a parameter is used as it is in any precision: a scalar head, for scores and values differ by
    less than bfloat16 can tell, and the scales of numbers in 4 bits."""
    return ".nf4." in name or (model.head_kind == "scalar" and name.startswith("head."))


def placed_dtype(model, name, p, bfloat16):
    """What a parameter is kept in on the device. bfloat16: whether products are computed in it."""
    if not p.dtype.is_floating_point:                                               # NF4's are bytes
        return p.dtype
    if bfloat16 and not p.requires_grad and not stays_exact(model, name):
        return torch.bfloat16
    return torch.get_default_dtype()


class StandIns:
    """The copies in bfloat16 of what a network trains. Between enter() and leave() they are its parameters:
    what the backward pass finds for them goes to the float32 weights' gradients."""

    def __init__(self, model):
        self.places = []                            # (module, name of its parameter, weight, copy)
        self.seen = None                            # which versions of the weights the copies are of
        for prefix, module in model.named_modules():
            for name, p in module.named_parameters(recurse=False):
                if p.requires_grad and not stays_exact(model, f"{prefix}.{name}"):
                    copy = Parameter(torch.empty_like(p, dtype=torch.bfloat16))
                    copy.register_post_accumulate_grad_hook(lambda copy, p=p: add_gradient(p, copy))
                    self.places.append((module, name, p, copy))

    def enter(self):
        versions = [p._version for _, _, p, _ in self.places]
        if versions != self.seen:
            with torch.no_grad():
                for _, _, p, copy in self.places:
                    copy.copy_(p)
            self.seen = versions
        for module, name, _, copy in self.places:
            module._parameters[name] = copy

    def leave(self):
        for module, name, p, _ in self.places:
            module._parameters[name] = p


def add_gradient(p, copy):
    """Gradients add up in float32, whatever they are computed in."""
    p.grad = copy.grad.to(p.dtype) if p.grad is None else p.grad.add_(copy.grad)
    copy.grad = None
