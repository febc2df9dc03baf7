"""Flags as dataclasses: a stage declares its own as fields on top of Training, and `parse` makes them a command line.

    lr: float = flag(3e-3, "peak learning rate", 0)         # --lr, at least 0
"""
import argparse
import dataclasses
import os
import sys


def flag(default, help, low=None, high=None, choices=None):
    """A dataclass field that is also a command-line flag; a tuple of texts comes as words without a flag's name.
    low and high are inclusive."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclasses.dataclass
class Settings:
    """The flags that all scripts share."""
    out: str = flag("out/run", "folder that the run writes")
    seed: int = flag(0, "seed of weights, order and sampling", 0, 2 ** 31)
    device: str = flag("auto", "auto takes cuda, then mps, then cpu", choices=("auto", "cuda", "mps", "cpu"))
    parallel: str = flag("auto", "under torchrun: ddp keeps the training state whole in each process, fsdp shards it; "
                         "auto takes fsdp when it would fill more than half of a GPU", choices=("auto", "ddp", "fsdp"))
    timeout: float = flag(600.0, "seconds that a process waits for the others", 1)
    debug: bool = flag(False, "show the traceback of an error")


@dataclasses.dataclass
class Training(Settings):
    """The flags that all stages share besides."""
    precision: str = flag("auto", "that networks compute in; auto is bfloat16 on cuda, float32 elsewhere. Weights are kept in float32",
                          choices=("auto", "float32", "bfloat16"))
    save_seconds: float = flag(60.0, "seconds between checkpoints that an interrupted run goes on from; 0: every step", 0)
    resume: bool = flag(True, "go on with the unfinished run in the folder, if there is one")
    micro_tokens: int = flag(0, "tokens a forward pass, padding included, besides micro_batch; 0 sets no bound", 0)
    checkpoint_blocks: bool = flag(False, "compute a block's activations again in the backward pass: less memory, a third more time")
    compile: bool = flag(False, "torch.compile each block; the first steps take minutes")
    offload: bool = flag(False, "keep frozen networks on the CPU between uses")


def parse(config, doc, argv=None):
    """A config dataclass from the command line. A wrong flag ends the program with status 2 and the allowed range."""
    parser = argparse.ArgumentParser(program(), description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
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
        huge = sys.float_info.max
        if f.type in (int, float) and not (-huge if low is None else low) <= value <= (huge if high is None else high):
            bounds = f"from {low} to {high}" if None not in (low, high) else (
                (f"at least {low} and " if low is not None else f"at most {high} and " if high is not None else "") + "finite")
            parser.error(f"argument --{f.name}: must be {bounds}, not {value}")
    try:
        return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except ValueError as e:                     # flags that do not go together
        parser.error(str(e))


def program():
    """What the user started, for messages: ppo.py, or python -m data."""
    folder, name = os.path.split(sys.argv[0])
    return f"python -m {os.path.basename(folder)}" if name == "__main__.py" else name
