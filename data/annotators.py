"""Simulated people who compare answers, and the best that any scorer could do at predicting them.

An annotator sees the judge's score, and has human failings: noise, a weakness for length, and one for eager
words ("Certainly!"). Between two answers a and b the choice is Bradley-Terry's, P(a over b) = σ(u(a) − u(b)),
with

    u = care · judge + length · (words / 10) + eager · (eager words)

A ranking of K answers sorts u plus Gumbel noise (Plackett-Luce), in which each pair is again a Bradley-Terry
choice. """
import itertools
import math
from dataclasses import dataclass

from data import world


@dataclass(frozen=True)
class Annotator:
    name: str
    care: float         # how far the judge's score moves them: 1 / noise
    length: float       # utility of ten words more
    eager: float        # utility of one more eager word

    def utility(self, seen):
        judge, words, eager = seen
        return self.care * judge + self.length * words / 10 + self.eager * eager


ANNOTATORS = (Annotator("thorough", 4.5, 0.1, 0.1), Annotator("hurried", 2.0, 0.4, 0.2), Annotator("charmed", 3.0, 0.2, 0.5))


def look(prompt, response):
    """What an annotator sees of an answer: the judge's score, the number of words, the number of eager
    ones."""
    return world.judge(prompt, response), len(response.split()), len(world.EAGER_SIGN.findall(response))


def rank(prompt, responses, rng, panel=1):
    """K answers put in order by annotators drawn by rng (random.Random): ranks, 1 for the best.

    Each of the panel ranks for himself; the answers are ordered by their mean rank (Borda's count), equal
    means tie. """
    places, seen = [0] * len(responses), [look(prompt, r) for r in responses]
    for annotator in rng.choices(ANNOTATORS, k=panel):
        noisy = [annotator.utility(s) - math.log(-math.log(rng.random() or 0.5)) for s in seen]
        for place, i in enumerate(sorted(range(len(noisy)), key=lambda i: -noisy[i])):
            places[i] += place
    return [1 + sum(other < place for other in places) for place in places]


def probability(prompt, a, b):
    """P(an annotator drawn at random prefers a to b)."""
    a, b = look(prompt, a), look(prompt, b)
    return sum(1 / (1 + math.exp(x.utility(b) - x.utility(a))) for x in ANNOTATORS) / len(ANNOTATORS)


def ceiling(records):
    """The accuracy that no scorer can beat in expectation on preferences of this world: the mean over the
    pairs of max(p, 1 − p), with p the probability that an annotator drawn at random prefers one answer to the
    other. records: as records.read_preferences gives them."""
    p = [probability(r.prompt, a, b) for r in records for a, b in itertools.combinations(r.responses, 2)]
    return sum(max(x, 1 - x) for x in p) / len(p)


def agreement(records):
    """How often the annotators' order of a pair is the judge's, over the pairs between which both
    distinguish."""
    agree = []
    for r in records:
        for (a, rank_a), (b, rank_b) in itertools.combinations(zip(r.responses, r.ranks), 2):
            gap = world.judge(r.prompt, a) - world.judge(r.prompt, b)
            if abs(gap) > 1e-9 and rank_a != rank_b:
                agree.append((gap > 0) == (rank_a < rank_b))
    return sum(agree) / len(agree)
