"""The checkpoint of an unfinished run: `resume.safetensors` in its folder, written whole or not at all.

It holds the trained parameters, the optimisers' moments and the step. Any number of processes writes it, and
any other number reads it. Reading it runs no code.

All processes gather one tensor at a time, because under fsdp none has room for the whole state, and the first
writes it, while training waits. The file has 12 bytes per trained parameter, so at 1 GB per second a model of
1 billion parameters takes 12 seconds, and one of 70 billion 14 minutes; Run then saves less often, to keep
this below a twentieth of the time. For models that are larger still, let each process write its own shards
(torch.distributed.checkpoint does that).
"""
import os
from pathlib import Path

import torch

from runtime.processes import is_first, total
from runtime.safetensors import load_tensors, types, write_tensors
from runtime.sharding import collect, distribute_like, local_tensor


class Checkpoints:
    """The checkpoint in a folder. A new one replaces the one before."""

    def __init__(self, folder):
        self.path = os.path.join(folder, "resume.safetensors")

    def last(self):
        """The checkpoint's path, or None if there is none."""
        return self.path if os.path.exists(self.path) else None

    def save(self, parts, step):
        """Save parts of training, {name: network, optimiser or object of numbers}, after a step. Does nothing
        if a number is infinite or NaN. All processes call it together."""
        state = flatten(parts, step)
        if is_finite(state.values()):
            write_tensors(self.path, types(state), lambda name: collect(state[name]), write=is_first())

    def remove(self):
        Path(self.path).unlink(missing_ok=True)

    @torch.no_grad()
    def load(self, parts):
        """Load the checkpoint into the parts, and return its step. Raises ValueError if it cannot be read, or
        if its tensors are not those of the parts."""
        state = flatten(parts, 0)
        try:
            tensors = load_tensors(self.path)
            if types(tensors) != types(state):
                raise ValueError("another network")
        except ValueError as e:
            raise ValueError(f"{self.path} does not fit this run ({e}): add --no-resume") from None
        for name, x in state.items():
            x.copy_(distribute_like(x, tensors[name]))
        for name, part in parts.items():
            if not hasattr(part, "state_dict"):             # numbers, of which flatten has made copies
                vars(part).update({key: state[f"{name}/{key}"].item() for key in vars(part)})
        return int(state["step"])


def flatten(parts, step):
    """The step and the state of all parts as {name: tensor}: a network's trained parameters
    ("model/norm.weight"), an optimiser's moments ("optimizer/7.exp_avg" of parameter 7), and the attributes
    of any other object, which must be numbers."""
    state = {"step": torch.tensor(step)}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            own = {key: p.detach() for key, p in part.named_parameters() if p.requires_grad}
        elif hasattr(part, "state_dict"):
            moments = part.state_dict()["state"]
            own = {f"{i}.{key}": x for i, of_one in moments.items() for key, x in of_one.items()}
        else:
            own = {key: torch.tensor(value, dtype=torch.float64) for key, value in vars(part).items()}
        state |= {f"{name}/{key}": x for key, x in own.items()}
    return state


def is_finite(tensors):
    """Whether all numbers in all processes' shards are finite. All processes call it together."""
    return total(sum(not local_tensor(x).isfinite().all() for x in tensors)) == 0
