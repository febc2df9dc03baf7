"""What lab/hacking.py computes from runs: the laws, means over steps."""
import math
import re

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
    d, judge = lab.best_of_n_curve(rewards, judged)
    assert d.tolist() == pytest.approx([0, math.sqrt(math.log(2) - 1 / 2), math.sqrt(math.log(4) - 3 / 4)])
    torch.testing.assert_close(judge, torch.tensor([[1.6 / 4, (0.9 + 0.4) / 2, 0.9],
                                                    [2.0 / 4, (0.6 + 0.2) / 2, 0.2]]))


def test_means_look_back_alone():
    assert lab.smooth([1.0, 2, 3, 4, 5, 6], width=3) == [1, 1.5, 2, 3, 4, 5]


def test_the_laws_in_words_hold_the_law_and_an_interval_around_it():
    kl = [0.005, *(0.1 * i for i in range(1, 60))]
    steps = [{"kl": x, "judge": 0.4 + math.sqrt(x) * (0.5 - 0.1 * math.log(math.sqrt(x)))} for x in kl]
    assert lab.law_of_ppo(steps, 0.4) == "α 0.500 (0.500 to 0.500), β 0.100 (0.100 to 0.100)"
    torch.manual_seed(0)
    judge = torch.rand(100, 16)
    words = re.match(r"α (\S+) \((\S+) to (\S+)\), β ", lab.law_of_best_of_n(judge, judge))
    alpha, low, high = map(float, words.groups())
    assert 0 < low < alpha < high < 2


def metrics(ood):
    return [{"step": i + 1, "judge": 0.5 + i / 10, "kl": float(i), "ood": x} for i, x in enumerate(ood)]


def test_the_undefended_run_is_also_shown_as_if_stopped_at_the_first_large_share_of_ood(monkeypatch):
    steps = metrics([0.0, 0.1, 0.11, 0.05, 0.5])
    runs = {name: steps for name in lab.RUNS} | {"ptx": [{"step": 1, "judge": 0.25, "kl": 2.0}]}
    monkeypatch.setattr(lab.evaluate, "read_steps", lambda folder: runs[folder.removeprefix("out/")])
    [(_, (heads, *rows))] = lab.table({name: {"judge": 0.625} for name in lab.RUNS})
    rows = {name: row for name, *row in rows}
    assert rows["no_defence"] == ["0.70", "5", "2.0", "15%", "step 3", "0.62"] and len(heads) == 7
    assert rows["no_defence, stopped at 10 % OOD"] == ["0.60", "3", "1.0", "7%", "step 3", "0.70"]
    assert rows["ptx"] == ["0.25", "1", "2.0", "–", "–", "0.62"]
    runs["no_defence"] = metrics([0.0, 0.1])
    [(_, rows)] = lab.table({name: {"judge": 0.625} for name in lab.RUNS})
    assert len(rows) == 1 + len(lab.RUNS)                   # no alarm: nothing to stop
