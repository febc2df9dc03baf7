"""Model folders: what is saved is loaded bit for bit, here and by transformers, and all else is refused."""
import json
import math
import os
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from helpers.start import ROOT
from test_model import SHAPES, V, make

from model import GPT, GPTConfig, rotation
from runtime.safetensors import load_tensors, save_tensors


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("shape", SHAPES)
def test_save_and_load_give_back_every_bit(tmp_path, shape, head):
    model = make(shape, head=head).float()
    folder = tmp_path / "new" / "folder"
    model.save(folder)
    loaded = GPT.load(folder)
    assert loaded.config == model.config and loaded.head_kind == head
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scalar_head_on_a_language_model_keeps_the_trunk(tmp_path, shape):
    model = make(shape).float()
    model.save(tmp_path)
    critic = GPT.load(tmp_path, head="scalar")
    tokens = torch.randint(V, (2, 7))
    assert torch.equal(critic.hidden(tokens), model.hidden(tokens)) and critic(tokens).shape == (2, 7)
    assert critic.head.weight.shape == (1, 16)
    critic.save(tmp_path)
    assert torch.equal(GPT.load(tmp_path).head.weight, critic.head.weight)
    with pytest.raises(ValueError, match="is a reward model: it gives scores, not answers"):
        GPT.load(tmp_path, head="lm")


def test_a_new_scalar_head_gives_random_states_scores_of_standard_deviation_one(tmp_path):
    torch.manual_seed(8)
    GPT(GPTConfig(V, 8, 1, 4, 1024)).save(tmp_path)
    head = GPT.load(tmp_path, head="scalar").head
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.1) and not head.bias.any()


def test_a_loaded_model_does_not_share_memory_and_can_be_trained(tmp_path):
    make("gpt2").float().save(tmp_path)
    a, b = GPT.load(tmp_path), GPT.load(tmp_path)
    with torch.no_grad():
        a.token_embedding.weight.add_(1)
    assert not torch.equal(a.token_embedding.weight, b.token_embedding.weight)
    b(torch.zeros(1, 2, dtype=torch.long)).sum().backward()


def test_the_safetensors_package_reads_our_file_and_we_read_its_file(tmp_path):
    theirs = pytest.importorskip("safetensors.torch")
    model = make("llama").float()
    model.save(tmp_path)
    found = theirs.load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], model.token_embedding.weight)
    theirs.save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in GPT.load(tmp_path).state_dict().items())


def refused(folder, match):
    with pytest.raises(ValueError, match=match) as e:
        GPT.load(folder)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_tensor_file_is_one_line(tmp_path, keep):
    make("gpt2").save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, "model.safetensors")


@pytest.mark.parametrize("body", [
    b"PK\x03\x04 a zip, as torch.save writes them",
    struct.pack("<Q", 4) + b"\xff\xfe\x00\x01",
    struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 9) + b'{"a": 12}',
    struct.pack("<Q", 63) + b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}  ' + b"0000",
    struct.pack("<Q", 64) + b'{"a": {"dtype": "U8", "shape": [-2, -2], "data_offsets":[0, 4]}}' + b"0000"])
def test_a_foreign_tensor_file_is_one_line(tmp_path, body):
    make("gpt2").save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(body)
    refused(tmp_path, "not a readable safetensors file")


def test_tensors_that_do_not_fit_the_config_are_named(tmp_path):
    make("gpt2").float().save(tmp_path)
    path = str(tmp_path / "model.safetensors")
    tensors = {name: x.clone() for name, x in load_tensors(path).items()}
    for change, match in (({"transformer.ln_f.weight": torch.ones(7)}, r"ln_f.weight is \(7,\).*\(16,\)"),
                          ({"transformer.h.0.attn.c_attn.weight": torch.ones(3)}, r"c_attn.weight is \(3,\)"),
                          ({"stray": torch.ones(1)}, "stray is unknown")):
        save_tensors(path, tensors | change)
        refused(tmp_path, match)
    tensors.pop("transformer.ln_f.bias")
    save_tensors(path, tensors)
    refused(tmp_path, "ln_f.bias is missing")


@pytest.mark.parametrize("change,match", [
    ({"n_layer": 0}, "n_layer"), ({"n_layer": None}, "n_layer"), ({"n_positions": "many"}, "block_size"),
    ({"model_type": "gemma9"}, "models of type 'gemma9' are not supported: gpt2, llama"),
    ({"architectures": ["GPT2DoubleHeadsModel"]}, "GPT2DoubleHeadsModel"),
    ({"architectures": ["GPT2ForSequenceClassification"]}, "GPT2ForSequenceClassification is not supported"),
    ({"activation_function": "relu"}, "activation_function 'relu' is not supported"),
    ({"activation_function": "silu"}, "activation_function 'silu'"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supported"),
    ({"quantization_config": {"bits": 4}}, "quantised")])
def test_a_config_file_that_cannot_be_names_its_field(tmp_path, change, match):
    make("gpt2").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    refused(tmp_path, match)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_a_foreign_config_file_is_one_line(tmp_path, text):
    make("gpt2").save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "not a model's config")


@pytest.mark.parametrize("field", ["model_type", "vocab_size", "n_positions", "n_layer", "n_head", "n_embd"])
def test_a_config_without_a_field_names_it(tmp_path, field):
    make("gpt2").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop(field)
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, field)


@pytest.mark.parametrize("change", [
    {"n_layer": 10 ** 9}, {"vocab_size": 10 ** 15}, {"n_positions": 2 ** 62, "vocab_size": 2 ** 62},
    {"n_inner": 10 ** 12}, {"n_embd": 2 ** 40, "n_head": 1}])
def test_a_config_that_asks_for_the_moon_is_refused_without_reaching_for_it(tmp_path, change):
    make("gpt2").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    refused(tmp_path, "n_layer|config.json")


class Bomb:
    """What a pickle can do: run a command when it is read."""
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_hostile_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make("gpt2").save(tmp_path / "model")
    torch.save({"norm.bias": Bomb()}, tmp_path / "bomb.pt")
    for bomb in (pickle.dumps(Bomb()), (tmp_path / "bomb.pt").read_bytes()):
        for name in ("model.safetensors", "config.json"):
            good = (tmp_path / "model" / name).read_bytes()
            (tmp_path / "model" / name).write_bytes(bomb)
            refused(tmp_path / "model", name)
            (tmp_path / "model" / name).write_bytes(good)
    assert not (tmp_path / "exploded").exists()


def test_a_missing_folder_or_tensor_file_is_one_line(tmp_path):
    refused(tmp_path / "nowhere", "config.json")
    make("gpt2").save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "model.safetensors")


# ------------------------------------------------------------------------- families, and transformers

SHAPE = dict(vocab_size=97, block_size=80, n_layer=2, n_head=4, n_embd=32, mlp_hidden=48)
LLAMA = dict(positions="rotary", norm="rmsnorm", norm_eps=1e-6, mlp="swiglu", bias=False, n_kv_head=2)
SCALED = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
MODELS = {
    "gpt2": dict(),
    "gpt2-gelu-untied": dict(mlp="gelu", tied=False),
    "llama": dict(LLAMA, tied=False),
    "llama-tied-scaled": dict(LLAMA, rope_theta=500000.0, rope_scaling=SCALED),
    "mistral": dict(LLAMA, tied=False, head_dim=16, source={"model_type": "mistral", "sliding_window": None}),
    "qwen2": dict(LLAMA, qkv_bias=True),
    "qwen3": dict(LLAMA, qk_norm=True, head_dim=16, tied=False),
}


def network(name, head="lm"):
    """A random network of a family, whose distributions are far from uniform."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | MODELS[name]), head)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("name", MODELS)
def test_every_family_comes_back_bit_for_bit_as_the_same_family(tmp_path, name, head):
    model = network(name, head)
    model.save(tmp_path / "a")
    loaded = GPT.load(tmp_path / "a")
    assert loaded.config == model.config and loaded.head_kind == head
    assert all(torch.equal(x, model.state_dict()[k]) for k, x in loaded.state_dict().items())
    loaded.save(tmp_path / "b")
    first, second = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert first == second
    about = [json.loads((tmp_path / f"{x}/config.json").read_text()) for x in "ab"]
    assert about[0] == about[1] and about[0]["model_type"] == name.split("-")[0]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_llamas_tensors_have_the_names_that_transformers_gives_them(tmp_path, name):
    model = network(name)
    model.save(tmp_path)
    block = model.blocks[1]
    a, m = block.attention, block.mlp
    modules = {"self_attn.q_proj": a.q, "self_attn.k_proj": a.k, "self_attn.v_proj": a.v,
               "self_attn.o_proj": a.out, "mlp.gate_proj": m.gate, "mlp.up_proj": m.up,
               "mlp.down_proj": m.down, "input_layernorm": block.norm1,
               "post_attention_layernorm": block.norm2}
    if name == "qwen3":
        modules |= {"self_attn.q_norm": a.q_norm, "self_attn.k_norm": a.k_norm}
    want = {f"model.layers.1.{theirs}.{kind}": x for theirs, module in modules.items()
            for kind, x in module.state_dict().items()}
    want["model.embed_tokens.weight"] = model.token_embedding.weight
    want["model.norm.weight"] = model.norm.weight
    if not model.config.tied:
        want["lm_head.weight"] = model.head.weight
    found = load_tensors(str(tmp_path / "model.safetensors"))
    assert {key for key in found if "layers.0." not in key} == want.keys()
    assert all(torch.equal(found[key], x) for key, x in want.items())
    assert ("model.layers.1.self_attn.q_proj.bias" in found) == (name == "qwen2")


def test_gpt2s_tensors_have_the_names_and_the_shapes_that_transformers_gives_them(tmp_path):
    model = network("gpt2", "scalar")
    model.save(tmp_path)
    block = model.blocks[0]
    qkv = [block.attention.q, block.attention.k, block.attention.v]
    want = {"transformer.wte.weight": model.token_embedding.weight, "score.weight": model.head.weight,
            "transformer.wpe.weight": model.position_embedding.weight}
    for theirs, module in (("ln_f", model.norm), ("h.0.ln_1", block.norm1), ("h.0.ln_2", block.norm2)):
        want |= {f"transformer.{theirs}.{kind}": x for kind, x in module.state_dict().items()}
    for theirs, modules in (("attn.c_attn", qkv), ("attn.c_proj", [block.attention.out]),
                            ("mlp.c_fc", [block.mlp.up]), ("mlp.c_proj", [block.mlp.down])):
        want[f"transformer.h.0.{theirs}.weight"] = torch.cat([m.weight for m in modules]).T
        want[f"transformer.h.0.{theirs}.bias"] = torch.cat([m.bias for m in modules])
    found = load_tensors(str(tmp_path / "model.safetensors"))
    assert {key for key in found if "h.1." not in key} == want.keys()
    assert all(torch.equal(found[key], x) for key, x in want.items())
    assert json.loads((tmp_path / "config.json").read_text())["score_bias"] == model.head.bias.item()


def test_what_a_config_says_beyond_the_shape_stays(tmp_path):
    network("llama").save(tmp_path / "a")
    path = tmp_path / "a/config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"bos_token_id": 5, "torch_dtype": "bfloat16"}))
    GPT.load(tmp_path / "a").save(tmp_path / "b", tokens={"eos_token_id": 7})
    about = json.loads((tmp_path / "b/config.json").read_text())
    assert (about["bos_token_id"], about["eos_token_id"], about["torch_dtype"]) == (5, 7, "float32")


def test_gpt2s_config_has_what_llama_cpp_asks_for_and_no_token_of_gpt2s_own(tmp_path):
    network("gpt2").save(tmp_path / "a")
    path = tmp_path / "a/config.json"
    about = json.loads(path.read_text())
    assert (about["n_ctx"], about["bos_token_id"]) == (80, None)    # missing, it would be 50256 of 97
    path.write_text(json.dumps(about | {"bos_token_id": 5}))
    GPT.load(tmp_path / "a").save(tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text())["bos_token_id"] == 5


def test_a_transformers_5_config_and_a_config_without_its_optional_fields_are_read(tmp_path):
    model = network("llama-tied-scaled")
    model.save(tmp_path)
    path = tmp_path / "config.json"
    about = json.loads(path.read_text())
    rope = about.pop("rope_scaling") | {"rope_theta": about.pop("rope_theta")}
    for optional in ("head_dim", "torch_dtype"):
        about.pop(optional)
    path.write_text(json.dumps(about | {"rope_parameters": rope, "architectures": None}))
    loaded = GPT.load(tmp_path)
    assert loaded.config == model.config
    tokens = torch.randint(97, (2, 40))
    assert torch.equal(loaded(tokens), model(tokens))


def test_shards_with_an_index_and_names_without_the_trunks_are_read(tmp_path):
    model = network("gpt2")
    model.save(tmp_path)
    tensors = load_tensors(str(tmp_path / "model.safetensors"))
    tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)                     # a buffer of old files
    os.remove(tmp_path / "model.safetensors")
    names, index = sorted(tensors), {}
    for i, some in enumerate((names[:9], names[9:])):
        save_tensors(str(tmp_path / f"model-{i}.safetensors"), {name: tensors[name] for name in some})
        index |= {name: f"model-{i}.safetensors" for name in some}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    loaded = GPT.load(tmp_path)
    assert all(torch.equal(x, model.state_dict()[k]) for k, x in loaded.state_dict().items())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x"}}))
    refused(tmp_path, "beside its index")


LOAD = """
import re, sys
from model import GPT

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
GPT.load(sys.argv[1])                               # what torch loads of itself the first time
before = peak()
model = GPT.load(sys.argv[2])
print((peak() - before) / sum(4 * p.numel() for p in model.parameters()))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(sys.platform != "linux", reason="has no /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, dtype):
    """At most 1.2 times as much, for 220 MB in float32, whatever the file's type."""
    GPT(GPTConfig(vocab_size=256, block_size=16, n_layer=1, n_head=1, n_embd=16)).save(tmp_path / "small")
    large = GPT(GPTConfig(vocab_size=20000, block_size=16, n_layer=3, n_head=4, n_embd=1024)).to(dtype)
    large.save(tmp_path / "large")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert 0.95 < float(done.stdout) < 1.2


def test_pickled_weights_are_refused_with_what_converts_them(tmp_path):
    network("llama").save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "save_pretrained")


@pytest.mark.parametrize("change,match", [
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not"),
    ({"attention_bias": True}, "attention_bias True"), ({"mlp_bias": True}, "mlp_bias True")])
def test_what_this_network_would_compute_otherwise_is_refused_by_name(tmp_path, change, match):
    network("llama").save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(tmp_path, match)


def test_a_sequence_that_reaches_past_a_sliding_window_is_refused(tmp_path):
    network("mistral").save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 10}))
    model = GPT.load(tmp_path)
    model(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match="11 tokens is longer than block_size 10"):
        model(torch.zeros(1, 11, dtype=torch.int64))


def test_switches_of_no_family_cannot_be_saved(tmp_path):
    model = GPT(GPTConfig(V, 8, 1, 1, 4, positions="rotary"))
    with pytest.raises(ValueError, match="no family"):
        model.save(tmp_path)


def exact_rms_norm(norm):
    """transformers computes it in float32 whatever the network is in; here in the network's own precision."""
    def forward(x):
        return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return forward


@pytest.mark.parametrize("name", MODELS)
def test_logits_scores_and_greedy_answers_are_those_of_transformers(tmp_path, name):
    """In float32 within 1e-4, in float64 within 1e-9; transformers misses no tensor and knows all."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    tokens, lengths = torch.randint(1, 97, (4, 20)), torch.tensor([20, 3, 11, 7])
    for head, cls in (("lm", "AutoModelForCausalLM"), ("scalar", "AutoModelForSequenceClassification")):
        model = network(name, head)
        model.save(tmp_path / head, tokens={"pad_token_id": 0, "eos_token_id": 96})
        theirs, about = getattr(transformers, cls).from_pretrained(
            tmp_path / head, output_loading_info=True, dtype=torch.float32, attn_implementation="sdpa")
        assert not (about["missing_keys"] or about["unexpected_keys"] or about["mismatched_keys"])
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
        back = GPT.load(tmp_path / "theirs").state_dict()
        assert all(torch.equal(x, back[k]) for k, x in model.state_dict().items() if k != "head.bias")
        theirs.eval()
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
            model, theirs = model.to(dtype), theirs.to(dtype)
            if dtype == torch.float64:
                for module in theirs.modules():
                    if "RMSNorm" in type(module).__name__:
                        module.forward = exact_rms_norm(module)
                    if hasattr(module, "inv_freq"):
                        module.forward = exact_rotation(model)
            with torch.no_grad():                       # ours: rows of all lengths in one batch
                batch = model(tokens) if head == "lm" else model.score(tokens, lengths)
            for row, n, found in zip(tokens, lengths.tolist(), batch):
                with torch.no_grad():
                    want = theirs(row[None, :n]).logits[0]
                if head == "scalar":
                    found, want = found[None], want + model.head.bias
                torch.testing.assert_close(found[:n], want, rtol=0, atol=tolerance)
    model = network(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32)
    found, _, _ = model.generate(tokens[:, :8], torch.tensor([8, 3, 5, 7]), 64, temperature=0)
    for row, n in zip(found, (8, 3, 5, 7)):
        want = theirs.generate(row[None, :n], max_new_tokens=64, do_sample=False, eos_token_id=None,
                               attention_mask=torch.ones(1, n, dtype=torch.int64))
        assert torch.equal(row[:n + 64], want[0])


def exact_rotation(model):
    def forward(x, position_ids):
        cos, sin = rotation(model.config, position_ids[0], x.dtype)
        return torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None]
    return forward
