"""AdamW's groups and the learning rate's schedule."""
import math

import pytest
import torch

from runtime.optimizer import make_optimizer, schedule


@pytest.mark.parametrize("shape,want", [("constant", lambda d: 1.0), ("linear", lambda d: 1 - d),
                                        ("cosine", lambda d: (1 + math.cos(math.pi * d)) / 2)])
def test_schedule_warms_up_in_a_line_and_then_keeps_its_shape(shape, want):
    found = [schedule(s, 25, 5, shape) for s in range(25)]
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5:] == pytest.approx([want(i / 20) for i in range(20)])
    assert all(0 < f <= 1 for f in found)                       # no step is wasted at 0, the last included


def test_schedule_without_warm_up_or_with_nothing_else():
    assert schedule(0, 10, 0, "linear") == 1 and schedule(9, 10, 0, "linear") == pytest.approx(0.1)
    assert [schedule(s, 3, 5, "cosine") for s in range(3)] == pytest.approx([0.2, 0.4, 0.6])
    assert schedule(1, 1, 1, "linear") == 1


def test_only_matrices_decay_and_every_parameter_learns():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = make_optimizer(model, 0.1, weight_decay=0.5)
    learning = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert learning == sum(p.numel() for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(model.parameters(), before):              # AdamW: p ← p − lr·decay·p
        torch.testing.assert_close(p.detach(), old * (0.95 if p.dim() > 1 else 1.0))
