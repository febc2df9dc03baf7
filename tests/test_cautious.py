"""How far a score can be trusted: by slow loops, and by cases that can be worked out on paper."""
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import plainly
from helpers.arrays import near, seeds
from helpers.start import script

from variants import cautious


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def signals(states, known):
    """Of a reward model whose head reads these states."""
    model = SimpleNamespace(last_state=lambda *_: states, head=torch.nn.Linear(states.shape[1], 1))
    return cautious.signals(model, known, {"tokens": None, "lengths": None})


@seeds
def test_heads_learn_as_a_slow_loop_says(seed):
    torch.manual_seed(seed)
    states = torch.randn(6, 3, 4)
    ranks = torch.tensor([[1, 2, 3], [2, 1, 0], [1, 1, 2], [3, 2, 1], [1, 2, 0], [1, 0, 2]])
    margins, sure = torch.rand(6), 0.5 + torch.rand(6) / 2
    found = cautious.fit_heads(states, (ranks, margins, sure), 2, torch.Generator().manual_seed(seed))
    there = [[h for h, r in zip(some, order) if r] for some, order in zip(states.tolist(), ranks.tolist())]
    preferences = [SimpleNamespace(ranks=[r for r in order if r], margin=margin, probability=p)
                   for order, margin, p in zip(ranks.tolist(), margins.tolist(), sure.tolist())]
    expected = plainly.heads(there, preferences, 2, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-9, atol=1e-9)


def test_heads_agree_where_answers_were_compared_and_differ_where_none_was():
    """Answers differ in their first number alone, which is their score: the first wins with σ(r₁ − r₂)."""
    torch.manual_seed(0)
    states = torch.zeros(4000, 2, 3)
    states[:, :, 0] = torch.randn(4000, 2)
    first = torch.rand(4000) < torch.sigmoid(states[:, 0, 0] - states[:, 1, 0])
    ranks = torch.stack([2 - first.long(), 1 + first.long()], dim=1)
    heads = cautious.fit_heads(states, [ranks], 5, torch.Generator().manual_seed(0))
    known = {"heads": heads, "bias": torch.zeros(5), **cautious.fit_gaussian(states.flatten(0, 1))}
    known["threshold"] = torch.tensor(4.0)
    seen, unseen = torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.0, 2, 2]])
    inside, outside = signals(seen, known), signals(unseen, known)
    assert inside["heads"].mean().item() == pytest.approx(1, abs=0.15)
    assert inside["heads"].std() < 0.1 < 0.3 < outside["heads"].std()
    assert inside["distance"] < 1 < 5 < outside["distance"]


@seeds
def test_distance_is_that_of_mahalanobis(seed):
    torch.manual_seed(seed)
    states = torch.randn(400, 3) @ torch.randn(3, 3) + 5
    found = cautious.fit_gaussian(states)
    mean = states.mean(0)
    covariance = sum(torch.outer(h - mean, h - mean) for h in states) / 399
    covariance += 1e-3 * (covariance[0, 0] + covariance[1, 1] + covariance[2, 2]) / 3 * torch.eye(3)
    slow = [math.sqrt((h - mean) @ torch.linalg.solve(covariance, h - mean)) for h in states]
    known = found | {"heads": torch.zeros(1, 3), "bias": torch.zeros(1), "threshold": torch.tensor(2.0)}
    near(signals(states, known)["distance"] * 2, torch.tensor(slow))


def test_distance_counts_a_step_by_how_much_training_answers_vary_in_its_direction():
    """Variances 4 and 1: two to the right is as far as one up."""
    states = torch.tensor([[2.0, 1], [2, -1], [-2, 1], [-2, -1]]) * math.sqrt(3 / 4)
    found = cautious.fit_gaussian(states)
    right, up = (cautious.distance(torch.tensor([x]), found["mean"], found["precision"])
                 for x in ([2.0, 0], [0.0, 1]))
    assert right.item() == pytest.approx(1, abs=2e-3) and up.item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("pessimism, expected", [("none", [5.0, 5.0]), ("deviation", [2 - 0.5, 4 - 0.5 * 2]),
                                                 ("worst", [1.0, 2.0])])
def test_pessimism_by_hand(pessimism, expected):
    batch = {"scores": torch.tensor([5.0, 5.0]), "heads": torch.tensor([[1.0, 2, 3], [2, 4, 6]]),
             "distance": torch.tensor([0.3, 1.0])}
    near(cautious.cautious_scores(batch, pessimism, 0.5, 10.0, least=-3.0), torch.tensor(expected))


def test_the_penalty_begins_at_the_threshold_and_ends_at_the_score_of_an_answer_without_an_end():
    batch = {"scores": torch.tensor([0.0, 0, 0, 0, -5]), "heads": torch.zeros(5, 2),
             "distance": torch.tensor([0.9, 1.5, 2.0, 3.0, 3.0])}
    found = cautious.cautious_scores(batch, "none", 1.0, 2.0, least=-3.0)
    near(found, torch.tensor([0.0, -1.0, -2.0, -3.0, -5.0]))


@pytest.mark.parametrize("flags", ["--precision bfloat16", "--lora_rank 2 --no-merge"])
def test_it_goes_with_bfloat16_and_with_adapters_that_stand_alone(chain, flags):
    out = f"out/cautious_{flags.split('_')[0].strip('-').split()[0]}"
    done = script("variants.cautious", f"--device cpu --steps 2 --batch 8 --max_new_tokens 12 {flags} "
                  f"--heads 3 --pessimism worst --ood_penalty 1 --out {out}", chain[0])
    assert done.returncode == 0 and '"ood": ' in (chain[0] / out / "metrics.jsonl").read_text(), done.stderr
