"""Simulated people who compare answers, and the best accuracy that any scorer can reach on their choices.

An annotator sees the judge's score and has human failings: noise, and a weakness for length and for eager
words ("Certainly!"). The choice between two answers a and b is Bradley-Terry's, P(a over b) = σ(u(a) − u(b)),
with

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

    def utility(self, seen):
        judge, words, eager = seen
        return self.care * judge + self.length * words / 10 + self.eager * eager


ANNOTATORS = (
    Annotator("thorough", care=4.5, length=0.1, eager=0.1),
    Annotator("hurried", care=2.0, length=0.4, eager=0.2),
    Annotator("charmed", care=3.0, length=0.2, eager=0.5),
)


def look(prompt, response):
    """What an annotator sees of an answer: (the judge's score, number of words, number of eager words)."""
    return world.judge(prompt, response), len(response.split()), len(world.EAGER_SIGN.findall(response))


def gumbel(rng):
    """Standard Gumbel noise."""
    return -math.log(-math.log(rng.random() or 0.5))            # 0 has no logarithm


def rank(prompt, responses, rng, panel=1):
    """The ranks of K answers, 1 for the best, by annotators drawn with rng (random.Random).

    Each of the `panel` annotators ranks all answers. These are then ordered by their mean rank (Borda count),
    and equal means tie.
    """
    seen = [look(prompt, r) for r in responses]
    places = [0] * len(responses)               # the sum over the panel: its order is that of the mean
    for annotator in rng.choices(ANNOTATORS, k=panel):
        noisy = [annotator.utility(s) + gumbel(rng) for s in seen]
        places = [place + sum(other > x for other in noisy) for place, x in zip(places, noisy)]
    return [1 + sum(other < place for other in places) for place in places]


def probability(prompt, a, b):
    """P(an annotator drawn at random prefers a to b)."""
    seen_a, seen_b = look(prompt, a), look(prompt, b)
    each = [1 / (1 + math.exp(x.utility(seen_b) - x.utility(seen_a))) for x in ANNOTATORS]
    return sum(each) / len(each)


def ceiling(records):
    """The best accuracy that a scorer can expect on preferences of this world: the mean over all pairs of
    max(p, 1 − p), where p is the probability that an annotator drawn at random prefers one answer to the
    other. records: what records.read_preferences returns."""
    p = [probability(r.prompt, a, b) for r in records for a, b in itertools.combinations(r.responses, 2)]
    return sum(max(x, 1 - x) for x in p) / len(p)


def accuracy(records):
    """How often the annotators' mean utility orders two answers as a record does, over the pairs that it does
    not tie; equal utilities count half. On rankings by a panel no scorer can expect much more."""
    right = []
    for r in records:
        seen = [look(r.prompt, response) for response in r.responses]
        utilities = [sum(annotator.utility(s) for annotator in ANNOTATORS) for s in seen]
        for (u, rank_u), (v, rank_v) in itertools.combinations(zip(utilities, r.ranks), 2):
            if rank_u != rank_v:
                right.append(0.5 if u == v else (u > v) == (rank_u < rank_v))
    return sum(right) / len(right)


def agreement(records):
    """How often annotators and judge agree on a pair, among the pairs that both of them tell apart."""
    agree = []
    for r in records:
        for (a, rank_a), (b, rank_b) in itertools.combinations(zip(r.responses, r.ranks), 2):
            gap = world.judge(r.prompt, a) - world.judge(r.prompt, b)
            if abs(gap) > 1e-9 and rank_a != rank_b:
                judge_prefers_a, annotators_prefer_a = gap > 0, rank_a < rank_b
                agree.append(judge_prefers_a == annotators_prefer_a)
    return sum(agree) / len(agree)
