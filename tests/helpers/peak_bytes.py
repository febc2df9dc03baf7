"""Run a script of this project, alone or under torchrun, and print what it took of every process, beyond what
one takes anyway: the most memory in tensors while networks are loaded, and from the first step's end to the
last file, and the bytes sent per step.

    peak_bytes.py ppo.py --steps 3 --batch 16 ...
"""
import ctypes
import gc
import os
import runpy
import sys
import threading
import time

import torch
import torch.distributed as dist

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from model import GPT, GPTConfig  # noqa: E402
from runtime import compute, processes, sharding  # noqa: E402
from runtime.optimizer import make_optimizer  # noqa: E402
from runtime.run import Run  # noqa: E402

# of a ring, which sums, then gathers
SHARES = {"all_gather_single": 1, "reduce_scatter_single": 1, "all_reduce": 2}
sent, seen = 0, []                          # bytes sent so far, and at each step
most, forget, loading = 0, False, 0         # most held since the first step, and while networks were loaded


def counted(name):
    """A collective that counts what a process sends: (N − 1)/N of the whole tensor, twice to sum it
    for all."""
    function = getattr(dist, name)

    def wrapped(*tensors, **kwargs):
        global sent
        n = dist.get_world_size(kwargs.get("group"))
        whole = max(x.nbytes for x in (*tensors, *kwargs.values()) if isinstance(x, torch.Tensor))
        sent += SHARES[name] * (n - 1) / n * whole
        return function(*tensors, **kwargs)
    setattr(dist, name, wrapped)


class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


# glibc gives every tensor of 64 KiB and more a piece of memory of its own, and knows how much all take.
M_MMAP_THRESHOLD = -3
libc = ctypes.CDLL(None)
libc.mallopt(M_MMAP_THRESHOLD, 2 ** 16)
libc.mallinfo2.restype = Mallinfo


def held():
    """Bytes in large pieces of memory: tensors, and hardly anything else."""
    return libc.mallinfo2().hblkhd


def watch():
    global most, forget
    while True:
        now = held()
        most, forget = now if forget else max(most, now), False
        time.sleep(0.0005)


def log(self, *args, **kwargs):
    global forget
    seen.append(sent)
    finished(self, *args, **kwargs)
    forget = forget or len(seen) == 1


def finish(self, *args, **kwargs):
    global peak
    left(self, *args, **kwargs)
    peak = most


def place(self, *models):
    global loading
    placed(self, *models)
    loading = loading or most                       # the reward model places another network at its end


def warm_up(kind):
    """Load all that a first training step loads."""
    model = GPT(GPTConfig(vocab_size=64, block_size=32, n_layer=1, n_head=2, n_embd=32))
    if processes.is_distributed() and kind == "fsdp":
        sharding.shard(model, "cpu")
    optimizer, tokens = make_optimizer(model, 1e-3), torch.ones(2, 8, dtype=torch.int64)
    model.logprobs(tokens, tokens.bool()).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


finished, Run.log = Run.log, log
left, Run.finish = Run.finish, finish
# Not Run.place: it ends with a forward pass of policy and reference, which gathers what it needs.
placed, compute.Compute.place = compute.Compute.place, place
for name in SHARES:
    counted(name)
processes.start("cpu", 60)
compute.keep_freed_memory = lambda: None                # what is freed must be seen to be
sys.argv = sys.argv[1:]
warm_up(sys.argv[sys.argv.index("--parallel") + 1])
gc.collect()
before = held()
threading.Thread(target=watch, daemon=True).start()
stop, processes.stop = processes.stop, lambda: None
runpy.run_path(os.path.join(ROOT, sys.argv[0]), run_name="__main__")
sys.stderr.write(f"process {processes.rank()}: loading {loading - before}, peak {peak - before}, "
                 f"sent {(seen[-1] - seen[0]) / (len(seen) - 1):.0f}\n")           # in one piece
stop()
