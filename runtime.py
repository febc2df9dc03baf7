"""What every stage needs around its algorithm: flags, device and precision, optimiser and schedule, metrics, files.

A stage declares its flags as a dataclass of `flag(default, help, ...)` fields on top of Settings, and ends with

    if __name__ == "__main__":
        runtime.main(Config, train, __doc__)

A Run is one stage at work: it owns the output folder, writes metrics.jsonl (one line a step) and, if TensorBoard is
installed, its event files, and prints one tidy line now and then with the time left.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import sys
import time

import torch

try:                                    # an extra: pip install tensorboard
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None

STARTED = time.time()                   # imports included: what a person waits for


# ---------------------------------------------------------------------------------------- flags

def flag(default, help, low=None, high=None, choices=None):
    """A dataclass field that is also a command-line flag; a tuple of texts comes as words without a flag's name.
    low and high are inclusive."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclasses.dataclass
class Settings:
    """The flags that all stages share."""
    out: str = flag("out/run", "folder that the run writes")
    seed: int = flag(0, "seed of weights, order and sampling", 0, 2 ** 31)
    device: str = flag("auto", "auto takes cuda, then mps, then cpu", choices=("auto", "cuda", "mps", "cpu"))
    precision: str = flag("auto", "of matrix products; auto is bfloat16 on cuda, float32 elsewhere",
                          choices=("auto", "float32", "bfloat16"))
    debug: bool = flag(False, "show the traceback of an error")


def parse(config, doc, argv=None):
    """A config dataclass from the command line. A wrong flag ends the program with status 2 and the allowed range."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(config):
        if f.type is tuple:
            parser.add_argument(f.name, nargs="*", default=f.default, help=f.metadata["help"])
            continue
        text = f"{f.metadata['help']} (default: {f.default if f.default != '' else 'none'})".replace("%", "%%")
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else \
            {"type": f.type, "metavar": f.type.__name__, "choices": f.metadata["choices"]}
        if f.metadata["choices"]:
            how["metavar"] = "|".join(f.metadata["choices"])
        parser.add_argument(f"--{f.name}", default=f.default, help=text, **how)
    values = vars(parser.parse_args(argv))
    for f in dataclasses.fields(config):
        low, high, value = f.metadata["low"], f.metadata["high"], values[f.name]
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
            parser.error(f"argument --{f.name}: must be {bounds}, not {value}")
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def main(config, train, doc):
    """Run a stage from the command line: one line and status 1 for what a user can put right."""
    cfg = parse(config, doc)
    program = os.path.basename(sys.argv[0])
    try:
        train(cfg)
    except (ValueError, OSError) as e:
        if cfg.debug:
            raise
        sys.exit(f"{program}: {e}")             # status 1
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        sys.exit(130)


def require(folder, stage):
    """Raise ValueError saying what to run first if a checkpoint folder is not there."""
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise ValueError(f"no model in {folder}: run `python {stage}.py` first, or name another folder")


# ---------------------------------------------------------------------------------------- a run

class Run:
    """Device, precision, seed, output folder, metrics and progress of one stage."""

    def __init__(self, cfg, total):
        """total: steps to come, for the time left."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("several processes are not supported yet: run without torchrun")
        self.cfg, self.total, self.step = cfg, total, 0
        self.device = pick_device(cfg.device)
        self.bfloat16 = cfg.precision == "bfloat16" or (cfg.precision == "auto" and self.device == "cuda")
        torch.manual_seed(cfg.seed)
        self.rng = random.Random(cfg.seed)
        os.makedirs(cfg.out, exist_ok=True)
        self.about = {"stage": os.path.basename(sys.argv[0]), "settings": dataclasses.asdict(cfg),
                      "started": STARTED, "torch": torch.__version__, "threads": torch.get_num_threads()}
        self.write_json("run.json", self.about)
        self.metrics = open(os.path.join(cfg.out, "metrics.jsonl"), "w", encoding="utf-8")
        self.board = SummaryWriter(cfg.out) if SummaryWriter else None
        self.clock = time.time()
        print(f"{self.about['stage']} on {self.device}: " + "  ".join(
            f"{k}={v}" for k, v in self.about["settings"].items() if k != "debug" and v != ""), flush=True)

    def autocast(self):
        """Matrix products in bfloat16, if so chosen."""
        return torch.autocast(self.device, torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()

    def log(self, metrics, show=None):
        """Finish a step: {name: number} goes to the files, and to the screen at some twenty of the steps, or where
        show says so. A terminal sees every step pass by on one line."""
        self.step += 1
        metrics = {k: float(v) for k, v in metrics.items()}
        self.metrics.write(json.dumps({"step": self.step, **{k: round(v, 6) for k, v in metrics.items()}}) + "\n")
        self.metrics.flush()
        if self.board:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, self.step)
        if show is None:
            show = self.step % max(1, self.total // 20) == 0 or self.step in (1, self.total)
        if show or sys.stdout.isatty():
            left = (time.time() - self.clock) / self.step * (self.total - self.step)
            line = f"step {self.step:{len(str(self.total))}}/{self.total}  " + "  ".join(
                f"{k} {v:.3g}" if abs(v) < 1000 else f"{k} {v:.0f}" for k, v in metrics.items())
            line += f"  {int(left) // 60}:{int(left) % 60:02} left"
            terminal = sys.stdout.isatty()
            print(("\r\033[K" if terminal else "") + line, end="\n" if show or not terminal else "", flush=True)

    def finish(self, model, tokenizer, **facts):
        """Save the model with its tokenizer, and what the run found out, with the seconds that it took."""
        model.save(self.cfg.out)
        tokenizer.save(self.cfg.out)
        self.metrics.close()
        if self.board:
            self.board.close()
        ended = time.time()
        self.write_json("run.json", {**self.about, "ended": ended, "seconds": round(ended - STARTED, 1), **facts})
        print(f"wrote {self.cfg.out}/ after {ended - STARTED:.0f} s", flush=True)

    def write_json(self, name, value):
        write_json(os.path.join(self.cfg.out, name), value)


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
    """AdamW (Loshchilov & Hutter 2019); biases, norms and other vectors do not decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                             lr=lr, betas=(0.9, 0.99), eps=eps, fused=True)


def schedule(step, total, warmup, shape):
    """Factor on the learning rate at a step from 0: linear warm-up over `warmup` steps, then "constant", "linear"
    or "cosine" decay towards 0 after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[shape]


def optimizer_step(optimizer, lr, max_norm):
    """Clip the gradient's norm (0 never clips), step at this learning rate, forget the gradient. Returns the norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()
