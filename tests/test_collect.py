"""Who compares fresh answers: simulated people, a reward model, a judge."""
import itertools
import json
import random

import pytest
import torch

from data import annotators, records
from data.answers import Answer, sample, score
from data.tokenizer import Tokenizer
from feedback import collect as feedback
from feedback import judge
from model import GPT
from runtime.compute import Compute

PROMPTS = [[{"role": "user", "content": f"What is {i} plus {i}?"}] for i in (2, 3)]


@pytest.fixture
def run(tiny_inputs, monkeypatch):
    monkeypatch.chdir(tiny_inputs)
    return Compute(feedback.Config(device="cpu"))


def answers(*texts, ended=True):
    tokenizer = Tokenizer.load("out/sft")
    return [Answer(tokenizer.encode(t) + [tokenizer.end] * ended, t, ended) for t in texts]


def test_answers_are_k_to_each_prompt_with_noise_of_their_own(run):
    tokenizer, model = Tokenizer.load("out/sft"), GPT.load("out/sft")
    found = sample(run, model, tokenizer, PROMPTS, 3, 6, seeds=range(6))
    assert [len(some) for some in found] == [3, 3]
    assert len({a.text for some in found for a in some}) > 2
    for some, prompt in zip(found, PROMPTS):
        for a in some:
            assert a.ended == (a.ids[-1] == tokenizer.end) and a.text == tokenizer.decode(a.ids)
    alone = sample(run, model, tokenizer, PROMPTS[1:], 1, 6, seeds=[5])
    assert alone[0][0] == found[1][2]


def test_a_reward_model_ranks_by_its_scores_and_puts_what_does_not_end_last(run):
    tokenizer, model = Tokenizer.load("out/sft"), GPT.load("out/reward_model")
    some = answers("Four.", "Five, I think.") + answers("It is", ended=False)
    scores = score(run, model, tokenizer, PROMPTS[:1], [some])[0]
    for x, a in zip(scores[:2], some):
        ids = torch.tensor([tokenizer.prompt(PROMPTS[0]) + a.ids])
        assert x == pytest.approx(model(ids)[0, -1].item(), abs=1e-5)
    first = 1 if scores[0] > scores[1] else 2
    rank = feedback.labeller("out/reward_model", run)
    assert rank(PROMPTS[:1], [some], None) == [[first, 3 - first, 3]]


def test_annotators_rank_as_they_do_in_the_world(run):
    some = [answers("It's 4.", "It's 5.", "4"), answers("6.", "Go away.", "It's 6.")]
    found, rng = feedback.labeller("annotators", run)(PROMPTS, some, random.Random(3)), random.Random(3)
    assert found == [annotators.rank(p, [a.text for a in s], rng, panel=5) for p, s in zip(PROMPTS, some)]


def test_a_judge_ranks_by_what_it_prefers_over_all_pairs(run, monkeypatch, tmp_path):
    """A judge that likes long answers, and whatever stands first."""
    (tmp_path / "principles.txt").write_text("Longer is better.")
    monkeypatch.setattr(judge, "PRINCIPLES", str(tmp_path / "principles.txt"))

    def biased(run, model, tokenizer, principles, pairs):
        assert principles == "Longer is better."
        d = torch.tensor([float(len(p.responses[0]) - len(p.responses[1])) for p in pairs])
        return 3 + d, 3 - d
    monkeypatch.setattr(judge, "ask_twice", biased)
    texts = ("a", "ccc", "bb", "dddd")
    found = feedback.labeller("out/sft", run)(PROMPTS, [answers(*texts), answers(*texts[::-1])], None)
    assert found == [[4, 2, 3, 1], [1, 3, 2, 4]]


@pytest.mark.parametrize("by", ["annotators", "out/reward_model"])
def test_what_is_collected_is_a_preference_file(tiny_inputs, tmp_path, monkeypatch, by):
    monkeypatch.chdir(tiny_inputs)
    cfg = feedback.Config(out=str(tmp_path / "out"), by=by, prompts=12, answers=3, max_new_tokens=8,
                          device="cpu")
    feedback.collect(cfg)
    lines = (tmp_path / "out/preferences.jsonl").read_text()
    found = records.read("preferences", tmp_path / "out/preferences.jsonl")
    assert 0 < len(found) <= 12 and all(len(p.responses) == 3 for p in found)
    assert len({json.dumps(p.prompt) for p in found}) > 3
    feedback.collect(cfg)
    assert (tmp_path / "out/preferences.jsonl").read_text() == lines


def test_pairs_of_a_ranking_are_asked_once(run, monkeypatch):
    asked = []
    monkeypatch.setattr(judge, "ask_twice", lambda *a: asked.extend(a[4]) or torch.zeros(2, len(a[4])))
    feedback.judge_scores(run, None, None, PROMPTS[:1], [answers("a", "b", "c")])
    both = {frozenset(p.responses) for p in asked}
    assert len(asked) == 3 and both == {frozenset(p) for p in itertools.combinations("abc", 2)}
