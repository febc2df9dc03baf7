"""What the CPU tests prove, once more on one CUDA device: `pytest -m gpu`. (DEVICE=cpu pytest -m gpu tests these tests.)

Tolerances: weights within 1e-4 after ten and more steps in float32, where an optimiser's step is up to 1e-3 long; losses
within 2 % and 0.02 nats in bfloat16."""
import json
import os
import subprocess

import pytest
import torch

import plan
from conftest import script
from model import load_tensors
from test_parallel import FLAGS, THRIFTY, misbehave, torchrun
from test_plan import SHAPES, steps

DEVICE = os.environ.get("DEVICE", "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")]
FLAGS = {stage: flags.replace("--device cpu", f"--device {DEVICE}") + " --lr 1e-3" for stage, flags in FLAGS.items()}
ALL = f"{THRIFTY} --compile"
WAYS = {"ddp": "--parallel ddp", "fsdp": "--parallel fsdp", "fsdp, thrifty": f"--parallel fsdp {THRIFTY}", "fsdp, all": f"--parallel fsdp {ALL}",
        "checkpoint_blocks": "--checkpoint_blocks", "offload": "--offload", "compile": "--compile", "all": ALL}


def train(stage, flags, folder, out):
    """A stage to out, under torchrun if it is told how to go parallel; its metrics."""
    flags = f"{FLAGS[stage]} {flags} --out {out}"
    done = subprocess.run(**torchrun(1, f"{stage}.py", flags.split(), folder)) if "--parallel" in flags else script(stage, flags, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def assert_close(a, b, tolerance=1e-4):
    ours, theirs = (load_tensors(str(path / "model.safetensors")) for path in (a, b))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")


@pytest.fixture(scope="module")
def plain(chain):
    """The chain's folder, in which each stage has run on the device in float32: and the metrics of each."""
    return chain[0], {stage: train(stage, "--precision float32", chain[0], f"out/plain/{stage}") for stage in FLAGS}


@pytest.mark.parametrize("stage", FLAGS)
def test_the_device_does_what_the_cpu_does(plain, stage):
    folder, _ = plain
    done = script(stage, f"{FLAGS[stage]} --device cpu --out out/on_cpu/{stage}", folder)
    assert done.returncode == 0, done.stderr
    assert_close(folder / f"out/plain/{stage}", folder / f"out/on_cpu/{stage}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", FLAGS)
def test_one_device_ends_in_the_same_weights_every_way(plain, stage, way):
    out = f"out/{way.replace(', ', '_')}/{stage}"
    train(stage, f"--precision float32 {WAYS[way]}", plain[0], out)
    assert_close(plain[0] / out, plain[0] / f"out/plain/{stage}")


@pytest.mark.parametrize("way", ["", "--parallel ddp", "--parallel fsdp", f"--parallel fsdp {ALL} --no-gather_at_once"])
@pytest.mark.parametrize("stage", FLAGS)
def test_bfloat16_learns_what_float32_learns(plain, stage, way):
    if stage != "ppo":
        way = way.replace("--no-gather_at_once", "")
    ours, theirs = train(stage, f"--precision bfloat16 {way}", plain[0], f"out/bfloat16/{stage}"), plain[1][stage]
    for a, b in zip(ours, theirs, strict=True):
        if stage == "ppo":                                          # answers differ where a rounding tips a choice
            assert abs(a["approx_kl"]) < 0.05 and a["updates"] == b["updates"]
        else:
            assert a["loss"] == pytest.approx(b["loss"], rel=0.02, abs=0.02)


def test_a_killed_run_goes_on(plain):
    flags = f"{FLAGS['ppo']} --precision float32 --parallel fsdp --save_seconds 0 --out out/killed"
    done = misbehave("update", "kill", 0, flags, plain[0], processes=1, restarts=1)
    assert done.returncode == 0 and "going on after step" in done.stdout, done.stderr[-3000:]
    assert_close(plain[0] / "out/killed", plain[0] / "out/plain/ppo")


@pytest.mark.skipif(DEVICE != "cuda", reason="the CPU does not tell its peak")
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_is_within_a_tenth_of_what_the_device_takes(shape, again):
    cfg = plan.Config(stage="sft", processes=1, batch=16, micro_batch=4, length=256, learnt=0.5, bytes=4, checkpoint_blocks=again, **SHAPES[shape])
    steps(plan.Config(n_layer=1, n_head=1, n_embd=64, micro_batch=1, length=8), DEVICE)          # its libraries' own memory
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    steps(cfg, DEVICE)
    assert plan.plan(cfg)["peak"] == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)
