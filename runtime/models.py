"""Networks from checkpoint folders."""
import os
import re

import torch

from model import GPT
from runtime import adapters

STAGES = ("sft", "reward_model", "dpo", "ppo")


def find(name):
    """The folder of a model: the one of this name, or what huggingface_hub, where it is installed, fetches
    for a name of the hub (owner/name, or gpt2). Raises ValueError saying which stage to run first."""
    if any(os.path.exists(os.path.join(name, file)) for file in ("config.json", adapters.CONFIG)):
        return name
    stage = os.path.basename(os.path.normpath(name))
    if stage in STAGES:
        raise ValueError(f"no model in {name}: run `python {stage}.py` first, or name another folder")
    if os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"no model in {name}: name another folder")
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
    except ImportError:
        raise ValueError(f"no model in {name}: name another folder (where huggingface_hub is installed, it "
                         "can be a name of the hub)") from None
    except Exception as e:                              # a download can fail with any of many exceptions
        raise ValueError(f"no model in {name}, and the hub does not give it ({type(e).__name__}): put its "
                         "config.json, model.safetensors and tokenizer.json into a folder") from None


def load(folder, head=None, vocab_size=0):
    """The network of a folder, or of a folder of adapters with the base that it names. head: as in GPT.load.
    vocab_size: at least so many tokens: a tokenizer may have added control tokens.

    The weights stay in the file until they are placed, so that no process ever holds more than it will keep,
    and a block for a moment."""
    path = find(folder)
    base = adapters.base_of(path)
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
    """A network with a scalar head. Raises ValueError for any other."""
    model = load(folder)
    if model.head_kind != "scalar":
        raise ValueError(f"{folder} is no reward model: it has no score")
    return model
