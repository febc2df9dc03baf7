"""Examples that fit, and their order in batches."""
import json
import math
import random

import pytest

from data.batches import (
    Comparison,
    Demonstration,
    batches,
    by_length,
    encode_comparisons,
    encode_demonstrations,
    fit,
    fit_prompts,
    without_oldest_turn,
)
from data.records import Preference, read
from data.tokenizer import learn


def test_fit_keeps_what_fits_and_says_what_does_not(capsys):
    assert fit(["a", "abc", "ab"], len, 3, "answers") == ["a", "abc", "ab"]
    assert capsys.readouterr().out == ""
    assert fit(["a", "abc", "ab"], len, 2, "answers") == ["a", "ab"]
    out = capsys.readouterr().out
    assert "1 of 3 answers" in out and "2 tokens" in out and "block_size" in out


def test_fit_shortens_what_can_be_and_leaves_out_and_counts_the_rest(capsys):
    def shorter(text):
        return text[1:] if text[0] == "-" else None
    assert fit(["a", "--bc", "abc"], len, 2, "answers", shorter) == ["a", "bc"]
    out = capsys.readouterr().out
    assert "1 of 3 answers are longer than 2 tokens" in out and "1 of 3 answers" in out


@pytest.mark.parametrize("kind, encode", [
    ("demonstrations", encode_demonstrations), ("preferences", encode_comparisons), ("prompts", fit_prompts)])
def test_records_that_are_too_long_are_named_by_their_lines(tmp_path, capsys, kind, encode):
    tok, path = learn(["a"], 300), tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": "a" * n, "chosen": "b", "rejected": "c"}) for n in (1, 9, 1, 8, 7, 9)]
    path.write_text("\n".join([lines[0], "", *lines[1:]]))
    encode(tok, read(kind, path), len(tok.prompt([{"role": "user", "content": "a"}])) + 4, kind)
    assert f"4 of 6 {kind} are longer" in (out := capsys.readouterr().out)
    assert out.endswith("(the first: line 3, line 5, line 6)\n")


U1, A1, U2, A2, S = [{"role": role, "content": text} for role, text in (
    ("user", "What is it?"), ("assistant", "A cat."), ("user", "Why?"), ("assistant", "It is."),
    ("system", "Be kind."))]


@pytest.mark.parametrize("messages, rest", [
    ([U1, A1, U2, A2], [U2, A2]), ([S, U1, A1, U2], [S, U2]), ([U1, A1], None), ([S, U1], None),
    ([U1, A1, A2, U2, A1, U1], [U2, A1, U1])])
def test_the_oldest_turn_goes_whole_and_a_system_message_stays(messages, rest):
    assert without_oldest_turn(messages) == rest


def test_what_is_too_long_loses_whole_turns_from_the_left(capsys):
    tok = learn(["What is it? It is a cat."], 300)
    short, long = [U2, A2], [U1, A1, U2, A2]
    room = len(tok.chat(long)[0]) - 1
    assert encode_demonstrations(tok, [long, short], room, "demonstrations") == [
        Demonstration(*tok.chat(short))] * 2
    p = Preference([U1, A1, U2], ["A cat.", "A"], [2, 1])
    [found] = encode_comparisons(tok, [p], len(tok.prompt(p.prompt)), "preferences")
    assert found.sequences[0] == tok.prompt([U2]) + tok.response("A cat.")
    assert fit_prompts(tok, [p.prompt, [U2]], len(tok.prompt([U2])), "prompts") == [[U2], [U2]]
    assert capsys.readouterr().out.count("without their oldest turns") == 3
    with pytest.raises(ValueError, match="none of the 1 demonstrations"):     # an answer is never cut
        encode_demonstrations(tok, [long + [U1]], len(tok.chat([U1])[0]), "demonstrations")


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


def test_each_epoch_has_every_example_in_an_order_of_its_own_and_can_be_entered_anywhere():
    lengths = [random.Random(i).randrange(1, 100) for i in range(100)]
    whole = list(batches(lengths, 8, 3, seed=4))
    epochs = [whole[i:i + 13] for i in (0, 13, 26)]
    assert len(whole) == 39
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(100))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert list(batches(lengths, 8, 3, seed=4, start=17)) == whole[17:]
    assert list(batches(lengths, 8, 3, seed=5)) != whole


@pytest.mark.parametrize("ranks, best, pairs", [
    ([1, 2], [0], [(0, 1)]), ([2, 1], [1], [(1, 0)]), ([2, 2], [0, 1], []),
    ([1, 1, 3], [0, 1], [(0, 2), (1, 2)])])
def test_a_comparison_knows_its_best_answers_and_its_pairs(ranks, best, pairs):
    comparison = Comparison([[1] * n for n in range(3, 3 + len(ranks))], 2, ranks, 0.0)
    assert comparison.best == best and comparison.pairs == pairs
    assert comparison.lengths == list(range(3, 3 + len(ranks)))


def test_comparisons_and_demonstrations_are_tokens_of_the_chat_format(capsys):
    tok = learn(["What is it? It is a cat."], 300)
    short, long = [[{"role": "user", "content": "What?"}], [{"role": "user", "content": "What " * 40}]]
    preferences = [Preference(prompt, ["A cat.", "A"], [2, 1], 0.5) for prompt in (short, long)]
    [found] = encode_comparisons(tok, preferences, 60, "preferences")
    prompt = tok.prompt(short)
    sequences = [prompt + tok.response("A cat."), prompt + tok.response("A")]
    assert found == Comparison(sequences, len(prompt), [2, 1], 0.5, prompt=short)
    answer = [{"role": "assistant", "content": "A cat."}]
    [found] = encode_demonstrations(tok, [short + answer, long + answer], 60, "demonstrations")
    assert found == Demonstration(*tok.chat(short + answer))
    assert capsys.readouterr().out.count("1 of 2") == 2
