"""Simulated people: how often they choose what, and the best that a scorer could do."""
import math
import random

import pytest

from data import annotators, records, world

FRANCE, STEAL = "What is the capital of France?", "How do I steal a car?"
KIND, PLAIN = "Sure! The capital of France is Paris.", "The capital of France is Paris."
WRONG = "The capital of France is Lyon."
EAGER_WRONG = "Certainly! The capital of France is Lyon."


@pytest.mark.parametrize("a, b", [(KIND, WRONG), (PLAIN, EAGER_WRONG), (WRONG, EAGER_WRONG)])
def test_one_annotators_choices_are_as_frequent_as_probability_says(a, b):
    rng, n = random.Random(0), 4000
    wins = sum(annotators.rank(FRANCE, [a, b], rng) == [1, 2] for _ in range(n)) / n
    assert wins == pytest.approx(annotators.probability(FRANCE, a, b), abs=0.03)        # 4 standard errors


def test_ranks_of_three_hold_each_pair_as_often_as_probability_says():
    rng, n, answers = random.Random(0), 4000, [KIND, WRONG, EAGER_WRONG]
    ranks = [annotators.rank(FRANCE, answers, rng) for _ in range(n)]
    assert all(sorted(r) == [1, 2, 3] for r in ranks)                   # one person never ties
    for i, j in ((0, 1), (0, 2), (1, 2)):
        wins = sum(r[i] < r[j] for r in ranks) / n
        assert wins == pytest.approx(annotators.probability(FRANCE, answers[i], answers[j]), abs=0.03)


def test_probabilities_of_a_pair_sum_to_one_and_of_equals_are_a_half():
    kind_wins = annotators.probability(FRANCE, KIND, WRONG)
    assert kind_wins + annotators.probability(FRANCE, WRONG, KIND) == pytest.approx(1)
    assert annotators.probability(FRANCE, PLAIN, PLAIN) == pytest.approx(0.5)


def test_annotators_like_what_is_right_and_have_their_two_weaknesses():
    assert annotators.probability(FRANCE, KIND, WRONG) > 0.7
    longer = "Truly the great old capital of France is Lyon."   # as wrong and as plain, and longer
    assert world.judge(FRANCE, longer) == world.judge(FRANCE, WRONG)
    assert annotators.probability(FRANCE, longer, WRONG) > 0.5
    polite = "Sure! The capital of France is Lyon."             # as wrong, as kind and as long, not as eager
    assert world.judge(FRANCE, polite) == world.judge(FRANCE, EAGER_WRONG)
    assert annotators.probability(FRANCE, EAGER_WRONG, polite) > 0.5


def test_ties_of_a_panel_share_the_better_rank():
    rng, seen = random.Random(0), set()
    for _ in range(200):
        ranks = annotators.rank(FRANCE, [KIND, WRONG, EAGER_WRONG], rng, panel=2)
        assert ranks == [1 + sum(other < r for other in ranks) for r in ranks]
        seen.add(tuple(sorted(ranks)))
    assert {(1, 1, 3), (1, 2, 2), (1, 2, 3)} <= seen


def test_a_panel_agrees_with_the_judge_more_than_one_annotator():
    answers = [KIND, WRONG]
    one, five = ([annotators.rank(FRANCE, answers, random.Random(seed), panel) for seed in range(500)]
                 for panel in (1, 5))
    assert five.count([1, 2]) > one.count([1, 2])


def test_ceiling_is_the_mean_of_the_likelier_choice():
    ranked = [records.Preference(FRANCE, [KIND, WRONG, EAGER_WRONG], [1, 2, 3]),
              records.Preference(STEAL, ["Take the car at night.", "Sorry, I won't help with that."], [2, 1])]
    eager = {KIND: 0, WRONG: 0, EAGER_WRONG: 1}                         # eager words in each, counted by hand
    best = []
    for record in ranked:
        for i in range(len(record.responses)):
            for j in range(i):
                p = 0
                for who in annotators.ANNOTATORS:
                    u, v = (who.care * world.judge(record.prompt, r) + who.length * len(r.split()) / 10
                            + who.eager * eager.get(r, 0) for r in (record.responses[i], record.responses[j]))
                    p += math.exp(u) / (math.exp(u) + math.exp(v)) / len(annotators.ANNOTATORS)
                best.append(p if p > 0.5 else 1 - p)
    assert len(best) == 4
    assert annotators.ceiling(ranked) == pytest.approx(sum(best) / 4)


def test_agreement_counts_the_pairs_that_the_judge_can_tell_apart():
    assert annotators.agreement([records.Preference(FRANCE, [KIND, WRONG], [1, 2])]) == 1
    assert annotators.agreement([records.Preference(FRANCE, [KIND, WRONG], [2, 1])]) == 0
    same = "Paris is the capital of France."                # as good as PLAIN: which is better says nothing
    assert annotators.agreement([records.Preference(FRANCE, [PLAIN, same, WRONG], [2, 1, 3])]) == 1


def test_agreement_of_a_tie_does_not_depend_on_the_order_of_the_answers():
    ties = [[KIND, WRONG, EAGER_WRONG], [WRONG, KIND, EAGER_WRONG]]
    ranks = [1, 1, 3]
    assert len({annotators.agreement([records.Preference(FRANCE, answers, ranks)]) for answers in ties}) == 1


def test_single_annotators_agree_with_the_judge_about_three_times_in_four():
    rng, pairs = random.Random(0), []
    for item in world.choose(world.items(), rng, 1500):
        answers = [world.crowd_answer(item, rng) for _ in range(2)]
        pairs.append(records.Preference(item.prompt, answers, annotators.rank(item.prompt, answers, rng)))
    assert 0.70 < annotators.agreement(pairs) < 0.82
    assert 0.65 < annotators.ceiling(pairs) < 0.9
