"""What lab/hacking.py computes from runs: the laws, a detector's worth, means over steps."""
import math

import pytest
import torch

from lab import hacking as lab


def test_a_law_is_found_again_where_it_holds():
    d = torch.linspace(0.2, 6, 40)
    for decline, function in ((torch.log, lambda x: x.log()), (torch.clone, lambda x: x)):
        R = d * (0.5 - 0.1 * function(d))
        torch.testing.assert_close(lab.fit(d, R, decline), torch.tensor([0.5, 0.1]), rtol=1e-4, atol=1e-5)


def test_best_of_n_takes_the_answer_of_the_highest_reward_in_each_group():
    rewards = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    judged = torch.tensor([[0.1, 0.9, 0.4, 0.2], [0.8, 0.6, 0.4, 0.2]])
    _, curve = lab.law_of_best_of_n(rewards, judged)
    of_one, of_two, of_four = 3.6 / 8, (0.9 + 0.4 + 0.6 + 0.2) / 4, (0.9 + 0.2) / 2
    assert [judge for _, judge in curve] == pytest.approx([of_one, of_two, of_four])
    d = [0, math.sqrt(math.log(2) - 1 / 2), math.sqrt(math.log(4) - 3 / 4)]
    assert [x for x, _ in curve] == pytest.approx(d)


def test_auroc_counts_pairs_and_half_of_the_ties():
    signal, positive = torch.tensor([1.0, 2.0, 2.0, 0.0]), torch.tensor([True, True, False, False])
    assert lab.auroc(signal, positive) == (0 + 1 + 0.5 + 1) / 4


def test_means_look_back_alone():
    assert lab.smooth([1.0, 2, 3, 4, 5, 6], width=3) == [1, 1.5, 2, 3, 4, 5]
