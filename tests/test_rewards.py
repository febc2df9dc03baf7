"""What --reward names: a reward model, a program, and weighted sums."""
import sys

import pytest
import torch
from helpers.arrays import tiny

from runtime import compute, rewards
from runtime.flags import Settings

PROMPTS = [[{"role": "user", "content": text}] for text in ("What?", "Who?", "Why?")]
ANSWERS = ["a", "bb", "cccc"]
BATCH = {"tokens": torch.tensor([[1, 2, 0], [3, 4, 5], [6, 0, 0]]), "lengths": torch.tensor([2, 3, 1]),
         "mask": torch.tensor([[False, True, False], [False, True, True], [True, False, False]])}


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n"
                    "@dataclass\nclass Sum:\n    a: int\n"            # looks its module up in sys.modules
                    "def size(messages, answer): return len(answer) + 10 * len(messages[0]['content'])\n"
                    "def nothing(messages, answer): pass\n"
                    "def nan(messages, answer): return float('nan')\n"
                    "def infinite(messages, answer): return float('-inf')\n"
                    "def turns(messages, answer): return len(messages)\n")
    return str(path)


class AnyTokenizer:
    def check_same(self, folder):
        pass


def scores(names):
    reward = rewards.find_reward(names, AnyTokenizer())
    run = compute.Compute(Settings(device="cpu", micro_batch=2))
    return reward, reward(run, PROMPTS, ANSWERS, BATCH).tolist()


def test_a_program_scores_each_answer_to_its_prompt(program):
    reward, found = scores(f"{program}:size")
    assert found == [51, 42, 44] and reward.networks == [] and reward.folder is None


def test_a_program_is_told_the_whole_conversation(program):
    talks = [[{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")[-n:]]
             for n in (1, 3, 4)]
    reward = rewards.find_reward(f"{program}:turns", AnyTokenizer())
    assert reward(compute.Compute(Settings(device="cpu")), talks, ANSWERS, BATCH).tolist() == [1, 3, 4]


def test_a_sum_weighs_its_terms(program, monkeypatch):
    model = tiny("scalar").float()
    monkeypatch.setattr(rewards, "load_reward_model", lambda folder: model)
    reward, found = scores(f"0.5*out/reward_model,2*{program}:size")
    own = model.score(BATCH["tokens"], BATCH["lengths"]).tolist()
    assert found == pytest.approx([0.5 * x + 2 * y for x, y in zip(own, [51, 42, 44])])
    assert reward.networks == [model] and reward.folder == "out/reward_model"
    assert not any(p.requires_grad for p in model.parameters())


def test_the_metrics_hold_the_mean_of_each_term(program):
    reward, found = rewards.find_reward(f"{program}:size,2*{program}:turns", AnyTokenizer()), {}
    run = compute.Compute(Settings(device="cpu"))
    run.note = lambda **numbers: found.update(numbers)
    reward(run, PROMPTS, ANSWERS, BATCH)
    assert found == {"score_1_size": pytest.approx((51 + 42 + 44) / 3), "score_2_turns": 1}
    rewards.find_reward(f"{program}:size", AnyTokenizer())(run, PROMPTS, ANSWERS, BATCH)
    assert len(found) == 2                              # a single term is the score itself


def test_a_class_of_a_file_is_a_reward_that_gets_the_tokenizer(program):
    with open(program, "a", encoding="utf-8") as f:
        f.write("import torch\nclass Mine:\n    networks, folder = [], 'mine'\n"
                "    def __init__(self, tokenizer): self.tokenizer = tokenizer\n"
                "    def __call__(self, run, prompts, answers, batch): return batch['lengths'].float()\n")
    reward, found = scores(f"{program}:size,2*{program}:Mine")
    assert found == [10 * 5 + 1 + 2 * 2, 10 * 4 + 2 + 2 * 3, 10 * 4 + 4 + 2 * 1] and reward.folder == "mine"
    assert isinstance(reward.terms[1][1].tokenizer, AnyTokenizer)


def test_a_single_reward_has_its_weight_too(program):
    assert scores(f"0.5*{program}:size")[1] == [25.5, 21, 22]


def test_a_sum_has_the_folder_of_its_reward_model_wherever_that_stands(program, monkeypatch):
    monkeypatch.setattr(rewards, "load_reward_model", lambda folder: tiny("scalar").float())
    assert scores(f"{program}:size,out/reward_model")[0].folder == "out/reward_model"


def test_what_is_no_reward_is_one_line(program):
    for names, said in ((f"x*{program}:size", "the weight 'x' is not a number"),
                        (f"{program}:two", "program.py:two: AttributeError"),
                        ("missing.py:one", "missing.py:one: FileNotFoundError")):
        with pytest.raises(ValueError, match=said):
            rewards.find_reward(names, AnyTokenizer())
    for called, said in (("nothing", "TypeError: .*NoneType.*"), ("nan", "returned nan"),
                        ("infinite", "returned -inf")):
        with pytest.raises(ValueError, match=f"program.py:{called}: {said}, for the answer '.*' to '.*'"):
            scores(f"{program}:{called}")


def test_a_reward_file_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    (tmp_path / "words_of_mine.py").write_text("WORDS = {'bb': 3}\n")
    (tmp_path / "more_of_mine.py").write_text("MORE = 1\n")
    (tmp_path / "reward.py").write_text("import words_of_mine\n\ndef score(messages, answer):\n"
                                        "    import more_of_mine\n"
                                        "    return words_of_mine.WORDS.get(answer, 0) + more_of_mine.MORE\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    _, found = scores(f"{tmp_path}/reward.py:score")
    assert found == [1, 4, 1]
