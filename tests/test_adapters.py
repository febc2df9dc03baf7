"""LoRA: what adapters compute and learn, their folders, and every stage with them."""
import copy
import json
import time

import pytest
import torch
from helpers.start import KINDS, STAGES, assert_close, in_background, in_float64, script
from test_folders import network

import ppo
from data.tokenizer import Tokenizer, learn
from model import GPT, GPTConfig, Linear
from runtime import adapters, models, sharding
from runtime.nf4 import NF4, nf4_levels, pack_layer
from runtime.run import Run
from runtime.safetensors import load_tensors, save_tensors

TOKENS = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(1))
ALL = "q,k,v,out,gate,up,down"


def shaken(name, head="lm", rank=4, targets=ALL):
    """A random small network whose adapters have been trained."""
    torch.manual_seed(0)
    model = network(name, head)
    adapters.adapt(model, rank, 8.0, targets)
    for layer in model.adapted().values():
        torch.nn.init.normal_(layer.B, std=0.3)
    return model


# ------------------------------------------------------------------------------- what they compute

def test_an_adapter_starts_as_nothing_and_adds_its_product():
    torch.manual_seed(0)
    layer, x = Linear(6, 5).double(), torch.randn(7, 6).double()
    before = layer(x)
    layer.add_adapter(2, 8.0)
    layer.double()
    assert torch.equal(layer(x), before) and layer.A.std() > 0.2
    torch.nn.init.normal_(layer.B)
    whole = layer.weight + 8.0 / 2 * layer.B @ layer.A
    torch.testing.assert_close(layer(x), x @ whole.T + layer.bias, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.matrix(), whole, rtol=0, atol=1e-12)
    adapted = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), adapted, rtol=0, atol=1e-12)
    assert set(dict(layer.named_parameters())) == {"weight", "bias"} and layer.weight.requires_grad


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_its_gradient_is_that_of_the_full_matrices_projected_on_a_and_b(name):
    """∂L/∂B = (α/r)·G·Aᵀ and ∂L/∂A = (α/r)·Bᵀ·G, with G that of W: in float64, within 1e-10."""
    model = shaken(name).double()
    full = copy.deepcopy(model)
    for layer in full.adapted().values():
        layer.merge()
    mask = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    for net in (model, full):
        net.logprobs(TOKENS, mask).sum().backward()
    assert len(model.adapted()) == (6 if name == "gpt2" else 7) * model.config.n_layer
    for key, layer in model.adapted().items():
        G = full.get_submodule(key).weight.grad
        torch.testing.assert_close(layer.B.grad, layer.scale * G @ layer.A.T, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.A.grad, layer.scale * layer.B.T @ G, rtol=1e-10, atol=1e-10)
        assert layer.weight.grad is None and G.abs().max() > 1e-3


def test_at_full_rank_the_first_step_is_that_of_full_fine_tuning():
    """With A = 1 and α = r, B is all of ΔW: Adam moves it as it moves W."""
    full = network("llama").double()
    model = copy.deepcopy(full)
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.add_adapter(layer.in_features, float(layer.in_features))
            layer.A = torch.nn.Parameter(torch.eye(layer.in_features))
    model.double()
    for net in (full, model):
        net.logprobs(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool)).sum().backward()
        moved = [getattr(layer, "B" if net is model else "weight")
                 for layer in net.modules() if isinstance(layer, Linear)]
        torch.optim.AdamW(moved, lr=1e-2, weight_decay=0.0).step()
    for (key, layer), theirs in zip(model.adapted().items(), full.modules()):
        torch.testing.assert_close(layer.matrix(), full.get_submodule(key).weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("targets", ["q,v", "down", ALL])
@pytest.mark.parametrize("name, head", [("gpt2", "lm"), ("llama", "scalar"), ("qwen2", "lm")])
def test_only_the_adapters_and_a_scalar_head_are_trained(name, head, targets):
    model = shaken(name, head, 3, targets)
    for key, p in model.named_parameters():
        expected = key.endswith((".A", ".B")) or (head == "scalar" and key.startswith("head."))
        assert p.requires_grad == expected, key
    assert {key.split(".")[-1] for key in model.adapted()} == set(targets.split(",")) & (
        {"q", "k", "v", "out", "up", "down"} if name == "gpt2" else set(ALL.split(",")))
    with pytest.raises(ValueError, match="--lora_targets: 'query' is none of q, k, v"):
        adapters.adapt(model, 3, 1.0, "q,query")
    if name == "gpt2":
        with pytest.raises(ValueError, match="--lora_targets: the model has no gate"):
            adapters.adapt(model, 3, 1.0, "gate")


def test_adapters_of_the_same_shape_go_on_and_others_are_merged():
    model = shaken("llama")
    before, kept = model(TOKENS), [layer.B.clone() for layer in model.adapted().values()]
    adapters.adapt(model, 4, 8.0, ALL)
    assert all(torch.equal(layer.B, B) and layer.scale == 2.0
               for layer, B in zip(model.adapted().values(), kept))
    adapters.adapt(model, 2, 6.0, "q,v")
    torch.testing.assert_close(model(TOKENS), before)
    assert all(layer.scale == 3.0 and len(layer.A) == 2 for layer in model.adapted().values())
    adapters.adapt(model, 0, 6.0, ALL)
    torch.testing.assert_close(model(TOKENS), before)
    assert not model.adapted() and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="--no-merge: the adapters of --init have another shape"):
        adapters.check_alone(model)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_trained_beside_the_adapters(tmp_path, tied):
    GPT(GPTConfig(vocab_size=60, block_size=8, n_layer=1, n_head=2, n_embd=16, tied=tied)).save(tmp_path)
    model = models.load(str(tmp_path), "lm", vocab_size=62)
    adapters.adapt(model, 2, 4.0, ALL)
    assert model.token_embedding.weight.requires_grad and (tied or model.head.weight.requires_grad)
    assert not model.position_embedding.weight.requires_grad
    with pytest.raises(ValueError, match="--no-merge: .* tokens that are new"):
        adapters.check_alone(model)


# ------------------------------------------------------------------------------------- their folders

@pytest.mark.parametrize("targets", ["q,v", "k,down", ALL])
@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3"])
def test_a_folder_of_adapters_comes_back_as_it_was(tmp_path, monkeypatch, name, head, targets):
    monkeypatch.chdir(tmp_path)
    network(name).save("base")
    model = models.load("base", head)
    adapters.adapt(model, 4, 8.0, targets)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    adapters.save(model, "adapters")
    again = models.load("adapters")
    assert again.head_kind == head and again.config.folder == "base"
    for key, layer in model.adapted().items():
        other = again.get_submodule(key)
        assert torch.equal(layer.A, other.A) and torch.equal(layer.B, other.B) and layer.scale == other.scale
    assert len(again.adapted()) == len(model.adapted())
    assert torch.equal(again(TOKENS), model(TOKENS))
    again.save("merged")
    torch.testing.assert_close(models.load("merged")(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    if head == "lm":
        assert len(models.load("adapters", "scalar").adapted()) == len(model.adapted())
    else:
        with pytest.raises(ValueError, match="adapters is a reward model: it gives scores, not answers"):
            models.load("adapters", "lm")


def test_adapters_without_a_tokenizer_have_that_of_their_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network("llama").save("base")
    learn(["What is it? A cat."], 290).save("base")
    model = models.load("base")
    adapters.adapt(model, 2, 4.0, "q")
    adapters.save(model, "adapters")
    assert Tokenizer.load("adapters").ranks == Tokenizer.load("base").ranks
    (tmp_path / "base/tokenizer.json").unlink()
    with pytest.raises(ValueError, match="base: no tokenizer here"):
        Tokenizer.load("adapters")


def test_adapters_that_do_not_fit_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network("llama").save("base")
    model = models.load("base")
    adapters.adapt(model, 4, 8.0, ALL)
    adapters.save(model, "adapters")
    right = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
    for change, said in [({"peft_type": "IA3"}, "only LoRA"), ({"use_dora": True}, "use_dora is not"),
                         ({"bias": "all"}, "without biases"), ({"alora_invocation_tokens": [1]}, "alora"),
                         ({"init_lora_weights": "pissa"}, "changes the base"),
                         ({"base_model_name_or_path": ""}, "is empty"),
                         ({"base_model_name_or_path": "no"}, "no model in"),
                         ({"lora_alpha": None}, "'lora_alpha' is missing")]:
        wrong = {key: x for key, x in (right | change).items() if x is not None}
        (tmp_path / "adapters/adapter_config.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=said) as e:
            models.load("adapters")
        assert "\n" not in str(e.value)
    (tmp_path / "adapters/adapter_config.json").write_text(json.dumps(right))
    tensors = load_tensors("adapters/adapter_model.safetensors")
    network("gpt2").save("base")
    with pytest.raises(ValueError, match="tensor .* is unknown"):
        models.load("adapters")
    assert tensors


def test_adapters_of_a_reward_model_need_its_score(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network("llama").save("base")
    network("llama", "scalar").save("scoring_base")
    for base in ("base", "scoring_base"):
        model = models.load(base, "scalar")
        adapters.adapt(model, 2, 4.0, "q")
        adapters.save(model, base + "_adapters")
        path = f"{base}_adapters/adapter_model.safetensors"
        save_tensors(path, {name: x for name, x in load_tensors(path).items() if "score" not in name})
    assert models.load("scoring_base_adapters").head_kind == "scalar"           # the base has one
    with pytest.raises(ValueError, match="base_adapters/.*: the adapters of a reward model, without its sc"):
        models.load("base_adapters")


def peft_pair(tmp_path, name, head):
    """The base of a family in a folder, and peft's adapters on it, shaken, saved to another."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    network(name, head).save(tmp_path / "base")
    cls, task = {"lm": (transformers.AutoModelForCausalLM, "CAUSAL_LM"),
                 "scalar": (transformers.AutoModelForSequenceClassification, "SEQ_CLS")}[head]
    return peft, cls.from_pretrained(tmp_path / "base", dtype=torch.float32, pad_token_id=0), task


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3"])
def test_peft_loads_our_adapters_and_we_load_its(tmp_path, monkeypatch, name, head):
    monkeypatch.chdir(tmp_path)
    peft, theirs, task = peft_pair(tmp_path, name, head)
    model = models.load("base", head)
    adapters.adapt(model, 4, 8.0, "q,v,up")
    for key, p in model.named_parameters():
        if p.requires_grad and key != "head.bias":
            torch.nn.init.normal_(p, std=0.3)
    adapters.save(model, "ours")
    loaded = peft.PeftModel.from_pretrained(theirs, "ours").eval()

    def outputs(net):
        if head == "lm":
            return net(TOKENS).logits
        return torch.stack([net(TOKENS[:, :t + 1]).logits[:, 0] for t in range(TOKENS.shape[1])], 1)
    with torch.no_grad():
        ours = model(TOKENS) - (model.head.bias if head == "scalar" else 0)
        torch.testing.assert_close(ours, outputs(loaded), rtol=1e-4, atol=1e-4)

        _, theirs, task = peft_pair(tmp_path, name, head)
        modules = ["c_attn", "mlp.c_fc"] if name == "gpt2" else ["q_proj", "down_proj"]
        made = peft.get_peft_model(theirs, peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=modules, task_type=task, fan_in_fan_out=name == "gpt2"))
        for key, p in made.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(p, std=0.3)
        made.save_pretrained("theirs")
        about = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
        about["base_model_name_or_path"] = "base"
        (tmp_path / "theirs/adapter_config.json").write_text(json.dumps(about))
        again = models.load("theirs")
        found = again(TOKENS) - (again.head.bias if head == "scalar" else 0)
        torch.testing.assert_close(found, outputs(made.eval()), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------- the stages with them

LORA = "--lora_rank 4 --lora_alpha 8 --lr 3e-3"
FLAGS = {"sft": f"--init out/sft --evals 1 --batch 64 {LORA}",
         "reward_model": f"--normalize 16 --batch 32 {LORA}", "dpo": LORA,
         "ppo": f"--reward out/lora/reward_model --steps 2 --batch 8 --max_new_tokens 8 {LORA}"}


@pytest.fixture(scope="module")
def lora(chain):
    """Every stage with adapters: the reward model's are saved alone, all others merged."""
    for stage, flags in FLAGS.items():
        alone = "--no-merge" if stage == "reward_model" else ""
        done = script(stage, f"{flags} {alone} --out out/lora/{stage}", chain[0])
        assert done.returncode == 0, done.stderr
    return chain[0]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_adapters(lora, stage, monkeypatch):
    monkeypatch.chdir(lora)
    model, base = models.load(f"out/lora/{stage}"), models.load("out/sft")
    assert bool(model.adapted()) == (stage == "reward_model")
    weights = dict(base.named_parameters())
    for name, p in model.named_parameters():
        is_layer = name.endswith(".weight") and name.split(".")[-2] in adapters.LAYERS
        if stage == "reward_model" and name.endswith(".B"):
            assert p.abs().max() > 0
        elif name in weights and stage != "reward_model":
            assert torch.equal(p, weights[name]) != is_layer, name
    rank = torch.linalg.matrix_rank(model.blocks[0].mlp.up.matrix() - base.blocks[0].mlp.up.weight, rtol=1e-3)
    assert rank == 4


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_with_adapters_ends_in_the_same_weights(lora, stage):
    alone = "--no-merge" if stage == "reward_model" else ""
    flags = f"{FLAGS[stage]} {alone} --save_seconds 0 --out out/lora/killed_{stage}"
    process = in_background(stage, flags, lora)
    checkpoint = lora / f"out/lora/killed_{stage}/resume.safetensors"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert checkpoint.exists(), process.stderr.read()
    base = models.load(str(lora / "out/sft"))
    assert checkpoint.stat().st_size < 1.5 * sum(4 * p.numel() for p in base.parameters())
    done = script(stage, flags, lora)
    assert done.returncode == 0 and "going on after step" in done.stdout, done.stderr
    name = "adapter_model.safetensors" if stage == "reward_model" else "model.safetensors"
    whole, resumed = (lora / f"out/lora/{folder}{stage}/{name}" for folder in ("", "killed_"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_ppo_with_adapters_holds_one_copy_of_the_base(lora, monkeypatch, tmp_path):
    """Policy, reference, critic and reward model: one frozen base, three sets of adapters, two heads."""
    monkeypatch.chdir(lora)
    cfg = ppo.Config(out=str(tmp_path / "run"), lora_rank=4, lora_alpha=8.0, device="cpu", steps=1, warmup=0)
    nets = {"actor": models.load("out/sft", "lm"),
            "reference": models.load("out/sft", "lm").requires_grad_(False),
            "critic": models.load_reward_model("out/lora/reward_model"),
            "reward": models.load_reward_model("out/lora/reward_model").requires_grad_(False)}
    Run(cfg, 1).place(*nets.values())
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for net in nets.values() for p in net.parameters()}
    base = sum(4 * p.numel() for p in nets["reference"].parameters())
    sets = sum(4 * p.numel() for name in ("actor", "critic", "reward")
               for key, p in nets[name].named_parameters() if key.endswith((".A", ".B")) or "head" in key)
    assert sum(held.values()) == base + sets
    actor, critic, reward = (nets[name].blocks[0].mlp.up for name in ("actor", "critic", "reward"))
    assert not torch.equal(actor.A, critic.A) and torch.equal(critic.A, reward.A)
    assert critic.A is not reward.A and critic.A.data_ptr() != reward.A.data_ptr()


def test_a_base_in_bfloat16_is_saved_with_the_precision_of_its_adapters(tmp_path):
    network("llama").bfloat16().save(tmp_path / "base")
    model = models.load(str(tmp_path / "base"))
    adapters.adapt(model, 2, 4.0, ALL)
    sharding.to_device(model, "cpu", {}, bfloat16=True)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    model.save(tmp_path / "again")
    assert load_tensors(str(tmp_path / "again/model.safetensors"))["lm_head.weight"].dtype == torch.float32
    before, after = (models.load(str(tmp_path / name)).float() for name in ("base", "again"))
    assert torch.equal(before(TOKENS), after(TOKENS))


@pytest.fixture(scope="module")
def lora_together(alone):
    """The same stages in float64 by one process and by two, under ddp and fsdp."""
    def commands(where):
        return [f"{stage}.py --device cpu {flags.replace('out/lora', f'out/{where}')} --micro_batch 8 "
                f"{'--no-merge' if stage == 'reward_model' else ''} --out out/{where}/{stage}"
                for stage, flags in FLAGS.items()]
    in_float64(commands("lora_1"), alone)
    for kind in KINDS:
        in_float64([c + f" --parallel {kind}" for c in commands(f"lora_{kind}")], alone, 2)
    return alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_end_in_the_adapters_of_one(lora_together, stage, kind):
    name = "adapter_model.safetensors" if stage == "reward_model" else "model.safetensors"
    ours, theirs = (load_tensors(str(lora_together / f"out/lora_{where}/{stage}/{name}"))
                    for where in (kind, 1))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------ 4 bits (QLoRA)

# Dettmers et al. 2023, appendix E.
NF4_LEVELS = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
              0.7229568362236023, 1.0]


def test_nf4_has_the_papers_levels():
    torch.testing.assert_close(nf4_levels(), torch.tensor(NF4_LEVELS), rtol=0, atol=1e-6)


def plainly_packed(W):
    """The nearest level times the block's largest, number by number; the scales as they are."""
    numbers, out = W.flatten().tolist(), []
    for start in range(0, len(numbers), 64):
        block = numbers[start:start + 64]
        scale = max(abs(x) for x in block)
        out += [min(NF4_LEVELS, key=lambda level: abs(level - x / scale)) * scale for x in block]
    return torch.tensor(out).view(W.shape)


@pytest.mark.parametrize("shape", [(64, 64), (5, 13), (300, 77), (96, 1), (700, 64)])
def test_nf4_packs_to_the_nearest_level_and_its_scales_to_eight_bits(shape):
    torch.manual_seed(0)
    W = 0.05 * torch.randn(shape)
    packed, plain = NF4(W), plainly_packed(W)
    assert packed().shape == W.shape
    # Of a block's scale at most a float8's rounding of its distance from the mean is lost: 1/16 of it.
    blocks = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % 64)).view(-1, 64).abs().amax(1)
    lost = ((blocks - blocks.mean()).abs().max() / 16 + 1e-4 * blocks.max()) / blocks.min()
    assert ((packed() - plain).abs() <= lost * plain.abs() + 1e-7).all()
    if W.numel() > 20000:
        bits = 8 * sum(p.numel() * p.itemsize for p in packed.parameters()) / W.numel()
        assert bits < 4.2 and ((packed() - W).std() / W.std()) < 0.1


def test_a_packed_layer_computes_and_learns_as_one_with_the_unpacked_weight():
    torch.manual_seed(0)
    packed, x = Linear(48, 40), torch.randn(7, 48, requires_grad=True)
    packed.add_adapter(3, 6.0)
    torch.nn.init.normal_(packed.B)
    pack_layer(packed)
    plain = Linear(48, 40)
    plain.add_adapter(3, 6.0)
    plain.load_state_dict({"weight": packed.nf4(), "bias": packed.bias, "A": packed.A, "B": packed.B})
    results = []
    for layer in (packed, plain):
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, layer.A, layer.B])])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(packed.matrix(), plain.matrix())
    packed.merge(), plain.merge()                       # is not packed any more, nor has it an adapter
    for found, expected in ((packed(x), plain(x)), (packed.matrix(), plain.matrix())):
        torch.testing.assert_close(found, expected)
    coarse = Linear(48, 40, bias=False)
    pack_layer(coarse)
    x = x.detach().bfloat16().requires_grad_()
    assert torch.autograd.grad(coarse(x).sum(), x)[0].dtype == torch.bfloat16


def test_the_backward_pass_keeps_no_unpacked_weight():
    layer, kept = Linear(64, 64, bias=False), []
    pack_layer(layer)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert max(kept, default=0) < 64 * 64


def test_nf4_packs_as_bitsandbytes_does():
    functional = pytest.importorskip("bitsandbytes").functional
    torch.manual_seed(0)
    W = 0.05 * torch.randn(256, 192)
    codes, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(codes.flatten(), NF4(W).index)
    once = functional.dequantize_4bit(codes, state)
    torch.testing.assert_close(once, plainly_packed(W), rtol=1e-5, atol=1e-7)
    twice = functional.dequantize_4bit(*functional.quantize_4bit(W, blocksize=64, quant_type="nf4",
                                                                 compress_statistics=True))
    # The second rounding is another one (bitsandbytes has 8-bit levels of its own), and about as good.
    assert (NF4(W)() - once).std() < 0.01 * W.std() and (twice - once).std() < 0.01 * W.std()


def test_ppo_in_four_bits_holds_one_packed_base(lora, monkeypatch, tmp_path):
    monkeypatch.chdir(lora)
    cfg = ppo.Config(out=str(tmp_path / "run"), lora_rank=4, lora_alpha=8.0, nf4=True, device="cpu", steps=1,
                     warmup=0)
    nets = [models.load("out/sft"), models.load("out/sft").requires_grad_(False),
            models.load_reward_model("out/lora/reward_model")]
    Run(cfg, 1).place(*nets)
    assert len({net.blocks[0].mlp.up.nf4.index.data_ptr() for net in nets}) == 1
    assert torch.equal(nets[0](TOKENS), nets[1](TOKENS))            # the adapters add nothing yet


@pytest.mark.parametrize("init", ["out/sft", "out/lora/alone"])
@pytest.mark.parametrize("flags", [{}, {"precision": "bfloat16"}, {"lora_rank": 4, "precision": "bfloat16"},
                                   {"lora_rank": 6, "precision": "bfloat16"}, {"lora_rank": 4, "nf4": True}],
                         ids=str)
def test_a_run_begins_only_where_the_reference_is_the_policy(lora, monkeypatch, tmp_path, init, flags):
    """Also where the policy's adapters, of rank 6, are merged for others of rank 4: then so are the
    reference's, or the two would be rounded differently."""
    monkeypatch.chdir(lora)
    if init == "out/lora/alone":
        model = models.load("out/sft")
        adapters.adapt(model, 6, 32.0, ALL)
        for layer in model.adapted().values():
            torch.nn.init.normal_(layer.B, std=0.1)
        adapters.save(model, init)
        Tokenizer.load("out/sft").save(init)
    cfg = ppo.Config(out=str(tmp_path / "run"), device="cpu", steps=1, warmup=0, **flags)
    run = Run(cfg, 1)
    policy, reference = models.load(init), models.load(init).requires_grad_(False)
    run.place(policy, reference=reference)
    if "nf4" not in flags:
        batch = run.batch([TOKENS[0].tolist()], [1])
        assert torch.equal(run.logprobs(policy, batch), run.logprobs(reference, batch))
    moved = models.load(init).requires_grad_(False)
    moved.norm.weight = torch.nn.Parameter(1.1 * moved.norm.weight, requires_grad=False)
    with pytest.raises(ValueError, match="the reference is not the policy"):
        run.place(models.load(init), reference=moved)


@pytest.fixture(scope="module")
def nf4_together(lora):
    commands = [f"ppo.py --device cpu {FLAGS['ppo']} --nf4 --micro_batch 4 --out out/nf4_{n}" for n in (1, 2)]
    in_float64(commands[:1], lora)
    in_float64([commands[1] + " --parallel ddp"], lora, 2)
    return lora


def test_two_processes_in_four_bits_end_in_the_weights_of_one(nf4_together):
    assert_close(nf4_together / "out/nf4_1", nf4_together / "out/nf4_2")


def test_a_folder_never_holds_the_weights_of_two_runs(lora):
    """The other kind that an earlier run saved there goes, and so does what a killed one left."""
    (lora / "out/both/new").mkdir(parents=True)
    (lora / "out/both/new/model.safetensors").write_text("left")
    for flags, there, gone in (("--no-merge", "adapter_model", "model"),
                               ("--overwrite", "model", "adapter_model")):
        done = script("dpo", f"{FLAGS['dpo']} {flags} --out out/both", lora)
        assert done.returncode == 0, done.stderr
        files = {path.name for path in (lora / "out/both").iterdir()}
        assert f"{there}.safetensors" in files and f"{gone}.safetensors" not in files
    models.load(str(lora / "out/both"))


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_in_four_bits(lora, stage):
    done = script(stage, f"{FLAGS[stage]} --nf4 --out out/nf4_{stage}", lora)
    assert done.returncode == 0, done.stderr
    model, base = (models.load(str(lora / name)) for name in (f"out/nf4_{stage}", "out/sft"))
    ours, theirs = model.blocks[0].mlp.up.weight, NF4(base.blocks[0].mlp.up.weight)()
    assert torch.linalg.matrix_rank(ours - theirs, rtol=1e-3) == 4      # what was trained is what is saved


def test_what_four_bits_cannot_do_is_refused(lora):
    done = script("sft", f"--init out/sft --nf4 --out {lora}/out/refused", lora)
    assert done.returncode != 0 and "with --lora_rank" in done.stderr
    done = script("dpo", f"--lora_rank 2 --nf4 --parallel fsdp --out {lora}/out/refused", lora)
    assert done.returncode != 0 and "--nf4 does not work under fsdp" in done.stderr
    done = script("sft", f"--lora_rank 2 --out {lora}/out/refused", lora)
    assert done.returncode == 2 and "name one with --init" in done.stderr
