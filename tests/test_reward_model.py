"""The reward model's losses, and the stage around them."""
import math

import pytest
import torch
from helpers.arrays import near, nll, seeds

from reward_model import pairwise_loss, ranking_loss


@seeds
def test_pairwise_loss_is_bradley_terry_with_a_margin(seed):
    torch.manual_seed(seed)
    chosen, rejected, margin = torch.randn(3, 6).double()
    near(pairwise_loss(chosen, rejected), sum(nll(c - r) for c, r in zip(chosen.tolist(), rejected.tolist())) / 6)
    near(pairwise_loss(chosen, rejected, 0.7), sum(nll(c - r - 0.7) for c, r in zip(chosen.tolist(), rejected.tolist())) / 6)
    near(pairwise_loss(chosen, rejected, margin),
         sum(nll(c - r - m) for c, r, m in zip(chosen.tolist(), rejected.tolist(), margin.tolist())) / 6)
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
def test_ranking_loss_is_the_mean_per_prompt_over_ordered_pairs_without_ties_and_absent_answers(seed, with_margin):
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


def test_ranking_loss_ignores_nan_scores_of_absent_answers():
    scores, ranks = torch.tensor([[1.0, 0.5, float("nan")]]).double(), torch.tensor([[1, 2, 0]])
    near(ranking_loss(scores, ranks), nll(0.5))
