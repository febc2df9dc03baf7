"""Networks by the name of a folder or of a model of the hub."""
import torch

from model import GPT
from runtime import adapters
from runtime.files import base_of, find


def load(folder, head=None, vocab_size=0):
    """The network of a folder, or of a folder of adapters with the base that it names. head: as in GPT.load.
    vocab_size: the vocabulary is made at least this large, for a tokenizer may have added control tokens.

    The weights stay in the file until Compute.place moves them, so that no process holds more of them than it
    will keep."""
    path = find(folder)
    base = base_of(path)
    if base is None:
        model = GPT.load(path, head, mapped=True)
    else:
        saved_head = "scalar" if adapters.read_config(path)["task_type"] == "SEQ_CLS" else "lm"
        if head == "lm" and saved_head == "scalar":
            raise ValueError(f"{folder} is a reward model: it gives scores, not answers")
        head = head or saved_head
        model = GPT.load(find(base), head, mapped=True)
        adapters.load(model, path)
    model.config.folder = base or folder
    if vocab_size > model.config.vocab_size:
        add_tokens(model, vocab_size)
    return model


@torch.no_grad()
def add_tokens(model, vocab_size):
    """Enlarge a network's vocabulary. A new token starts as the mean of the others, which makes it about as
    likely as the average one, and so hardly changes what the network says (Hewitt 2021)."""
    layers = [model.token_embedding]
    if model.head_kind == "lm" and not model.config.tied:
        layers.append(model.head)
    for layer in layers:
        weight = layer.weight
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        layer.weight = torch.nn.Parameter(torch.cat([weight, mean.expand(vocab_size - len(weight), -1)]))
    model.config.vocab_size = vocab_size


def load_reward_model(folder):
    """A network with a scalar head. Raises ValueError for any other."""
    model = load(folder)
    if model.head_kind != "scalar":
        raise ValueError(f"{folder} is not a reward model: it gives no score")
    return model
