"""GRPO and RLOO: their formulas against slow loops, and what their flags refuse. The stage itself is held
against a plain loop in test_ppo.py."""
import statistics

import pytest
import torch
from helpers.arrays import near, seeds

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


def test_a_group_whose_answers_earn_the_same_teaches_nothing():
    near(grpo.grpo(torch.full((4,), 3.0).double(), 2, torch.ones(4)), torch.zeros(4))


@pytest.mark.parametrize("flags, said", [
    (dict(batch=10, group=4), "not a multiple"), (dict(kl_horizon=25), "--kl_horizon must exceed")])
def test_groups_that_cannot_be_are_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        grpo.Config(**flags)
