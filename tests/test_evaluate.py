"""The report's numbers."""
import math
import os

import pytest
import torch

import evaluate
from runtime import files


def test_win_rate_counts_ties_as_half():
    assert evaluate.win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, 0.0], 1)[0] == 0.5
    assert evaluate.win_rate([1.0, 2.0, 3.0, 1.0], [0.0, 2.0, 4.0, 0.0], 2)[0] == 0.625
    assert evaluate.win_rate([1.0] * 6, [1.0] * 6, 3) == (0.5, 0.5, 0.5)
    assert evaluate.win_rate([2.0] * 6, [1.0] * 6, 3) == (1.0, 1.0, 1.0)


def test_win_rates_interval_contains_the_rate_and_has_the_width_of_its_standard_error():
    torch.manual_seed(0)
    mine, theirs = torch.randn(400).tolist(), (torch.randn(400) - 0.3).tolist()
    rate, low, high = evaluate.win_rate(mine, theirs, 1)
    assert low < rate < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(rate * (1 - rate) / 400), rel=0.1)


def test_win_rates_interval_resamples_prompts_not_answers():
    wins = [1.0] * 8 + [-1.0] * 8 + [1.0] * 8 + [-1.0] * 8      # 4 prompts of 8 answers that always agree
    low, high = evaluate.win_rate(wins, [0.0] * 32, 8)[1:]
    assert (low, high) == (0.0, 1.0)                            # 32 independent answers would give about 0.33 to 0.67


def test_distinct2_is_the_share_of_different_word_pairs_within_texts():
    assert evaluate.distinct2(["a b a b", "b a"]) == 2 / 4      # ab ba ab · ba; never across texts
    assert evaluate.distinct2(["a b c d"]) == 1 and evaluate.distinct2(["one", ""]) == 0


def test_best_of_picks_the_highest_reward_in_each_group_of_n():
    pool = [[(0.1, 0), (0.9, 1), (0.5, 2), (0.4, 3)], [(3.0, 4), (-1.0, 5), (-2.0, 6), (-1.5, 7)]]
    assert evaluate.best_of(pool, 1, 2) == [0, 1, 4, 5]
    assert evaluate.best_of(pool, 2, 2) == [1, 2, 4, 7]
    assert evaluate.best_of(pool, 4, 1) == [1, 4]


def test_seconds_count_overlapping_stages_once(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "STARTED", 10000.0)
    monkeypatch.setattr(evaluate.time, "time", lambda: 10007.0)
    for name, started, ended in (("sft", 100, 160), ("reward_model", 150, 200), ("ppo", 300, 400), ("dpo", 320, 350)):
        os.makedirs(tmp_path / name)
        files.write_json(str(tmp_path / name / "run.json"), {"started": started, "ended": ended, "seconds": ended - started})
    os.makedirs(tmp_path / "broken")
    (tmp_path / "broken" / "run.json").write_text("{")
    assert evaluate.seconds(str(tmp_path), ["ppo", "dpo", "broken", "absent"]) == {
        "sft": 60, "reward_model": 50, "ppo": 100, "dpo": 30, "evaluate": 7.0, "total": 207.0}
