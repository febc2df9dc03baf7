"""Flags as dataclasses. A script declares its own as fields on top of Settings or Training, and `parse` makes
a command line of them.

    lr: float = flag(3e-3, "peak learning rate", 0)         # --lr, at least 0
"""
import argparse
import dataclasses
import os
import sys


def flag(default, help, low=None, high=None, choices=None, needs=None, unless=None):
    """A dataclass field that is also a command-line flag. low and high are inclusive; needs and unless: the
    names of flags without which, or with which, this one does nothing. A field of type tuple takes words
    that no flag's name precedes."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices,
                                                            needs=needs, unless=unless))


@dataclasses.dataclass
class Settings:
    """The flags of every script that runs networks. Apart from rounding, only `seed`, `precision` and
    `max_dropped` change results."""
    max_dropped: float = flag(0.01, "share of a file's records that may be left out because they are of no "
                              "use, but at least one; more stop the run", 0, 1)
    seed: int = flag(0, "seed of weights, order and sampling", 0, 2 ** 31)
    device: str = flag("auto", "auto takes cuda, then mps, then cpu", choices=("auto", "cuda", "mps", "cpu"))
    precision: str = flag("auto", "of matrix products; auto is bfloat16 on GPUs that have units for it, else "
                          "float32. Trained weights stay float32", choices=("auto", "float32", "bfloat16"))
    micro_batch: int = flag(32, "sequences per forward pass: lower it if memory runs out", 1)
    micro_tokens: int = flag(0, "most tokens per forward pass, padding included, other than in sampling; "
                              "0 sets no bound", 0)
    sample_batch: int = flag(256, "answers sampled at once, each of which needs its part of the KV cache", 1)
    parallel: str = flag("auto", "under torchrun: ddp keeps the whole training state in each process, fsdp "
                         "shards it; auto takes fsdp if the state would fill more than half of a GPU",
                         choices=("auto", "ddp", "fsdp"))
    gather_at_once: bool = flag(True, "under fsdp: gather the whole network to sample; --no-gather_at_once "
                                "gathers it block by block at every token, if memory runs out")
    offload: bool = flag(False, "keep frozen networks on the CPU between uses")
    compile: bool = flag(False, "torch.compile each block; the first steps take minutes")
    timeout: float = flag(600.0, "seconds that a process waits for the others", 1)
    debug: bool = flag(False, "show the traceback of an error")


@dataclasses.dataclass
class Training(Settings):
    """The flags of every script that trains."""
    out: str = flag("out/run", "folder that the run writes")
    system: str = flag("", "system message for conversations that have none; none keeps the checkpoint's")
    save_seconds: float = flag(60.0, "seconds between checkpoints to go on from; 0 saves every step", 0)
    resume: bool = flag(True, "go on with the unfinished run in the folder, if there is one")
    overwrite: bool = flag(False, "replace the finished run in the folder, once this one is finished")
    max_norm: float = flag(1.0, "gradient norm to clip at; 0 never clips", 0)
    lora_rank: int = flag(0, "r of LoRA: train adapters of this rank beside frozen weights; 0 trains all", 0)
    lora_alpha: float = flag(32.0, "α of LoRA: an adapter's output is scaled by α/r", 1e-6, needs="lora_rank")
    lora_targets: str = flag("q,k,v,out,gate,up,down", "layers that get adapters", needs="lora_rank")
    nf4: bool = flag(False, "QLoRA: keep the frozen weights of all layers in 4 bits")
    merge: bool = flag(True, "merge adapters into the saved weights; --no-merge saves them alone, for PEFT",
                       needs="lora_rank")
    checkpoint_blocks: bool = flag(False, "recompute each block's activations in the backward pass: "
                                   "less memory, a third more time")


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line. argparse itself would print the usage of all flags before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def parse(config, doc, argv=None):
    """A config dataclass from the command line. A wrong flag ends the program with status 2 and one line."""
    fields = dataclasses.fields(config)
    words = [f"[{f.name} ...]" for f in fields if f.type is tuple]
    parser = Parser(program(), usage=" ".join([program(), *words, "[flags]"]), description=doc,
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = parser.add_argument_group("flags of this script")
    shared = parser.add_argument_group("engine: where and how it runs, in every script that has networks")
    inherited = {f.name for f in dataclasses.fields(Training)} if issubclass(config, Settings) else ()
    for f in fields:
        add_flag(shared if f.name in inherited else own, f)
    values = vars(parser.parse_args(argv))
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    argv = sys.argv[1:] if argv is None else argv
    given = {word[2:].split("=")[0].removeprefix("no-") for word in argv if word.startswith("--")}
    for f in fields:
        needs, unless = f.metadata["needs"], f.metadata["unless"]
        if f.name in given and (needs and not values[needs] or unless and values[unless]):
            other, value = needs or unless, values[needs or unless]
            said = f"--no-{other}" if value is False else f"--{other} {value}"
            parser.error(f"--{f.name} does nothing with {said}")
    try:
        return config(**values)
    except ValueError as e:                     # flags that do not go together
        parser.error(str(e))


def add_flag(group, f):
    """Add the flag of a dataclass field to a parser's group."""
    if f.type is tuple:
        group.add_argument(f.name, nargs="*", default=f.default, help=f.metadata["help"])
        return
    default = "none" if f.default in ("", None) else f.default
    text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
    choices = f.metadata["choices"]
    if f.type is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif choices:
        how = {"choices": choices, "metavar": "|".join(choices)}
    elif f.type is str:
        how = {"metavar": "str"}
    else:
        how = {"type": number(f.type, f.metadata["low"], f.metadata["high"]), "metavar": f.type.__name__}
    group.add_argument(f"--{f.name}", default=f.default, help=text, **how)


def number(kind, low, high):
    """A function that reads a finite int or float from low to high (None: no bound), for argparse."""
    largest = sys.float_info.max
    start, end = "(-inf" if low is None else f"[{low}", "inf)" if high is None else f"{high}]"

    def read(text):
        value = kind(text)
        if not (-largest if low is None else low) <= value <= (largest if high is None else high):
            raise argparse.ArgumentTypeError(f"must be in {start}, {end}, not {text}")
        return value
    read.__name__ = kind.__name__               # argparse says "invalid int value"
    return read


def changed_flags(cfg):
    """The flags of a config that differ from their defaults, as on a command line: a list of texts."""
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)
              if getattr(cfg, f.name) != f.default}
    switches = {True: "--{}", False: "--no-{}"}
    return [switches[x].format(name) if isinstance(x, bool) else f"--{name} {x}"
            for name, x in values.items()]


def program():
    """What the user started, for messages: script.py, python -m package, or python -m package.module."""
    folder, name = os.path.split(sys.argv[0])
    package = os.path.basename(folder)
    if name == "__main__.py":
        return f"python -m {package}"
    if os.path.exists(os.path.join(folder, "__init__.py")):
        return f"python -m {package}.{name.removesuffix('.py')}"
    return name
