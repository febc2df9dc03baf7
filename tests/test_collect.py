"""Fresh answers, and who ranks them: simulated people, a reward model, a judge, or a person later."""
import itertools
import json
import random
import shutil

import pytest
import torch

from data import annotators, records
from data.tokenizer import Tokenizer, learn
from feedback import collect, judge
from feedback.collect import Answer, as_answers
from model import GPT
from runtime.compute import Compute

PROMPTS = [[{"role": "user", "content": f"What is {i} plus {i}?"}] for i in (2, 3)]


@pytest.fixture
def run(tiny_inputs, monkeypatch):
    monkeypatch.chdir(tiny_inputs)
    return Compute(collect.Config(device="cpu"))


def answers(*texts, ended=True):
    tokenizer = Tokenizer.load("out/sft")
    return [Answer(t, tokenizer.encode(t) + [tokenizer.end] * ended, ended) for t in texts]


def settings(tmp_path, **changed):
    return collect.Config(**{"out": str(tmp_path / "out"), "prompts": 12, "answers": 3, "max_new_tokens": 8,
                             "device": "cpu", "max_dropped": 1.0} | changed)


def collected(tmp_path, name="preferences.jsonl", **changed):
    collect.collect(settings(tmp_path, **changed))
    return [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]


def test_sampled_rows_are_k_answers_to_each_prompt(run):
    tokenizer, model = Tokenizer.load("out/sft"), GPT.load("out/sft")
    rows = [tokenizer.prompt(p) for p in PROMPTS for _ in range(3)]
    batch = run.sample(model, rows, range(6), 6, stop_token=tokenizer.end)
    found = as_answers(tokenizer, batch, 3)
    assert [len(some) for some in found] == [3, 3]
    assert len({a.text for some in found for a in some}) > 2
    for a, tokens, mask in zip(itertools.chain(*found), batch["tokens"], batch["mask"]):
        assert a.ids == tokens[mask].tolist() and a.text == tokenizer.decode(a.ids)
        assert a.ended == (a.ids[-1] == tokenizer.end)


def test_equal_answers_to_a_prompt_count_once_and_blank_ones_not_at_all(run, tmp_path):
    tokenizer = Tokenizer.load("out/sft")
    texts = ["Yes.", "Yes.", " ", "No.", "Yes.", " ", "", "Yes.", "No.", "Yes.", "Well.", "No."]

    def sample(model, rows, *args, **how):
        batch = run.batch([tokenizer.response(text) for text in texts])
        return batch | {"ended": torch.ones(len(texts), dtype=torch.bool)}
    run.sample = sample
    found = collect.answer_prompts(settings(tmp_path, prompts=3, answers=4), run, tokenizer, random.Random(1))
    assert [[a.text for a in some] for _, some in found] == [["Yes.", "No."], ["No.", "Yes.", "Well."]]
    assert [a.ids for _, some in found for a in some][1] == tokenizer.response("No.")


def test_prompts_come_again_only_when_all_have_come(run, tmp_path):
    asked, sample, tokenizer = [], run.sample, Tokenizer.load("out/sft")
    records.write(tmp_path / "prompts.jsonl", [{"prompt": f"What is {i} plus {i}?"} for i in range(10)])
    run.sample = lambda model, rows, *args, **how: asked.extend(rows) or sample(model, rows, *args, **how)
    cfg = settings(tmp_path, data=str(tmp_path / "prompts.jsonl"), prompts=22, answers=2, max_new_tokens=3)
    collect.answer_prompts(cfg, run, tokenizer, random.Random(1))
    assert asked[::2] == asked[1::2] and len(asked) == 44
    first, second, rest = asked[:18:2], asked[18:36:2], asked[36::2]
    assert sorted(first) == sorted(second) and first != second and len(set(map(tuple, first))) == 9
    assert len(set(map(tuple, rest))) == 4


@pytest.mark.parametrize("changed, said", [
    ({"temperature": 0.0}, "no prompt got two different answers"),
    ({"model": "out/reward_model"}, "out/reward_model is a reward model: it gives scores, not answers")])
def test_without_different_answers_there_is_nothing_to_rank(run, tmp_path, changed, said):
    with pytest.raises(ValueError, match=said):
        collect.collect(settings(tmp_path, **changed))
    assert not (tmp_path / "out").exists()


def test_a_reward_model_ranks_by_its_scores_and_puts_what_does_not_end_last(run):
    tokenizer, model = Tokenizer.load("out/sft"), GPT.load("out/reward_model")
    some = answers("Four.", "Five, I think.") + answers("It is", ended=False)
    scores = collect.reward_scores(run, model, tokenizer, PROMPTS[:1], [some])[0]
    for x, a in zip(scores[:2], some):
        ids = torch.tensor([tokenizer.prompt(PROMPTS[0]) + a.ids])
        assert x == pytest.approx(model(ids)[0, -1].item(), abs=1e-5)
    first = 1 if scores[0] > scores[1] else 2
    rank = collect.labeller("out/reward_model", run, tokenizer)
    assert rank(PROMPTS[:1], [some], None) == [[first, 3 - first, 3]]


def test_a_reward_model_with_another_tokenizer_is_refused(run, tmp_path):
    """It would read other words than the model has written."""
    shutil.copytree("out/reward_model", tmp_path / "other")
    learn(["What is this text about?", "Nothing that the world knows."], 300).save(str(tmp_path / "other"))
    for by in (lambda: collect.labeller(str(tmp_path / "other"), run, Tokenizer.load("out/sft")),
               lambda: collect.collect(settings(tmp_path, by=str(tmp_path / "other")))):
        with pytest.raises(ValueError, match="other was trained with another tokenizer"):
            by()


def test_annotators_rank_as_they_do_in_the_world(run):
    some = [answers("It's 4.", "It's 5.", "4"), answers("6.", "Go away.", "It's 6.")]
    found, rng = collect.labeller("annotators", run, None)(PROMPTS, some, random.Random(3)), random.Random(3)
    assert found == [annotators.rank(p, [a.text for a in s], rng, panel=5) for p, s in zip(PROMPTS, some)]


@pytest.fixture
def longer(monkeypatch):
    """A judge that likes long answers, and whatever stands first. The principles that it was given."""
    principles = []

    def compare(self, pairs):
        principles.append(self.principles)
        d = torch.tensor([float(len(a) - len(b)) for _, a, b in pairs])
        return 3 + d, 3 - d
    monkeypatch.setattr(judge.Judge, "compare", compare)
    return principles


def test_a_judge_ranks_by_what_it_prefers_over_all_pairs(run, longer):
    texts = ("a", "ccc", "bb", "dddd")
    rank = collect.labeller("out/sft", run, None)
    assert rank(PROMPTS, [answers(*texts), answers(*texts[::-1])], None) == [[4, 2, 3, 1], [1, 3, 2, 4]]
    assert longer == [judge.PRINCIPLES.read_text().strip()]


def test_a_judge_judges_by_the_constitution_that_is_named(run, tmp_path, longer):
    (tmp_path / "principles.txt").write_text("Longer is better.\n")
    found = collected(tmp_path, by="out/sft", constitution=str(tmp_path / "principles.txt"))
    assert longer == ["Longer is better."] and len(found) > 3
    for record in found:
        lengths = [len(text) for text in record["responses"]]
        assert record["ranks"] == [1 + sum(other > x for other in lengths) for x in lengths]


@pytest.mark.parametrize("by", ["annotators", "person", "out/reward_model"])
def test_a_constitution_for_whoever_does_not_read_it_is_refused(run, tmp_path, by):
    with pytest.raises(ValueError, match=f"--constitution is for a chat model that judges, and {by} is none"):
        collect.collect(settings(tmp_path, by=by, constitution="principles.txt"))


@pytest.mark.parametrize("by", ["annotators", "out/reward_model"])
def test_what_is_collected_is_a_preference_file(run, tmp_path, by):
    lines = collected(tmp_path, by=by)
    found = records.read("preferences", tmp_path / "out/preferences.jsonl")
    assert 0 < len(found) <= 12 and {len(p.responses) for p in found} <= {2, 3}
    assert len({json.dumps(p.prompt) for p in found}) == len(found)
    prompts = records.read("prompts", "out/world/prompts.jsonl")
    assert all(p.prompt in prompts for p in found)
    assert any(len(set(p.ranks)) > 1 for p in found)
    with pytest.raises(ValueError, match="preferences.jsonl is there already: --overwrite replaces"):
        collected(tmp_path, by=by)
    assert collected(tmp_path, by=by, overwrite=True) == lines


def test_for_a_person_the_same_answers_are_written_to_be_ranked(run, tmp_path):
    tasks = collected(tmp_path, "tasks.jsonl", by="person")
    ranked = collected(tmp_path, by="annotators")
    assert [t["responses"] for t in tasks] == [r["responses"] for r in ranked]
    read = records.read("tasks", tmp_path / "out/tasks.jsonl")
    assert [(p.prompt, p.responses) for p in read] == [(t["prompt"], t["responses"]) for t in tasks]


def test_pairs_of_a_ranking_are_asked_once(run, monkeypatch):
    asked = []

    def compare(self, pairs):
        asked.extend(pairs)
        return torch.zeros(2, len(pairs))
    monkeypatch.setattr(judge.Judge, "compare", compare)
    judge.Judge(run, None, None).scores(PROMPTS[:1], [answers("a", "b", "c")])
    assert len(asked) == 3 and {frozenset(p[1:]) for p in asked} == {
        frozenset(p) for p in itertools.combinations("abc", 2)}
