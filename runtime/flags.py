"""Flags as dataclasses: a script declares its own as fields on top of Settings or Training, and `parse` makes
a command line of them.

    lr: float = flag(3e-3, "peak learning rate", 0)         # --lr, at least 0
"""
import argparse
import dataclasses
import os
import sys


def flag(default, help, low=None, high=None, choices=None):
    """A dataclass field that is also a command-line flag. low and high are inclusive. A field of type tuple
    takes words without a flag's name."""
    about = {"help": help, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass
class Settings:
    """The flags of every script that runs networks. None of them changes a result, apart from rounding, but
    `seed`, `precision` and `max_dropped`."""
    out: str = flag("out/run", "folder that the run writes")
    max_dropped: float = flag(0.01, "share of a file's records that may be left out, of no use or too "
                              "long; more stop the run", 0, 1)
    seed: int = flag(0, "seed of weights, order and sampling", 0, 2 ** 31)
    device: str = flag("auto", "auto takes cuda, then mps, then cpu", choices=("auto", "cuda", "mps", "cpu"))
    precision: str = flag("auto", "of matrix products; auto is bfloat16 on cuda, float32 elsewhere. "
                          "Trained weights stay float32", choices=("auto", "float32", "bfloat16"))
    micro_batch: int = flag(32, "sequences per forward pass: lower it if memory runs out", 1)
    micro_tokens: int = flag(0, "tokens per forward pass, padding included; 0 sets no bound on them", 0)
    sample_batch: int = flag(256, "answers sampled at once, each of which needs its part of the KV cache", 1)
    parallel: str = flag("auto", "under torchrun: ddp keeps the training state whole in each process, fsdp "
                         "shards it; auto takes fsdp where it would fill more than half of a GPU",
                         choices=("auto", "ddp", "fsdp"))
    gather_at_once: bool = flag(True, "under fsdp: sample with all blocks gathered, if they fit")
    offload: bool = flag(False, "keep frozen networks on the CPU between uses")
    compile: bool = flag(False, "torch.compile each block; the first steps take minutes")
    timeout: float = flag(600.0, "seconds that a process waits for the others", 1)
    debug: bool = flag(False, "show the traceback of an error")


@dataclasses.dataclass
class Training(Settings):
    """The flags that all four stages share."""
    system: str = flag("", "system message for conversations that have none; none keeps the checkpoint's")
    save_seconds: float = flag(60.0, "seconds between checkpoints to go on from; 0 saves every step", 0)
    resume: bool = flag(True, "go on with the unfinished run in the folder, if there is one")
    max_norm: float = flag(1.0, "gradient norm to clip at; 0 never clips", 0)
    lora_rank: int = flag(0, "r of LoRA: train adapters of this rank beside frozen weights; 0 trains all", 0)
    lora_alpha: float = flag(32.0, "α of LoRA: what adapters add counts α/r", 1e-6)
    lora_targets: str = flag("q,k,v,out,gate,up,down", "layers that get adapters")
    nf4: bool = flag(False, "QLoRA: keep the frozen weights of all layers in 4 bits")
    merge: bool = flag(True, "merge adapters into the saved weights; --no-merge saves them alone, for PEFT")
    checkpoint_blocks: bool = flag(False, "recompute each block's activations in the backward pass: "
                                   "less memory, a third more time")


class Parser(argparse.ArgumentParser):
    """A wrong flag is one line: argparse would print every flag before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def parse(config, doc, argv=None):
    """A config dataclass from the command line. A wrong flag ends the program with status 2 and a line."""
    parser = Parser(program(), description=doc, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = dataclasses.fields(config)
    for f in fields:
        add_flag(parser, f)
    values = vars(parser.parse_args(argv))
    for f in fields:
        low, high, value = f.metadata["low"], f.metadata["high"], values[f.name]
        if f.type in (int, float) and value is not None and not is_within(value, low, high):
            parser.error(f"argument --{f.name}: must be {range_in_words(low, high)}, not {value}")
        if f.type is tuple:
            values[f.name] = tuple(value)
    try:
        return config(**values)
    except ValueError as e:                     # flags that do not go together
        parser.error(str(e))


def add_flag(parser, f):
    if f.type is tuple:
        parser.add_argument(f.name, nargs="*", default=f.default, help=f.metadata["help"])
        return
    default = "none" if f.default in ("", None) else f.default
    text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
    choices = f.metadata["choices"]
    if f.type is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif choices:
        how = {"choices": choices, "metavar": "|".join(choices)}
    else:
        how = {"type": f.type, "metavar": f.type.__name__}
    parser.add_argument(f"--{f.name}", default=f.default, help=text, **how)


def is_within(value, low, high):
    """Whether low ≤ value ≤ high, where None stands for the largest finite number. NaN is in no range."""
    largest = sys.float_info.max
    return (-largest if low is None else low) <= value <= (largest if high is None else high)


def range_in_words(low, high):
    if low is not None and high is not None:
        return f"from {low} to {high}"
    if low is not None:
        return f"at least {low} and finite"
    if high is not None:
        return f"at most {high} and finite"
    return "finite"


def program():
    """What the user started, for messages: ppo.py, python -m data, or python -m lab.plan."""
    folder, name = os.path.split(sys.argv[0])
    package = os.path.basename(folder)
    if name == "__main__.py":
        return f"python -m {package}"
    if os.path.exists(os.path.join(folder, "__init__.py")):
        return f"python -m {package}.{name.removesuffix('.py')}"
    return name
