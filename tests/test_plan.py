"""The memory that plan.py promises is the memory that training takes,
and the bytes are those that are sent."""
import ctypes
import json
import os
import re
import shutil
import sys

import pytest
import torch
from helpers.start import ROOT, in_processes
from torch.profiler import ProfilerActivity, profile

from data.tokenizer import Tokenizer
from lab import plan
from model import GPT
from runtime import flags
from runtime.optimizer import make_optimizer
from runtime.safetensors import load_tensors, save_tensors

SHAPES = {
    "deep": dict(n_layer=12, n_head=4, n_embd=256, vocab_size=1024, mlp="gelu"),
    "wide": dict(n_layer=3, n_head=4, n_embd=512, vocab_size=16384),
    "llama": dict(n_layer=6, n_head=4, n_kv_head=2, n_embd=384, mlp_hidden=1024, vocab_size=8192,
                  mlp="swiglu", norm="rmsnorm", positions="rotary", bias=False, tied=False),
}
# Heads that together are wider than the network, as Qwen 3's small ones are.
WIDE_HEADS = dict(n_layer=6, n_head=8, n_kv_head=4, head_dim=96, n_embd=256, mlp_hidden=512, vocab_size=2048,
                  mlp="swiglu", norm="rmsnorm", positions="rotary", bias=False)
PROMPT = "When is a good time to go to bed and what is the capital of France and what colour is a cat?"
ANSWERS = ("Paris is the capital of France, and eight is a good time.",
           "London is the capital of Spain, and nine is a good time.")
FLAGS = {                                           # two and more micro-batches of four rows in each process
    "sft": "--data data.jsonl --init {shape}/lm --batch 16 --micro_batch 4 --evals 1",
    "reward_model": "--data data.jsonl --init {shape}/lm --batch 8 --micro_batch 4 --normalize 64",
    "dpo": "--data data.jsonl --init {shape}/lm --batch 8 --micro_batch 4",
    "ppo": "--data data.jsonl --init {shape}/lm --reward {shape}/scalar --batch 16 --micro_batch 4 --steps 2 "
           "--update_kl 0 --max_new_tokens {n}",
}


def steps(cfg, device):
    """Two optimiser steps, the second of two forward passes, as sft.py takes them."""
    model = GPT(cfg.shape).to(device)
    model.checkpoint_blocks = cfg.checkpoint_blocks
    optimizer = make_optimizer(model, 1e-3)
    tokens = torch.randint(cfg.vocab_size, (cfg.micro_batch, cfg.length), device=device)
    mask = torch.arange(cfg.length, device=device).expand_as(tokens) >= (1 - cfg.learnt) * cfg.length
    for forwards in (1, 2):
        for _ in range(forwards):
            (-model.logprobs(tokens, mask).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def inputs(chain, tmp_path_factory):
    """A folder with networks of all shapes and data whose rows are all as long: its path, and the tokens of
    prompt and answer."""
    folder, tokenizer = tmp_path_factory.mktemp("plan"), Tokenizer.load(str(chain[0] / "out/world"))
    for name, shape in SHAPES.items():
        for head in ("lm", "scalar"):
            GPT(plan.Config(length=128, **shape).shape, head).save(str(folder / name / head))
            tokenizer.save(str(folder / name / head))
    shutil.copytree(folder / "wide", folder / "coarse")
    for head in ("lm", "scalar"):
        path = str(folder / "coarse" / head / "model.safetensors")
        save_tensors(path, {name: x.bfloat16() for name, x in load_tensors(path).items()})
    record = {"prompt": PROMPT, "response": ANSWERS[0], "chosen": ANSWERS[0], "rejected": ANSWERS[1]}
    (folder / "data.jsonl").write_text((json.dumps(record) + "\n") * 35)        # three are held out
    prompt = tokenizer.prompt([{"role": "user", "content": PROMPT}])
    return folder, len(prompt), len(tokenizer.response(ANSWERS[0]))


def measured(inputs, shape, stage, processes, kind, flags="", networks=None):
    """What plan.py is asked, and [(most bytes held while loading, and while training, bytes sent per step) of
    each process] of a run of a stage. networks: their folder, if not the shape's."""
    folder, prompt, answer = inputs
    always = FLAGS[stage].format(shape=networks or shape, n=answer)
    flags = f"{always} {flags} --parallel {kind} --out out/{shape}/{stage}"
    arguments = [f"{stage}.py", *flags.split(), "--device", "cpu", "--save_seconds", "1e6", "--no-resume"]
    done = in_processes(processes if processes > 1 else 0, "tests/helpers/peak_bytes.py", arguments, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    cfg = plan.Config(stage=stage, processes=processes, parallel=kind, batch=16, micro_batch=4,
                      length=prompt + answer, learnt=answer / (prompt + answer),
                      bytes=2 if "bfloat16" in flags else 4, normalize=64,
                      checkpoint_blocks="--checkpoint_blocks" in flags, **SHAPES[shape])
    found = re.findall(r"process \d: loading (\d+), peak (\d+), sent (\d+)", done.stderr)
    assert len(found) == processes
    return cfg, [tuple(map(int, each)) for each in found]


has_glibc = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")
glibc = pytest.mark.skipif(not has_glibc, reason="asks glibc for its memory")
FAST = "wide", "sft", 2, "fsdp", ""
SLOW = [case for shape in SHAPES for stage in FLAGS
        for processes, kind in ((1, "ddp"), (2, "ddp"), (2, "fsdp"))
        for flags in ("", "--checkpoint_blocks")[:1 + (stage in ("sft", "ppo"))]
        if (case := (shape, stage, processes, kind, flags)) != FAST]
SLOW += [(*case, "--precision bfloat16") for case in (      # CPUs without it are slow
    ("deep", "sft", 2, "fsdp"), ("wide", "sft", 2, "fsdp"), ("llama", "sft", 1, "ddp"),
    ("llama", "sft", 2, "ddp"), ("llama", "dpo", 2, "fsdp"), ("llama", "ppo", 2, "fsdp"))]
CASES = [FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@glibc
@pytest.mark.parametrize("shape, stage, processes, kind, flags", CASES)
def test_a_plan_is_within_a_tenth_of_what_a_stage_takes_and_sends(
        inputs, shape, stage, processes, kind, flags):
    cfg, found = measured(inputs, shape, stage, processes, kind, flags)
    promised = plan.Plan(cfg).numbers()
    weights = sum(4 * plan.network(cfg.shape, head).all for head in plan.TRAINED[stage] + plan.FROZEN[stage])
    for loading, peak, sent in found:
        if kind == "fsdp":                                          # no process ever holds a network whole
            assert loading < weights / processes + 8e6
        assert promised["peak"] == pytest.approx(peak, rel=0.1)
        assert promised["sent per step"] == pytest.approx(sent, rel=0.02)


@pytest.mark.slow
@glibc
def test_a_file_of_bfloat16_is_not_unrolled_by_processes_that_share_it(inputs):
    cfg, found = measured(inputs, "wide", "ppo", 2, "fsdp", networks="coarse")
    weights = sum(4 * plan.network(cfg.shape, head).all for head in plan.TRAINED["ppo"] + plan.FROZEN["ppo"])
    embedding = 4 * cfg.vocab_size * cfg.n_embd             # the largest piece, which is whole for a moment
    assert all(loading < weights / 2 + embedding + 8e6 for loading, _, _ in found), (weights, found)


def peak(function):
    """The most bytes that tensors fill at once while a function runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    now = most = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), WIDE_HEADS], ids=[*SHAPES, "wide heads"])
def test_a_plan_is_within_a_tenth_of_what_tensors_fill(shape, again):
    cfg = plan.Config(stage="sft", processes=1, batch=8, micro_batch=4, length=128, bytes=4,
                      checkpoint_blocks=again, **shape)
    assert plan.Plan(cfg).numbers()["peak"] == pytest.approx(peak(lambda: steps(cfg, "cpu")), rel=0.1)


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), WIDE_HEADS, dict(qk_norm=True, bias=False)])
def test_a_plan_counts_every_parameter(shape, head):
    cfg = plan.Config(**shape)
    assert plan.network(cfg.shape, head).all == sum(p.numel() for p in GPT(cfg.shape, head).parameters())


GB, TB = 1e9, 1e12
LLAMA = dict(mlp="swiglu", norm="rmsnorm", positions="rotary", bias=False, n_kv_head=8, vocab_size=128256)
MODELS = {
    "GPT-2 small, 124 M": dict(),
    "GPT-2 XL, 1.6 B": dict(n_layer=48, n_head=25, n_embd=1600),
    "Llama 3.2 3 B": dict(LLAMA, n_layer=28, n_head=24, n_embd=3072, mlp_hidden=8192),
    "Llama 3.1 8 B": dict(LLAMA, n_layer=32, n_head=32, n_embd=4096, mlp_hidden=14336, tied=False),
    "Llama 3.1 70 B": dict(LLAMA, n_layer=80, n_head=64, n_embd=8192, mlp_hidden=28672, tied=False),
}


def in_words(size):
    if size >= 10 * TB:
        return f"{size / TB:.0f} TB"
    return f"{size / GB:.0f} GB" if size >= 10 * GB else f"{size / GB:.1f} GB"


def table(counts=(1, 8, 16, 64)):
    """Lines of Markdown for SFT and PPO under fsdp, in bfloat16 with recomputed blocks: what each device
    holds, and what it sends per step on eight of them. Eight sequences of 1,024 tokens per device, one per
    forward pass; the policy is gathered at once to sample if that is less than 40 GB."""
    heads = " | ".join("1 GPU" if n == 1 else f"{n} GPUs" for n in counts)
    lines = [f"| model | stage | {heads} | each of 8 sends per step |", "|---" * (3 + len(counts)) + "|"]
    for name, shape in MODELS.items():
        for stage in ("sft", "ppo"):
            plans = {}
            for n in counts:
                cfg = plan.Config(stage, n, batch=8 * n, micro_batch=1, checkpoint_blocks=True, **shape)
                cfg.gather_at_once = plan.network(cfg.shape).all * cfg.bytes < 40 * GB
                plans[n] = plan.Plan(cfg).numbers()
            peaks = " | ".join(in_words(plans[n]["peak"]) for n in counts)
            lines.append(f"| {name} | {stage} | {peaks} | {in_words(plans[8]['sent per step'])} |")
    return lines


def test_the_table_of_the_docs_is_what_the_planner_computes():
    with open(os.path.join(ROOT, "docs/gpus.md"), encoding="utf-8") as f:
        assert "\n".join(table()) in f.read()


def test_a_flag_of_the_shape_is_refused_in_one_line(capsys):
    for argv, said in ((["--mlp", "relu"], "argument --mlp: invalid choice: 'relu'"),
                       (["--n_layer", "0"], "GPTConfig.n_layer must be"),
                       (["--head_dim", "-1"], "GPTConfig.head_dim must be")):
        with pytest.raises(SystemExit) as e:
            flags.parse(plan.Config, "", argv)
        error = capsys.readouterr().err
        assert e.value.code == 2 and said in error and error.count("\n") == 1
