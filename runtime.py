"""What every stage needs around its algorithm: device and precision, optimiser and schedule, metrics, files.

A stage declares its flags as a dataclass on top of Training (flags.py), and ends with

    if __name__ == "__main__":
        runtime.main(Config, train, __doc__)

A Run is one stage at work: it owns the output folder, writes metrics.jsonl (one line a step) and, if TensorBoard is
installed, its event files, prints one tidy line now and then with the time left, and keeps a checkpoint to go on from.
"""
import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter

import torch

import parallel
from checkpoint import Checkpoints, finite, fingerprints
from data.loading import WORLD
from data.tokenizer import Tokenizer
from flags import parse, program

try:                                    # an extra: pip install tensorboard
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None


def process_started():
    """When this process began, imports included: what a person waits for. Where Linux does not say so, now."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            age = float(uptime.read().split()[0]) - int(stat.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - (age if 0 < age < 60 else 0)
    except (OSError, ValueError, IndexError):
        return time.time()


STARTED = process_started()
# What may change when a run goes on: it does not change the weights (but for rounding).
FREE = {"out", "debug", "resume", "device", "save_seconds", "parallel", "timeout", "offload", "micro_batch", "micro_tokens",
        "checkpoint_blocks", "compile", "gather_at_once"}
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


# ---------------------------------------------------------------------------------------- from the command line

def main(config, train, doc):
    """Run a stage from the command line: one line and status 1 for what a user can put right."""
    cfg = parse(config, doc)
    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        if "timeout" in vars(cfg):                              # a script that can work with others
            parallel.start(pick_device(cfg.device), cfg.timeout)
        if parallel.rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")        # the first process speaks for all
        train(cfg)
        parallel.stop()
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        memory, lost = isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e), parallel.lost(e)
        if cfg.debug or not (memory or lost or isinstance(e, (ValueError, OSError))):
            raise
        if not parallel.first_to_fail():
            sys.exit(1)
        line = str(e)
        if lost:
            line = f"process {parallel.rank()} has lost another one, or waited {cfg.timeout:.0f} s for it (--timeout)"
        elif memory:
            line = "out of memory: a lower --micro_batch or --batch may fit"
        elif isinstance(e, BrokenPipeError):
            line = "nobody reads the output any more"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or Python would complain again at its end
        elif isinstance(e, OSError):
            line = f"{e.filename or cfg.out}: {e.strerror or e}"
        sys.exit(f"{program()}: {line}")        # status 1
    except KeyboardInterrupt:
        kept = Run.at_work and Run.at_work.checkpoints.last()
        with contextlib.suppress(OSError):
            print(f"\n{program()}: interrupted" + ("; the same command goes on from the last checkpoint" if kept else ""), file=sys.stderr)
        sys.exit(130)


def stop(number, frame):
    """Ctrl-C, a closed terminal, a scheduler's SIGTERM: a run at work finishes its step and saves; the same signal once
    more, or one at any other time, stops at once."""
    run = Run.at_work
    if run is None or run.stop == number:
        raise KeyboardInterrupt
    run.stop = number
    with contextlib.suppress(OSError):
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)


def require(folder, stage):
    """Raise ValueError saying what to run first if a checkpoint folder is not there."""
    if not os.path.exists(os.path.join(folder, "config.json")):
        first = f"run `python {stage}.py` first, or " if stage in ("sft", "reward_model", "dpo", "ppo") else ""
        raise ValueError(f"no model in {folder}: {first}name another folder")


def require_reward_model(folder, net, tokenizer):
    """Raise ValueError if a network does not score, or reads other tokens."""
    if net.head_kind != "scalar":
        raise ValueError(f"{folder} is no reward model: it has no score")
    if Tokenizer.load(folder).ranks != tokenizer.ranks:
        raise ValueError(f"{folder} was trained with another tokenizer than the policy")


# ---------------------------------------------------------------------------------------- a run

class Run:
    """One stage at work: device, precision, randomness, output folder, checkpoints, metrics and progress.

    A run that was killed goes on from its last checkpoint with the same command, and ends with the weights that it
    would have had. So all that a step draws at random comes from the seed and the step's number (`rng`, and torch's own
    generator), and all that it remembers is in the parts given to `resume`.
    """
    at_work = None                      # the run whose training loop goes on, for a signal to find

    def __init__(self, cfg, total):
        """total: steps in all."""
        self.cfg, self.total, self.parts, self.bad, self.stop = cfg, total, {}, Counter(), None
        self.device, self.first_process = pick_device(cfg.device), parallel.rank() == 0
        self.bfloat16 = cfg.precision == "bfloat16" or (cfg.precision == "auto" and self.device == "cuda")
        self.kind = None                # how networks are spread over processes, from the first parallel.prepare() on
        self.about = {"stage": program(), "settings": dataclasses.asdict(cfg), "inputs": fingerprints(cfg, WORLD),
                      "started": STARTED, "torch": torch.__version__, "threads": torch.get_num_threads()}
        os.makedirs(cfg.out, exist_ok=True)
        self.checkpoints = Checkpoints(cfg.out, cfg.timeout)
        if cfg.resume and self.checkpoints.last():
            self.must_be_the_same()
        elif self.first_process:
            self.checkpoints.remove()                           # first, so that it never meets another run's settings
            write_json(os.path.join(cfg.out, "run.json"), self.about)
        parallel.total(0)                                       # all have looked before the first one writes on
        self.begin(0)
        print(f"{self.about['stage']} on {self.device}: " + "  ".join(
            f"{k}={v}" for k, v in self.about["settings"].items() if k != "debug" and v != ""), flush=True)

    def must_be_the_same(self):
        """Raise ValueError if the unfinished run in the folder is not this one."""
        what_now = "go on with its own command, name another --out, or add --no-resume to start anew"
        now = self.about["settings"] | self.about["inputs"]
        try:
            with open(os.path.join(self.cfg.out, "run.json"), encoding="utf-8") as f:
                old = json.load(f)
            was = old["settings"] | old["inputs"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{self.cfg.out}/run.json: what the unfinished run here was cannot be read ({e}): {what_now}") from None
        for name in sorted((was.keys() | now.keys()) - FREE):
            if name in now and was.get(name) != json.loads(json.dumps(now[name])):
                raise ValueError(f"{self.cfg.out} holds an unfinished run of something else "
                                 f"({name} was {was.get(name)!r}, not {now[name]!r}): {what_now}")

    def begin(self, step):
        """Stand before the step after `step`, whose randomness depends on the seed and on its number alone."""
        self.step = step
        self.rng = random.Random(f"{self.cfg.seed}/{step}")
        torch.manual_seed(self.rng.getrandbits(63))

    def seeds(self, n):
        """A seed for the noise of each of n rows, (n,): a row's sample depends on the run's seed, the step and its place."""
        return torch.tensor([self.rng.getrandbits(62) for _ in range(n)], device=self.device)

    def resume(self, **parts):
        """Name what training changes (networks, optimisers, a controller: each with a state_dict of tensors), and go on
        from the last checkpoint if there is one. Comes right before the training loop."""
        self.parts = parts
        metrics, lines, last = os.path.join(self.cfg.out, "metrics.jsonl"), [], self.checkpoints.last()
        if len(set(parallel.everyone(last))) == 1 and last:
            self.begin(self.checkpoints.load(parts))
        if len(set(parallel.everyone((last, self.step)))) > 1:
            raise ValueError(f"the processes do not see the same checkpoint in {self.cfg.out}: machines must share that folder")
        if self.step:
            with contextlib.suppress(FileNotFoundError), open(metrics, encoding="utf-8") as f:
                lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            print(f"going on after step {self.step} of {self.total}", flush=True)
        if self.first_process:
            with open(metrics + ".tmp", "w", encoding="utf-8") as f:    # steps after the checkpoint will come again
                f.writelines(lines)
            os.replace(metrics + ".tmp", metrics)
        self.metrics = open(metrics if self.first_process else os.devnull, "a", encoding="utf-8")
        self.board = SummaryWriter(self.cfg.out, purge_step=self.step + 1) if SummaryWriter and self.first_process else None
        self.clock, self.first, self.saved, self.cost = time.time(), self.step, time.time(), 0.0
        Run.at_work = self

    def save(self):
        """Begin to write the checkpoint that a resume goes on from, unless a step has just failed."""
        began = time.time()
        if not any(self.bad.values()):
            if self.first_process:
                os.fsync(self.metrics.fileno())
            self.checkpoints.save(self.parts, self.step)
        self.saved = time.time()
        self.cost = self.saved - began

    def autocast(self):
        """Matrix products in bfloat16, if so chosen. (With several processes, parallel.spread() rounds all weights and
        what goes into a block besides.)"""
        return torch.autocast(self.device, torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()

    def descend(self, optimizer, lr, max_norm, loss, batch):
        """One optimiser step, from gradients that are there: clip their norm (0 never clips), step, forget them.
        Returns the norm before clipping.

        A loss or a norm that is not finite is named with its step and batch (in words), and no step is taken; after
        three in a row raises ValueError.
        """
        norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], max_norm or math.inf)
        norm = parallel.whole(norm).item()
        if math.isfinite(norm) and math.isfinite(loss):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            self.bad[id(optimizer)] = 0
        else:
            self.bad[id(optimizer)] += 1
            what = f"step {self.step + 1}: loss {loss:.3g}, gradient norm {norm:.3g} on {batch}"
            if self.bad[id(optimizer)] == 3:
                self.checkpoints.wait()
                kept = "the last good checkpoint is kept" if self.checkpoints.last() else "nothing was good enough to keep"
                raise ValueError(f"{what}: the third in a row that is not finite; {kept}. A lower --lr or --max_norm may help")
            if self.first_process:
                print(f"{what}: not finite, no update made", file=sys.stderr, flush=True)
        optimizer.zero_grad()
        return norm

    def log(self, metrics, show=None):
        """Finish a step: {name: number} goes to the files, and to the screen at some twenty of the steps, or where
        show says so; a terminal sees every step pass by on one line. Saves a checkpoint every save_seconds (less often
        where that would take more than a twentieth of the time)."""
        shown, step = {k: float(v) for k, v in metrics.items()}, self.step + 1
        kept = {k: round(v, 6) if math.isfinite(v) else None for k, v in shown.items()}             # JSON knows no nan
        self.metrics.write(json.dumps({"step": step, **kept}) + "\n")
        self.metrics.flush()
        if self.board:
            for name, value in shown.items():
                self.board.add_scalar(name, value, step)
        self.begin(step)
        due = time.time() - self.saved >= (max(self.cfg.save_seconds, 20 * self.cost) if self.cfg.save_seconds else 0)
        stop, due = parallel.total(torch.tensor([bool(self.stop), due and self.first_process], dtype=torch.int32)).tolist()
        if stop or due:
            self.save()
        if stop:
            self.checkpoints.wait()
            raise KeyboardInterrupt
        if show is None:
            show = step % max(1, self.total // 20) == 0 or step in (1, self.total)
        terminal = sys.stdout.isatty()
        if show or terminal:
            line = f"step {step:{len(str(self.total))}}/{self.total}  " + "  ".join(
                f"{k} {v:.3g}" if abs(v) < 1000 else f"{k} {v:.0f}" for k, v in shown.items())
            left = (time.time() - self.clock) / (step - self.first) * (self.total - step)
            line += f"  {int(left) // 60}:{int(left) % 60:02} left"
            print(("\r\033[K" if terminal else "") + line, end="\n" if show or not terminal else "", flush=True)

    def finish(self, model, tokenizer, **facts):
        """Save the model with its tokenizer, and what the run found out, with the seconds that it took. All files are
        written aside first: what stood in the folder before stays until they are whole."""
        Run.at_work = None
        self.checkpoints.wait()
        if not finite(model.state_dict()):
            raise ValueError(f"the weights are no longer finite after step {self.step}: not saved. A lower --lr may help")
        if self.first_process:
            self.write(model, tokenizer, facts)
        else:
            for x in model.state_dict().values():               # the first one asks for them in this order
                collect(x)
        parallel.total(0)                                       # nobody leaves before the files are there
        print(f"wrote {self.cfg.out}/ after {time.time() - STARTED:.0f} s", flush=True)

    def write(self, model, tokenizer, facts):
        aside = os.path.join(self.cfg.out, "new")
        model.save(aside, collect)
        tokenizer.save(aside)
        for name in sorted(os.listdir(aside)):
            os.replace(os.path.join(aside, name), os.path.join(self.cfg.out, name))
        os.rmdir(aside)
        self.metrics.close()
        if self.board:
            self.board.close()
        ended = time.time()
        write_json(os.path.join(self.cfg.out, "run.json"), {**self.about, "ended": ended, "seconds": round(ended - STARTED, 1), **facts})
        self.checkpoints.remove()                               # last: killed before, the run goes on and ends the same


def collect(x):
    """A whole tensor from its shards, after the first process has written the one before: the others wait for one tensor
    at a time, however large the network."""
    parallel.total(0)
    return parallel.whole(x)


def write_json(path, value):
    """The file appears whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
    os.replace(path + ".tmp", path)


def pick_device(name):
    """"auto" to the best device there is. Raises ValueError for one that is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(d for d in there if there[d])
    if not there[name]:
        raise ValueError(f"--device {name}: this machine or this build of PyTorch has none")
    return name


# ---------------------------------------------------------------------------------------- optimiser

def make_optimizer(model, lr, weight_decay=0.0, eps=1e-8):
    """AdamW (Loshchilov & Hutter 2019) for all that is not frozen; biases, norms and other vectors do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                             lr=lr, betas=(0.9, 0.99), eps=eps, fused=True)


def schedule(step, total, warmup, shape):
    """Factor on the learning rate at a step from 0: linear warm-up over `warmup` steps, then "constant", "linear"
    or "cosine" decay towards 0 after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[shape]
