"""lab/gym.py: reasoning-gym's questions as data, and its scores as a reward."""
import json
from types import SimpleNamespace

import pytest

from data import loading
from lab import gym


class Sums:
    """A task with the parts of reasoning-gym's that are used: its question i is made from the seed plus i."""
    def __init__(self, size, seed, most=9, few=10 ** 9, wrong=False):
        self.size, self.seed, self.most, self.few, self.wrong = size, seed, most, few, wrong

    def score_answer(self, answer, entry):
        if not answer:
            return 0.0
        return 1.0 if answer == entry["answer"] else 0.25 * (entry["answer"] in answer)

    def __iter__(self):
        for i in range(self.seed, self.seed + self.size):
            i %= self.few
            other = i % self.most
            answer = "" if self.wrong else str(i + other)
            yield {"question": f"{i} + {other} =", "answer": answer, "metadata": {"i": i}}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The folder that `gym.make` writes with a stand-in for the library."""
    library = SimpleNamespace(create_dataset=lambda name, **settings: {"sums": Sums}[name](**settings))
    monkeypatch.setattr(gym, "reasoning_gym", library)
    monkeypatch.setattr(gym, "FOLDER", str(tmp_path / "gym"))
    gym.known_questions.cache_clear()
    gym.make(gym.Config(tasks=("sums:most=5",), size=30, held_out=10))
    yield tmp_path / "gym"
    gym.known_questions.cache_clear()


def test_the_folder_is_like_the_worlds_and_its_held_out_questions_are_unseen(made):
    train, held_out = loading.load("demonstrations", str(made))
    assert len(train) == 30 and len(held_out) == 10
    assert train[7][-1]["content"] == "9"                              # 7 + 2
    asked = {part: {p[-1]["content"] for p in some}
             for part, some in zip(("train", "held out"), loading.load("prompts", str(made)))}
    assert len(asked["train"] | asked["held out"]) == 40
    assert loading.load_tokenizer("", str(made), "").decode([]) == ""
    with pytest.raises(ValueError, match="tokenizer.json is there already"):
        gym.make(gym.Config(tasks=("sums",)))


def test_neighbouring_seeds_share_no_question(made):
    first = (made / "prompts.jsonl").read_text()
    gym.make(gym.Config(tasks=("sums:most=5",), size=30, held_out=10, seed=1, overwrite=True))
    assert not set(first.splitlines()) & set((made / "prompts.jsonl").read_text().splitlines())


def test_a_held_out_question_that_is_for_training_too_is_left_out(made):
    gym.make(gym.Config(tasks=("sums:few=40",), size=30, held_out=40, overwrite=True))
    train, held_out = loading.load("prompts", str(made))
    asked = [{p[-1]["content"] for p in some} for some in (train, held_out)]
    assert len(asked[0]) == 30 and len(asked[1]) == 10 and not asked[0] & asked[1]


def test_the_reward_is_the_tasks_own_score(made):
    asked = [{"role": "user", "content": "7 + 2 ="}]
    assert [gym.score(asked, answer) for answer in ("9", " 9\n", "It is 9", "8")] == [1, 1, 0.25, 0]
    assert [gym.right(asked, answer) for answer in ("9", "It is 9", "8")] == [1, 0, 0]


@pytest.mark.parametrize("tasks, said", [
    (("sums:most",), "sums:most: ValueError: the value of most is no JSON: ''"), ((), "name tasks"),
    (("sums:most=five",), "the value of most is no JSON: 'five'"),
    (("sums:least=2",), "unexpected keyword argument 'least'"),
    (("sums:few=30",), "sums:few=30: all its held-out questions are for training too"),
    (("sums:wrong=true",), "its own answer does not score 1")])
def test_a_task_that_cannot_be_made_is_one_line(made, tasks, said):
    with pytest.raises(ValueError, match=said):
        gym.make(gym.Config(tasks=tasks, overwrite=True))


def test_without_the_library_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(gym, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        gym.make(gym.Config(tasks=("sums",)))


def test_three_tasks_of_the_library_itself(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(gym, "FOLDER", str(tmp_path))
    gym.known_questions.cache_clear()
    gym.make(gym.Config(tasks=("spell_backward:max_word_len=5", "chain_sum:max_terms=2,max_digits=2",
                               "letter_counting"), size=20, held_out=5))
    for path in tmp_path.glob("prompts*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            asked = [{"role": "user", "content": row["prompt"]}]
            assert gym.right(asked, row["entry"]["answer"]) == 1 and gym.right(asked, "x") == 0
    with pytest.raises(ValueError, match="no_task: ValueError"):
        gym.questions("no_task", 1, 0)
    gym.known_questions.cache_clear()
