"""Examples that fit, and their order in batches."""
import math
import random

import pytest

from data.batches import by_length, fit


def test_fit_keeps_what_fits_and_says_what_does_not(capsys):
    assert fit(["a", "abc", "ab"], len, 3, "answers") == ["a", "abc", "ab"]
    assert capsys.readouterr().out == ""
    assert fit(["a", "abc", "ab"], len, 2, "answers") == ["a", "ab"]
    out = capsys.readouterr().out
    assert "1 of 3 answers" in out and "2 tokens" in out and "block_size" in out


def test_fit_refuses_when_nothing_fits():
    with pytest.raises(ValueError, match="none of the 2 answers fits into 1 tokens"):
        fit(["ab", "abc"], len, 1, "answers")


@pytest.mark.parametrize("n", [1, 8, 1000, 1003])
def test_by_length_covers_each_index_once_in_batches_of_at_most_size(n):
    lengths = [random.Random(i).randrange(1, 100) for i in range(n)]
    batches = by_length(lengths, 8, random.Random(0))
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert all(1 <= len(batch) <= 8 for batch in batches) and len(batches) == math.ceil(n / 8)


def test_by_length_pads_far_less_than_random_order():
    rng = random.Random(0)
    lengths = [rng.randrange(1, 100) for _ in range(1000)]
    order = rng.sample(range(1000), 1000)
    chance = [order[i:i + 8] for i in range(0, 1000, 8)]
    padding = [sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches for j in batch)
               for batches in (by_length(lengths, 8, rng), chance)]
    assert padding[0] < padding[1] / 5


def test_by_length_is_in_random_order_and_follows_its_rng():
    lengths = list(range(1000))
    first, again, other = (by_length(lengths, 8, random.Random(seed)) for seed in (0, 0, 1))
    assert first == again != other
    means = [sum(batch) / len(batch) for batch in first]
    assert abs(sum(means[:60]) / 60 - sum(means[60:]) / len(means[60:])) < 150      # in order it would be 500
