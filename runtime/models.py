"""Networks from checkpoint folders."""
import importlib.util
import math
import os
import sys

import torch

from model import GPT
from runtime import adapters
from runtime.files import base_of, find
from runtime.safetensors import load_tensors

UNCERTAINTY = "uncertainty.safetensors"


def load(folder, head=None, vocab_size=0):
    """The network of a folder, or of a folder of adapters with the base that it names. head: as in GPT.load.
    vocab_size: at least so many tokens: a tokenizer may have added control tokens.

    The weights stay in the file until they are placed, so that no process ever holds more than it will keep,
    and a block for a moment."""
    path = find(folder)
    base = base_of(path)
    if base is None:
        model = GPT.load(path, head, mapped=True)
    else:
        head = head or ("scalar" if adapters.read_config(path)["task_type"] == "SEQ_CLS" else "lm")
        model = GPT.load(find(base), head, mapped=True)
        adapters.load(model, path)
    model.folder = base or folder
    if vocab_size > model.config.vocab_size:
        add_tokens(model, vocab_size)
    return model


@torch.no_grad()
def add_tokens(model, vocab_size):
    """Give a network a larger vocabulary. A new token starts as the mean of the others: it is as likely as
    the average one, and takes little from the rest (Hewitt 2021)."""
    layers = [model.token_embedding]
    if model.head_kind == "lm" and not model.config.tied:
        layers.append(model.head)
    for layer in layers:
        weight = layer.weight
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        layer.weight = torch.nn.Parameter(torch.cat([weight, mean.expand(vocab_size - len(weight), -1)]))
    model.config.vocab_size, model.has_new_tokens = vocab_size, True


def load_reward_model(folder):
    """A network that gives scores, and in `known` what uncertainty.learn found out about them, or None.
    Raises ValueError for any other."""
    model, path = load(folder), os.path.join(find(folder), UNCERTAINTY)
    if os.path.exists(path):
        model.known, C = load_tensors(path), model.config.n_embd
        shapes = {name: tuple(x.shape) for name, x in model.known.items()}
        M = shapes.get("bias", (0,))[0]
        if shapes != {"heads": (M, C), "bias": (M,), "mean": (C,), "precision": (C, C), "threshold": ()}:
            raise ValueError(f"{path} does not fit the model beside it: train that once more, or remove it")
    if model.head_kind != "scalar":
        raise ValueError(f"{folder} is no reward model: it has no score")
    return model


def load_function(name):
    """The function of `file.py:name`, (messages, answer) -> number. Its errors, and what is no number, become
    a ValueError that names the prompt."""
    path, _, called = name.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location("reward_function", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)     # dataclasses look there
        spec.loader.exec_module(module)
        function = getattr(module, called)
    except Exception as e:                              # somebody's own code
        raise ValueError(f"--reward {name}: {type(e).__name__}: {e}") from e

    def checked(messages, answer):
        try:
            number = float(function(messages, answer))
            if math.isfinite(number):
                return number
            wrong = f"returned {number}"
        except Exception as e:
            wrong = f"{type(e).__name__}: {e}"
        prompt = messages[-1]["content"]
        raise ValueError(f"--reward {name}: {wrong}, for the answer {answer[:80]!r} to {prompt[:80]!r}")
    return checked
