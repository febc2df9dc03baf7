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

PAIRS = [{"prompt": f"What is {i} plus {i}?", "chosen": f"It's {2 * i}.", "rejected": f"It's {2 * i + 1}."}
         for i in range(1, 6)]


class Biased:
    """In a model's place: finds A likelier than B by a bias, and by a preference for the answer that is the
    chosen one of PAIRS (or the rejected one, where the preference is negative)."""
    head_kind, config = "lm", SimpleNamespace(block_size=1000)

    def __init__(self, tokenizer, bias, preference):
        self.tokenizer, self.bias, self.preference = tokenizer, bias, preference

    def requires_grad_(self, wanted):
        return self

    def logprobs(self, tokens, mask):
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

    def run(bias, preference):
        model = Biased(Tokenizer.load("out/sft"), bias, preference)
        monkeypatch.setattr(judge, "load", lambda *_: model)
        judge.judge(judge.Config(out=str(tmp_path / "out"), data=str(tmp_path / "pairs.jsonl"), device="cpu",
                                 constitution=str(tmp_path / "principles.txt")))
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


def test_log_odds_are_those_of_the_next_token(tiny_inputs, monkeypatch):
    monkeypatch.chdir(tiny_inputs)
    model, run = GPT.load("out/sft").double(), judge.Compute(judge.Config(device="cpu", micro_batch=3))
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    tokenizer = Tokenizer.load("out/sft")
    found = judge.log_odds(run, model, tokenizer, prompts)
    (a,), (b,) = (tokenizer.encode(letter) for letter in "AB")
    for ids, odds in zip(prompts, found.tolist()):
        p = model(torch.tensor([ids]))[0, -1].softmax(-1)
        assert odds == pytest.approx((p[a] / p[b]).log().item(), abs=1e-9)


def test_rankings_are_judged_pair_by_pair_and_prompts_by_two_samples(tiny_inputs, monkeypatch, tmp_path):
    monkeypatch.chdir(tiny_inputs)
    ranked = {"prompt": "Why?", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}
    records.write(tmp_path / "ranked.jsonl", [ranked])
    tokenizer, model = Tokenizer.load("out/sft"), GPT.load("out/sft")
    cfg = judge.Config(device="cpu", data=str(tmp_path / "ranked.jsonl"))
    assert [p.responses for p in judge.read_pairs(cfg, None, model, tokenizer)] == [["b", "a"], ["b", "c"]]
    cfg = judge.Config(device="cpu", data="out/world/prompts.jsonl", max_new_tokens=8)
    pairs = judge.read_pairs(cfg, judge.Compute(cfg), model, tokenizer)
    assert len(pairs) > 10 and all(p.responses[0] != p.responses[1] for p in pairs)
    assert pairs == judge.read_pairs(cfg, judge.Compute(cfg), model, tokenizer)


def test_a_file_that_is_neither_is_refused_with_its_shapes(tmp_path):
    records.write(tmp_path / "other.jsonl", [{"text": "Hello"}])
    with pytest.raises(records.RecordError, match="prompts have prompt, instruction"):
        judge.read_pairs(judge.Config(device="cpu", data=str(tmp_path / "other.jsonl")), None, None, None)


@pytest.mark.parametrize("bias", [0.0, 4.0])
def test_preferred_is_the_probability_that_the_first_is_better_whatever_the_place(judged, bias):
    tokenizer = Tokenizer.load("out/sft")
    pairs = [records.Preference([{"role": "user", "content": p["prompt"]}], answers, [1, 2])
             for p in PAIRS for answers in ([p["chosen"], p["rejected"]], [p["rejected"], p["chosen"]])]
    model, run = Biased(tokenizer, bias, 0.5), judge.Compute(judge.Config(device="cpu"))
    likes = 1 / (1 + math.exp(-0.5))
    assert judge.preferred(run, model, tokenizer, pairs) == pytest.approx([likes, 1 - likes] * len(PAIRS))
    assert judge.preferred(run, model, tokenizer, []) == []
    model.config, model.folder = SimpleNamespace(block_size=50), "small"
    with pytest.raises(ValueError, match="small reads 50 tokens, and a question about two answers takes"):
        judge.preferred(run, model, tokenizer, pairs)


def test_beside_a_judge_a_reward_model_scores_whole_answers(tiny_inputs, monkeypatch):
    monkeypatch.chdir(tiny_inputs)
    tokenizer, model = Tokenizer.load("out/reward_model"), GPT.load("out/reward_model")
    pairs = [records.Preference([{"role": "user", "content": p["prompt"]}], [p["chosen"], p["rejected"]],
                                [1, 2]) for p in PAIRS]
    found = judge.rewarded(judge.Compute(judge.Config(device="cpu")), "out/reward_model", pairs)
    for p, right in zip(pairs, found.tolist()):
        r = []
        for text in p.responses:
            ids, _ = tokenizer.chat([*p.prompt, {"role": "assistant", "content": text}])
            end = len(ids) - ids[::-1].index(tokenizer.end)
            r.append(model.score(torch.tensor([ids[:end]]), torch.tensor([end])).item())
        assert right == (r[0] > r[1])
