"""The AI judge: a known preference and a known bias, told apart; and labels that the stages read."""
import json
import math
from types import SimpleNamespace

import pytest
import torch

from data import records
from data.tokenizer import Tokenizer
from feedback import judge
from model import GPT
from runtime.compute import Compute

PAIRS = [{"prompt": f"What is {i} plus {i}?", "chosen": f"It's {2 * i}.", "rejected": f"It's {2 * i + 1}."}
         for i in range(1, 6)]


class Biased:
    """In a model's place: finds A likelier than B by a bias, and by a preference for the answer that is the
    chosen one of PAIRS (or the rejected one, where the preference is negative)."""
    head_kind = "lm"

    def __init__(self, tokenizer, bias, preference, block_size=1000):
        self.tokenizer, self.bias, self.preference = tokenizer, bias, preference
        self.config = SimpleNamespace(block_size=block_size)

    def requires_grad_(self, wanted):
        return self

    def logprobs(self, tokens, mask, temperature=1.0):
        found = torch.zeros(tokens.shape)
        for b, row in enumerate(tokens.tolist()):
            text = self.tokenizer.decode(row)
            first_is_best = any(f"Answer A: {p['chosen']}" in text for p in PAIRS)
            last = mask[b].nonzero().item()
            is_a = row[last] == self.tokenizer.encode("A")[0]
            likes = self.preference if first_is_best else -self.preference
            found[b, last] = -5.0 + (self.bias + likes) * is_a
        return found


@pytest.fixture
def judged(tiny_inputs, tmp_path, monkeypatch, capsys):
    """A function that lets a biased judge label PAIRS: (the records, what was printed)."""
    monkeypatch.chdir(tiny_inputs)
    records.write(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "principles.txt").write_text("The true answer is better.")
    monkeypatch.setattr(judge.Compute, "place", lambda self, *models: None)

    def run(bias, preference, **settings):
        model = Biased(Tokenizer.load("out/sft"), bias, preference)
        monkeypatch.setattr(judge, "load", lambda *_: model)
        settings = {"data": str(tmp_path / "pairs.jsonl")} | settings
        judge.label(judge.Config(out=str(tmp_path / "out"), device="cpu",
                                 constitution=str(tmp_path / "principles.txt"), **settings))
        lines = (tmp_path / "out/labels.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], capsys.readouterr().out
    return run


@pytest.mark.parametrize("bias", [0.0, 4.0, -4.0])
def test_a_bias_for_a_place_cancels_and_the_preference_stays(judged, bias):
    found, said = judged(bias, 0.5)
    assert [(r["chosen"], r["rejected"]) for r in found] == [(p["chosen"], p["rejected"]) for p in PAIRS]
    assert all(r["probability"] == round(1 / (1 + math.exp(-0.5)), 4) for r in found)
    first = (1 / (1 + math.exp(-bias - 0.5)) + 1 / (1 + math.exp(0.5 - bias))) / 2
    assert f"preferred with {first:.1%}" in said
    one, changed = ("100.0%", "0.0%") if bias == 0 else ("50.0%", "100.0%")
    assert f"labels on {one} asked in one order, 100.0% in both" in said
    assert f"{changed} of the choices change" in said


def test_a_judge_of_bad_taste_is_written_down_as_it_is(judged):
    found, said = judged(1.0, -2.0)
    assert [(r["chosen"], r["rejected"]) for r in found] == [(p["rejected"], p["chosen"]) for p in PAIRS]
    assert "0.0% in both" in said


def test_labels_are_read_as_soft_ones(judged, tmp_path):
    judged(0.0, 1.0)
    read = records.read("preferences", tmp_path / "out/labels.jsonl")
    assert [p.probability for p in read] == [round(1 / (1 + math.exp(-1)), 4)] * len(PAIRS)
    assert read[0].prompt == [{"role": "user", "content": PAIRS[0]["prompt"]}]
    with pytest.raises(ValueError, match="labels.jsonl is there already: --overwrite replaces"):
        judged(0.0, 1.0)
    judged(0.0, 1.0, overwrite=True)


def test_rankings_are_judged_pair_by_pair(judged, tmp_path):
    records.write(tmp_path / "ranked.jsonl", [{"prompt": "Why?", "responses": ["a", "b", "c"],
                                               "ranks": [2, 1, 2]}])
    found, said = judged(0.0, 1.0, data=str(tmp_path / "ranked.jsonl"))
    assert sorted(sorted([r["chosen"], r["rejected"]]) for r in found) == [["a", "b"], ["b", "c"]]
    assert "2 pairs" in said


def test_log_odds_are_those_of_the_next_token(tiny_inputs, monkeypatch):
    monkeypatch.chdir(tiny_inputs)
    model, run = GPT.load("out/sft").double(), Compute(judge.Config(device="cpu", micro_batch=3))
    questions = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    tokenizer = Tokenizer.load("out/sft")
    found = judge.Judge(run, model, tokenizer).log_odds(questions)
    (a,), (b,) = (tokenizer.encode(letter) for letter in "AB")
    for ids, odds in zip(questions, found.tolist()):
        p = model(torch.tensor([ids]))[0, -1].softmax(-1)
        assert odds == pytest.approx((p[a] / p[b]).log().item(), abs=1e-9)


def test_a_question_that_is_longer_than_the_judge_reads_is_refused(tiny_inputs, monkeypatch):
    monkeypatch.chdir(tiny_inputs)
    tokenizer = Tokenizer.load("out/sft")
    pair = ([{"role": "user", "content": PAIRS[0]["prompt"]}], PAIRS[0]["chosen"], PAIRS[0]["rejected"])
    needed = 1 + len(judge.Judge(None, None, tokenizer).question(*pair))
    for limit in (needed, needed - 1):
        run, model = Compute(judge.Config(device="cpu")), Biased(tokenizer, 0.0, 0.5, limit)
        if limit == needed:
            first, second = judge.Judge(run, model, tokenizer).compare([pair])
            assert (first - second).item() == 1.0
        else:
            with pytest.raises(ValueError, match=f"takes {needed} tokens: the judge reads {limit}"):
                judge.Judge(run, model, tokenizer).compare([pair])


def test_pairs_that_are_too_long_are_left_out_and_counted(judged, tmp_path, monkeypatch):
    long = {"prompt": "Why?", "chosen": "because " * 400, "rejected": "no"}
    records.write(tmp_path / "pairs.jsonl", [*PAIRS, long])
    found, said = judged(0.0, 0.5)
    assert len(found) == 5 and "1 of 6 pairs are longer" in said
