"""The memory that plan.py promises is the memory that training takes."""
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import plan
import runtime
from model import GPT

SHAPES = {
    "deep": dict(n_layer=6, n_head=4, n_embd=96, vocab_size=512),
    "wide": dict(n_layer=2, n_head=4, n_embd=256, vocab_size=4096, mlp="gelu"),
    "llama": dict(n_layer=4, n_head=4, n_kv_head=2, n_embd=128, mlp_hidden=384, vocab_size=1024, mlp="swiglu", norm="rmsnorm",
                  positions="rotary", bias=False, tied=False),
}


def peak(step):
    """The most bytes that are allocated at once while step() runs, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    now = most = 0
    for event in sorted((e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_is_within_a_tenth_of_what_training_takes(shape, again):
    cfg = plan.Config(stage="sft", processes=1, micro_batch=6, length=96, learnt=0.5, bytes=4, checkpoint_blocks=again, **SHAPES[shape])
    model = GPT(cfg.shape)
    model.checkpoint_blocks = again
    optimizer = runtime.make_optimizer(model, 1e-3)
    tokens, mask = torch.randint(cfg.vocab_size, (6, 96)), torch.arange(96).expand(6, 96) >= 48

    def micro_batch():
        (-model.logprobs(tokens, mask).sum()).backward()

    micro_batch()                                                   # gradients are there
    optimizer.step()
    state = sum(t.numel() * t.element_size() for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values()))
    promised = plan.plan(cfg)
    assert promised["state"] == pytest.approx(state, rel=0.01)
    assert promised["activations and logits"] == pytest.approx(peak(micro_batch), rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_counts_every_parameter(shape):
    cfg = plan.Config(**SHAPES[shape])
    assert plan.parameters(cfg.shape)[0] == sum(p.numel() for p in GPT(cfg.shape).parameters())
