"""The reward model's losses, and the stage around them."""
import math

import pytest
import torch
from helpers import plainly
from helpers.arrays import near, nll, seeds

import reward_model
from data import annotators, loading
from data.tokenizer import Tokenizer
from model import GPT
from reward_model import pairwise_loss, ranking_loss


@seeds
def test_pairwise_loss_is_bradley_terry_with_a_margin(seed):
    torch.manual_seed(seed)
    chosen, rejected, margin = torch.randn(3, 6).double()
    gaps = [c - r for c, r in zip(chosen.tolist(), rejected.tolist())]
    near(pairwise_loss(chosen, rejected), sum(nll(gap) for gap in gaps) / 6)
    near(pairwise_loss(chosen, rejected, 0.7), sum(nll(gap - 0.7) for gap in gaps) / 6)
    near(pairwise_loss(chosen, rejected, margin),
         sum(nll(gap - m) for gap, m in zip(gaps, margin.tolist())) / 6)
    near(pairwise_loss(chosen, chosen), math.log(2))


def test_pairwise_loss_and_its_gradient_are_finite_for_hopeless_pairs():
    chosen = torch.tensor([-1e4, 1e4]).double().requires_grad_()
    loss = pairwise_loss(chosen, torch.zeros(2).double())
    loss.backward()
    near(loss, 5e3)
    near(chosen.grad, [-0.5, 0.0])


@seeds
def test_ranking_loss_with_two_answers_is_the_pairwise_loss(seed):
    torch.manual_seed(seed)
    scores, margin = torch.randn(6, 2).double(), torch.rand(6).double()
    ranks = torch.tensor([[1, 2], [2, 1], [1, 2], [1, 5], [3, 2], [2, 4]])
    best = (ranks[:, 0] > ranks[:, 1]).long()
    chosen, rejected = scores[range(6), best], scores[range(6), 1 - best]
    near(ranking_loss(scores, ranks), pairwise_loss(chosen, rejected))
    near(ranking_loss(scores, ranks, margin), pairwise_loss(chosen, rejected, margin))


@seeds
@pytest.mark.parametrize("with_margin", [True, False])
def test_ranking_loss_is_the_mean_per_prompt_over_ordered_pairs_without_ties_and_absent_answers(
        seed, with_margin):
    torch.manual_seed(seed)
    scores, margin = torch.randn(7, 5).double(), torch.rand(7).double()
    ranks = torch.randint(0, 4, (7, 5))                         # 0: not there
    ranks[:, 0], ranks[:, 3] = 1, 2
    total = 0.0
    for b in range(7):
        pairs = [nll(scores[b, i].item() - scores[b, j].item() - (margin[b].item() if with_margin else 0))
                 for i in range(5) for j in range(5) if 0 < ranks[b, i] < ranks[b, j]]
        total += sum(pairs) / len(pairs)
    scores = torch.where(ranks > 0, scores, torch.randn_like(scores) * 1e3).requires_grad_()
    loss = ranking_loss(scores, ranks, margin if with_margin else None)
    near(loss, total / 7)
    loss.backward()
    assert (scores.grad[ranks == 0] == 0).all() and (scores.grad[:, 0] < 0).all()
    near(scores.grad.sum(1), torch.zeros(7))                    # only differences count


@seeds
def test_a_soft_label_weighs_the_losses_of_both_labels(seed):
    """And is fitted where the score's difference is its log-odds."""
    torch.manual_seed(seed)
    scores, margin, p = torch.randn(5, 2).double(), torch.rand(5).double(), torch.rand(5).double()
    ranks = torch.tensor([[1, 2]] * 5)
    want = [q * nll(a - b - m) + (1 - q) * nll(b - a - m)
            for (a, b), m, q in zip(scores.tolist(), margin.tolist(), p.tolist())]
    near(ranking_loss(scores, ranks, margin, p), sum(want) / 5)
    fitted = torch.stack([p.logit(), torch.zeros(5)], dim=1).requires_grad_()
    ranking_loss(fitted, ranks, probability=p).backward()
    near(fitted.grad, torch.zeros(5, 2))


def test_ranking_loss_ignores_nan_scores_of_absent_answers():
    scores, ranks = torch.tensor([[1.0, 0.5, float("nan")]]).double(), torch.tensor([[1, 2, 0]])
    near(ranking_loss(scores, ranks), nll(0.5))


SHARED = dict(normalize=12)
CASES = [                                       # each flag of the stage is set in one of them, or in SHARED
    dict(batch=17, warmup=2),
    dict(batch=16, epochs=2, lr=1e-2, warmup=3, decay="linear", weight_decay=0.7, max_norm=0.2, seed=5,
         micro_batch=9),
    dict(batch=9, data="pairs.jsonl", decay="constant", warmup=0, max_norm=0.0, micro_batch=3,
         micro_tokens=100),
    dict(batch=7, data="rankings.jsonl", warmup=1, micro_batch=5),
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_the_stage_learns_logs_and_reports_what_a_plain_loop_does(trained, settings):
    torch.manual_seed(settings.get("seed", 0))
    plain, tokenizer = GPT.load("out/sft", head="scalar"), Tokenizer.load("out/sft")
    cfg, model, lines, about = trained(reward_model, **SHARED | settings)
    preferences, held_out = loading.load("preferences", cfg.data, max_dropped=1.0)
    expected = plainly.reward_model(cfg, plain, tokenizer, preferences)
    plainly.assert_same_lines(lines, expected)
    found, calibration = plainly.reward_model_held_out(plain, tokenizer, held_out)
    if cfg.data == loading.WORLD:
        found |= {"ceiling": annotators.ceiling(held_out), "judge_agreement": annotators.agreement(held_out)}
    mean, deviation = plainly.scale(cfg, plain, GPT.load("out/sft"), tokenizer, preferences, len(lines))
    found |= {"sft_mean": mean, "sft_deviation": deviation}
    assert about["held_out"] == pytest.approx(found, rel=1e-6)
    torch.testing.assert_close(torch.tensor(about["calibration"]), torch.tensor(calibration),
                               rtol=1e-6, atol=0)
    plainly.assert_same_weights(model, plain)


def test_without_normalisation_the_score_is_left_as_it_was_trained(trained):
    torch.manual_seed(0)
    plain, tokenizer = GPT.load("out/sft", head="scalar"), Tokenizer.load("out/sft")
    cfg, model, _, about = trained(reward_model, normalize=0, batch=40, warmup=0)
    plainly.reward_model(cfg, plain, tokenizer, loading.load("preferences", loading.WORLD)[0])
    plainly.assert_same_weights(model, plain)
    assert "sft_mean" not in about["held_out"]
