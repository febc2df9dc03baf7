"""Networks as Hugging Face model folders: config.json beside model.safetensors, or its shards and an index.

Folders that transformers, vLLM and others have saved are read without conversion, and they read ours. A
family of models is a table in families.json: how its config.json spells a GPTConfig, and how it names the
tensors. A setting that model.py does not compute as the family does is refused by name.
"""
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT, GPTConfig, Linear
from runtime.files import reading, write_json
from runtime.safetensors import copy, load_folder, write_tensors


@dataclass
class Family:
    """One kind of model folder. In `tensors`, {} is a block's number; several modules of ours with the same
    module of theirs stand in it one after another."""
    architecture: str           # "Llama" in LlamaForCausalLM and LlamaForSequenceClassification
    trunk: str                  # prefix of all tensor names except the head's
    shape: dict                 # {field of GPTConfig: key in config.json}
    switches: dict              # {field of GPTConfig: its value in the whole family}
    tensors: dict               # {module of ours: module of theirs}
    defaults: dict              # {key: value where config.json has none}
    only: dict                  # {key: values that model.py can compute}, where config.json has the key
    transposed: bool = False    # whether matrices are stored (in, out)


MLPS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "swiglu"}
MAY_BE_MISSING = ("n_kv_head", "head_dim", "mlp_hidden")        # GPTConfig has defaults for them
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")   # constants in old files, not needed


def read_families():
    """{model_type: Family}. An entry of families.json that is "like" another one states what differs."""
    entries = {}
    for kind, entry in json.loads(Path(__file__).with_name("families.json").read_text("utf-8")).items():
        base = entries.get(entry.pop("like", None), {})
        entries[kind] = base | {key: base.get(key, {}) | x if isinstance(x, dict) else x
                                for key, x in entry.items()}
    return {kind: Family(**entry) for kind, entry in entries.items()}


FAMILIES = read_families()


# -------------------------------------------------------------------------------------- config.json

def read_config(folder):
    """(GPTConfig, Family, head) of a folder's config.json. Raises ValueError naming a setting that does not
    fit."""
    with reading(os.path.join(folder, "config.json"), "a model's config") as source:
        kind = source["model_type"]
        if kind not in FAMILIES:
            raise ValueError(f"models of type {kind!r} are not supported: {', '.join(FAMILIES)} are")
        family = FAMILIES[kind]
        settings = family.defaults | {key: x for key, x in source.items() if x is not None}
        for key in ("rope_scaling", "rope_parameters"):         # as transformers 4 spells it, and 5
            settings |= settings.get(key, {})
        if "quantization_config" in settings:
            raise ValueError("quantised weights are not supported: load the model as it was before")
        for key, values in family.only.items():
            x = settings.get(key, values[0])
            if x not in values:
                raise ValueError(f"{key} {x!r} is not supported, only {', '.join(map(str, values))}")
        shape = {ours: settings[theirs] for ours, theirs in family.shape.items()
                 if theirs in settings or ours not in MAY_BE_MISSING}
        shape |= family.switches | {"mlp": MLPS[shape["mlp"]], "source": source}
        if "llama3" in (settings.get("rope_type"), settings.get("type")):
            shape["rope_scaling"] = {key: settings[key] for key in SCALING}
        if "sliding_window" in settings and settings.get("use_sliding_window", True):
            shape["block_size"] = min(shape["block_size"], settings["sliding_window"])
        return GPTConfig(**shape), family, read_head(settings)


def read_head(settings):
    """"lm" or "scalar", by the class in transformers that would read the folder."""
    name = (settings.get("architectures") or ["ForCausalLM"])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "lm"
    if name.endswith("ForSequenceClassification") and len(settings.get("id2label", "two")) == 1:
        return "scalar"
    raise ValueError(f"{name} is not supported: language models are, and classifiers with one label, which "
                     "are reward models")


def find_family(config):
    """(model_type, Family) as which a network is saved: that of the folder it came from, or else the first
    with its switches. Raises ValueError if there is none."""
    for kind in [*([config.source["model_type"]] if config.source else []), *FAMILIES]:
        switches = FAMILIES[kind].switches
        if all(getattr(config, name) == value for name, value in switches.items()):
            return kind, FAMILIES[kind]
    raise ValueError("no family of Hugging Face models has these switches in its GPTConfig: "
                     "its folder could not be read elsewhere")


def write_config(model, folder, score_bias, tokens):
    """config.json: the shape as the family spells it; everything else as in the folder that it came from."""
    config, is_lm = model.config, model.head_kind == "lm"
    kind, family = find_family(config)
    shape = {theirs: getattr(config, ours) for ours, theirs in family.shape.items()}
    shape[family.shape["mlp"]] = {ours: theirs for theirs, ours in reversed(MLPS.items())}[config.mlp]
    if kind == "gpt2":      # llama.cpp reads the older name; a missing bos would default to GPT-2's own
        shape |= {"n_ctx": config.block_size, "bos_token_id": None}
    if config.rope_scaling:
        shape["rope_scaling"] = {"rope_type": "llama3", **config.rope_scaling}
    name = ("LMHeadModel" if kind == "gpt2" else "ForCausalLM") if is_lm else "ForSequenceClassification"
    settings = {**shape, **(config.source or {}), "model_type": kind, "vocab_size": config.vocab_size,
                "architectures": [family.architecture + name],
                "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."), **tokens}
    for key in ("dtype", "id2label", "label2id", "score_bias"):
        settings.pop(key, None)
    if not is_lm:       # other programs' classifiers have no bias, and ignore the number
        settings |= {"id2label": {"0": "score"}, "label2id": {"score": 0}, "score_bias": score_bias}
    write_json(os.path.join(folder, "config.json"), settings)


# ------------------------------------------------------------------------------------------ tensors

def skeleton(config, head):
    """The network with shapes but without memory for its numbers."""
    with torch.device("meta"):
        return GPT(config, head)


def layout(model, family):
    """{tensor of theirs: [parameters of ours that it holds, one after another]}, for a skeleton."""
    tensors = {}
    for name in model.state_dict():
        module, kind = name.rsplit(".", 1)
        if module == "head":
            theirs = "lm_head" if model.head_kind == "lm" else "score"
        else:
            number = "".join(re.findall(r"\.(\d+)\.", module))         # of the block, if it is in one
            theirs = family.trunk + family.tensors[re.sub(r"\.\d+\.", ".{}.", module)].format(number)
        tensors.setdefault(f"{theirs}.{kind}", []).append(name)
    tensors.pop("score.bias", None)                                 # is in config.json
    return tensors


def is_transposed(name, family):
    return family.transposed and name.endswith(".weight") and ".c_" in name


def load(folder, head=None, mapped=False):
    """The network in a folder: see GPT.load. Raises ValueError saying which file does not fit, and how.

    mapped: leave the weights in the file, in its precision, and read them when they are used. The file must
    not change until then."""
    config, family, saved_head = read_config(folder)
    tensors = load_folder(folder)
    if config.n_layer > len(tensors):                   # before a network of a billion layers is begun
        raise ValueError(f"{folder}/config.json asks for {config.n_layer} layers, "
                         f"but there are {len(tensors)} tensors")
    try:
        model = skeleton(config, head or saved_head)
    except RuntimeError:
        raise ValueError(f"{folder}/config.json: no machine can hold a network of this shape") from None
    new_head, expected, state = model.head_kind != saved_head, model.state_dict(), {}
    if new_head and saved_head == "scalar":
        raise ValueError(f"{folder} is a reward model: it gives scores, not answers")
    for theirs, ours in layout(model, family).items():
        if new_head and ours == ["head.weight"]:
            continue
        if theirs not in tensors:                       # some folders leave the trunk's name out
            theirs = theirs.removeprefix(family.trunk)
        whole, rows = tensors.pop(theirs, None), [expected[name].shape[0] for name in ours]
        x = whole.T if whole is not None and whole.dim() == 2 and is_transposed(theirs, family) else whole
        want, have = (sum(rows), *expected[ours[0]].shape[1:]), "missing" if x is None else tuple(x.shape)
        if have != want:
            raise ValueError(f"{folder}: tensor {theirs} is {have}, config.json asks for {want}")
        pieces = x.split(rows)
        if not mapped:
            pieces = [copy(piece, expected[name].dtype, whole) for name, piece in zip(ours, pieces)]
        state |= zip(ours, pieces)
    heads = ("lm_head.weight", "score.weight") if new_head or config.tied else ()
    unknown = [name for name in tensors if name not in heads and not name.endswith(BUFFERS)]
    if unknown:
        raise ValueError(f"{folder}: tensor {min(unknown)} is unknown")
    if saved_head == model.head_kind == "scalar":
        state["head.bias"] = torch.tensor([config.source.get("score_bias", 0.0)])
    model.load_state_dict(state, strict=False, assign=True)
    if new_head and hasattr(model, "head"):
        model.head.to_empty(device="cpu").apply(model._init)
    return model


def save(model, folder, whole=lambda x: x, write=True, tokens=None):
    """Write a network into a folder, which is made if need be.

    whole: a function that gathers a parameter which is sharded over processes. All processes then call save
    together, and write is true in one of them. tokens: {"eos_token_id": ..., "pad_token_id": ...} for
    config.json, by which other programs know where an answer ends."""
    _, family = find_family(model.config)
    plain = skeleton(model.config, model.head_kind)
    shapes, parts = plain.state_dict(), layout(plain, family)       # shapes: tensors without their numbers
    dtype = max((p.dtype for p in model.parameters() if p.dtype.is_floating_point), key=lambda x: x.itemsize)
    score_bias = whole(model.head.bias).item() if model.head_kind == "scalar" else None

    def value(name):            # of a parameter, on the CPU, with its adapter merged
        module, kind = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        is_matrix = kind == "weight" and isinstance(module, Linear)
        x = module.matrix(whole) if is_matrix else whole(getattr(module, kind))
        return x.detach().to("cpu", dtype)

    def assemble(theirs, value):        # value: a function that gives a parameter of ours by its name
        x = torch.cat([value(name) for name in parts[theirs]])
        return x.T if is_transposed(theirs, family) else x
    if write:
        os.makedirs(folder, exist_ok=True)
        write_config(model, folder, score_bias, tokens or {})
    types = {theirs: (dtype, assemble(theirs, shapes.get).shape) for theirs in parts}
    write_tensors(os.path.join(folder, "model.safetensors"), types, lambda x: assemble(x, value), write)
