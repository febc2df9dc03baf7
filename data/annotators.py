"""Simulated people who compare answers, and the best accuracy that any scorer can reach on their choices.

An annotator sees the judge's score and has human failings: noise, and a weakness for length and for eager
words ("Certainly!"). The choice between two answers a and b is Bradley-Terry's, P(a over b) = σ(u(a) − u(b)),
with the utility

    u = care · judge + length · (words / 10) + eager · (eager words)

A ranking of K answers sorts them by u plus Gumbel noise (Plackett-Luce), in which each pair is again a
Bradley-Terry choice.
"""
import itertools
import math
from dataclasses import dataclass

from data import world


@dataclass(frozen=True)
class Annotator:
    name: str
    care: float         # weight of the judge's score: 1 / noise
    length: float       # utility of ten more words
    eager: float        # utility of one more eager word

    def utility(self, features):
        judge, words, eager = features
        return self.care * judge + self.length * words / 10 + self.eager * eager


ANNOTATORS = (
    Annotator("thorough", care=4.5, length=0.1, eager=0.1),
    Annotator("hurried", care=2.0, length=0.4, eager=0.2),
    Annotator("charmed", care=3.0, length=0.2, eager=0.5),
)


def features(prompt, response):
    """What annotators notice about an answer: (the judge's score, number of words, number of eager words)."""
    return world.judge(prompt, response), len(response.split()), len(world.SIGNS["eager"].findall(response))


def rank(prompt, responses, rng, panel=1):
    """The ranks of K answers, 1 for the best: `panel` annotators, drawn with rng (random.Random), rank them,
    and their mean ranks decide (Borda count). Equal means tie."""
    seen = [features(prompt, r) for r in responses]
    sums = [0] * len(responses)                 # of each answer's ranks: as good as their means
    for annotator in rng.choices(ANNOTATORS, k=panel):
        # Gumbel noise is −log(−log(uniform)), and 0 has no logarithm.
        noisy = [annotator.utility(x) - math.log(-math.log(rng.random() or 0.5)) for x in seen]
        sums = [total + sum(other > x for other in noisy) for total, x in zip(sums, noisy)]
    return [1 + sum(other < total for other in sums) for total in sums]


def probability(prompt, a, b):
    """P(an annotator drawn at random prefers a to b)."""
    seen_a, seen_b = features(prompt, a), features(prompt, b)
    each = [1 / (1 + math.exp(x.utility(seen_b) - x.utility(seen_a))) for x in ANNOTATORS]
    return sum(each) / len(each)


def ceiling(preferences):
    """The best accuracy that a scorer can expect on preferences of this world (records.Preference): the mean
    over all pairs of max(p, 1 − p), where p is their probability()."""
    p = [probability(r.prompt, a, b) for r in preferences
         for a, b in itertools.combinations(r.responses, 2)]
    return sum(max(x, 1 - x) for x in p) / len(p)


def agreement(preferences):
    """The share of pairs in which the judge, too, scores the better answer higher. Pairs with equal scores do
    not count."""
    agree = []
    for r in preferences:
        score = [world.judge(r.prompt, response) for response in r.responses]
        agree += [score[better] > score[worse] for better, worse in r.pairs
                  if abs(score[better] - score[worse]) > 1e-9]
    return sum(agree) / len(agree)
