"""GRPO and RLOO: their formulas against slow loops and by examples that can be worked out on paper, and what
their flags refuse. The stage itself is held against a plain loop in test_ppo.py."""
import statistics

import pytest
import torch
from helpers.arrays import seeds
from test_formulas import near, numbers

from variants import grpo


@seeds
@pytest.mark.parametrize("group", [2, 3])
def test_advantages_in_groups_are_those_of_a_slow_loop(seed, group):
    torch.manual_seed(seed)
    R, lengths = torch.randn(4 * group).double() * 3 + 5, torch.randint(1, 9, (4 * group,))
    one_out, whole = grpo.rloo(R, group), grpo.grpo(R, group, lengths)
    for i, x in enumerate(R.tolist()):
        start = i - i % group
        group_of_i = R[start:start + group].tolist()
        others = [y for j, y in enumerate(group_of_i, start) if j != i]
        near(one_out[i], x - sum(others) / len(others))
        want = (x - sum(group_of_i) / group) / (statistics.stdev(group_of_i) + 1e-4)
        near(whole[i], want * lengths.double().mean().item() / lengths[i].item())
    # Without its two divisions GRPO is RLOO, but for a factor.
    near(grpo.grpo(R, group, lengths, False, False), one_out * (group - 1) / group)


EQUAL = torch.ones(4)                                           # four answers of one token each


def test_rloo_takes_off_what_the_other_answers_earn_on_average():
    near(grpo.rloo(numbers(1, 2, 6), 3), numbers(-3, -1.5, 4.5))


def test_rloo_compares_answers_to_one_prompt_and_no_others():
    near(grpo.rloo(numbers(1, 2, 10, 30), 2), numbers(-1, 1, -20, 20))


def test_rloo_leaves_an_answers_own_return_out_of_its_baseline():
    """It counts in full, and not (k − 1)/k of it."""
    near(grpo.rloo(numbers(5, 0, 0), 3) - grpo.rloo(numbers(2, 0, 0), 3), numbers(3, -1.5, -1.5))


def test_rloo_does_not_change_if_all_answers_to_a_prompt_earn_more():
    near(grpo.rloo(numbers(1, 2, 6) + 100, 3), numbers(-3, -1.5, 4.5))


def test_rloo_of_equal_answers_is_0():
    near(grpo.rloo(numbers(3, 3, 5, 5), 2), torch.zeros(4))


def test_grpo_compares_with_the_mean_of_the_answers_to_one_prompt():
    near(grpo.grpo(numbers(1, 3, 10, 30), 2, EQUAL, divide_by_std=False), numbers(-1, 1, -10, 10))


def test_grpo_divides_by_the_standard_deviation_of_each_group_with_k_minus_1():
    found = grpo.grpo(numbers(1, 3, 10, 30), 2, EQUAL)
    near(found, numbers(-1, 1, -1, 1) / 2 ** 0.5, 1e-3)


def test_grpo_of_equal_answers_is_0():
    near(grpo.grpo(torch.full((4,), 3.0).double(), 2, EQUAL), torch.zeros(4))


def test_grpo_leaves_length_out_if_it_is_told_to():
    lengths = torch.tensor([1, 9])
    near(grpo.grpo(numbers(0, 2), 2, lengths, False, False), numbers(-1, 1))


def test_grpo_gives_answers_of_any_length_the_same_weight_in_a_mean_over_tokens():
    """The sum of an answer's tokens is A times the mean length, however long it is."""
    lengths = torch.tensor([1, 9])
    near(grpo.grpo(numbers(0, 2), 2, lengths, divide_by_std=False) * lengths, numbers(-5, 5))


def test_grpo_takes_the_mean_length_of_the_whole_batch_and_not_of_a_group():
    lengths = torch.tensor([1, 1, 3, 3])
    near(grpo.grpo(numbers(0, 2, 0, 2), 2, lengths, divide_by_std=False), numbers(-2, 2, -2 / 3, 2 / 3))


def test_grpo_does_not_change_if_all_answers_to_a_prompt_earn_more():
    near(grpo.grpo(numbers(1, 3, 1, 3), 2, EQUAL, False), grpo.grpo(numbers(1, 3, 51, 53), 2, EQUAL, False))


@pytest.mark.parametrize("flags, said", [
    (dict(batch=10, group=4), "not a multiple"), (dict(kl_horizon=25), "--kl_horizon must exceed")])
def test_groups_that_cannot_be_are_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        grpo.Config(**flags)
