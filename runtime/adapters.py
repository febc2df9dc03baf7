"""LoRA around a stage: which parameters are trained, and folders of adapters in PEFT's format."""
import os
import re

import torch
from torch.nn import Parameter

from model import Linear
from runtime import folders
from runtime.files import ADAPTER_CONFIG, reading, write_json
from runtime.safetensors import load_tensors, save_tensors

LAYERS = ("q", "k", "v", "out", "gate", "up", "down")
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."                # of all tensor names in a folder of adapters
UNSUPPORTED = ("use_dora", "use_rslora", "lora_bias", "layers_to_transform", "layer_replication",
               "alora_invocation_tokens")


def adapt(model, rank, alpha, targets):
    """Choose which parameters are trained: all of them at rank 0, else adapters of the layers in targets
    ("q,v"). Adapters that the network already has are trained further if they have this shape; others are
    merged into the weights first."""
    targets = set(targets.split(","))
    if unknown := sorted(targets - set(LAYERS)):
        raise ValueError(f"--lora_targets: {unknown[0]!r} is none of {', '.join(LAYERS)}")
    wanted = {name: (rank, alpha / max(1, rank)) for name, layer in model.named_modules()
              if isinstance(layer, Linear) and name.split(".")[-1] in targets}
    if rank > 0 and not wanted:
        raise ValueError(f"--lora_targets: the model has no {', '.join(sorted(targets))}")
    adapted = model.adapted()
    if rank == 0 or {name: (len(layer.A), layer.scale) for name, layer in adapted.items()} != wanted:
        merge(model)
        model.requires_grad_(True)
        if rank > 0:
            model.add_adapters(rank, alpha, targets)
    if rank > 0 and has_new_tokens(model):      # only their own embeddings can tell new tokens apart
        model.token_embedding.requires_grad_(True)
        if model.head_kind == "lm" and not model.config.tied:
            model.head.requires_grad_(True)


def merge(model):
    """Merge a network's adapters into its weights, if it has any."""
    for layer in model.adapted().values():
        layer.merge()
        model.config.folder = ""                                # no folder holds these weights


def has_new_tokens(model):
    """Whether the vocabulary is larger than that of the folder from which the network was loaded."""
    source = model.config.source
    return source is not None and model.config.vocab_size > source["vocab_size"]


def check_alone(model):
    """Raise ValueError if a network's adapters cannot be saved without the rest."""
    if has_new_tokens(model):
        raise ValueError("--no-merge: a folder of adapters cannot hold the tokens that are new in this model")
    if not model.config.folder:
        raise ValueError("--no-merge: the adapters of --init have another shape, and were merged into "
                         "weights that no folder holds: take their rank, alpha and layers, or save merged")


# ------------------------------------------------------------------------------------ folders of adapters

def read_config(folder):
    """adapter_config.json. Raises ValueError for adapters that model.py cannot compute."""
    with reading(os.path.join(folder, ADAPTER_CONFIG), "adapters") as config:
        config["lora_alpha"], config["task_type"]                   # KeyError if they are missing
        init = config.get("init_lora_weights", True)
        if init not in (True, False, "gaussian", "orthogonal", "eva"):
            raise ValueError(f"init_lora_weights {init!r} changes the base, and is not supported")
        if config["peft_type"] != "LORA" or config.get("bias", "none") != "none":
            raise ValueError("only LoRA without biases is supported")
        for key in UNSUPPORTED:
            if config.get(key):
                raise ValueError(f"{key} is not supported")
        return config


def places(model):
    """(PEFT's name of a matrix, our layers that it holds one after another), wherever an adapter can be."""
    _, family = folders.find_family(model.config)
    for theirs, ours in folders.layout(folders.skeleton(model.config, model.head_kind), family).items():
        layers = [model.get_submodule(name.rpartition(".")[0]) for name in ours]
        if theirs.endswith(".weight") and isinstance(layers[0], Linear):
            yield theirs.removesuffix(".weight"), layers


def load(model, folder):
    """Put a folder's adapters, and its scalar head if it has one, into the network that they belong to."""
    config, path, dtype = read_config(folder), os.path.join(folder, WEIGHTS), torch.get_default_dtype()
    tensors = {name.removeprefix(PREFIX): x.to(dtype) for name, x in load_tensors(path).items()}
    model.add_adapters(1, 1.0, ())                                      # freezes the rest
    for theirs, layers in places(model):
        A, B = (tensors.pop(f"{theirs}.lora_{letter}.weight", None) for letter in "AB")
        if A is None and B is None:
            continue
        rows, width = [layer.out_features for layer in layers], layers[0].in_features
        if A is None or B is None or A.shape != (len(A), width) or B.shape != (sum(rows), len(A)):
            raise ValueError(f"{path}: the adapter of {theirs} does not fit the model")
        alpha = next((alpha for pattern, alpha in (config.get("alpha_pattern") or {}).items()
                      if re.fullmatch(rf"(.*\.)?({pattern})", theirs)), config["lora_alpha"])
        for layer, part in zip(layers, B.split(rows)):
            own = (part != 0).any(0) | ~(B != 0).any(0)     # without columns that serve only its neighbours
            if own.any():
                layer.add_adapter(int(own.sum()), alpha * int(own.sum()) / len(A))
                layer.A, layer.B = Parameter(A[own]), Parameter(part[:, own].contiguous())
    score = tensors.pop("score.weight", None)
    if score is None and config["task_type"] == "SEQ_CLS" and folders.read_head(model.config.source) == "lm":
        raise ValueError(f"{path}: the adapters of a reward model, without its score")
    if model.head_kind == "scalar" and score is not None:
        if score.shape != model.head.weight.shape:
            raise ValueError(f"{path}: the score does not fit the model")
        bias = torch.tensor([config.get("score_bias", 0.0)])
        model.head.load_state_dict({"weight": score, "bias": bias})
    if tensors:
        raise ValueError(f"{path}: tensor {min(tensors)} is unknown")


def save(model, folder, whole=lambda x: x, write=True):
    """Write a network's adapters, and its scalar head, as PEFT does. whole and write: as in folders.save."""
    tensors, ranks, alphas = {}, {}, {}
    for theirs, layers in places(model):
        if not any(layer.scale for layer in layers):
            continue
        A = torch.cat([whole(layer.A) for layer in layers if layer.scale])
        B = torch.block_diag(*(whole(layer.B) if layer.scale else A.new_zeros(layer.out_features, 0)
                               for layer in layers))
        tensors |= {f"{PREFIX}{theirs}.lora_A.weight": A, f"{PREFIX}{theirs}.lora_B.weight": B}
        name = ".".join(theirs.split(".")[-2:])                         # self_attn.q_proj, attn.c_proj
        ranks[name], alphas[name] = len(A), len(A) * max(layer.scale for layer in layers)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.config.folder,
              "r": min(ranks.values()), "lora_alpha": min(alphas.values()), "rank_pattern": ranks,
              "alpha_pattern": alphas, "target_modules": sorted(ranks), "lora_dropout": 0.0, "bias": "none",
              "fan_in_fan_out": folders.find_family(model.config)[1].transposed, "inference_mode": True}
    if model.head_kind == "scalar":
        tensors[f"{PREFIX}score.weight"] = whole(model.head.weight)
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"],
                   "score_bias": whole(model.head.bias).item()}
    if write:
        os.makedirs(folder, exist_ok=True)
        write_json(os.path.join(folder, ADAPTER_CONFIG), config)
        save_tensors(os.path.join(folder, WEIGHTS), tensors)
