"""What people choose among answers: the file of one person's rankings, and how far two people agree."""
import hashlib
import itertools
import json
import math
import random
import time
from dataclasses import replace

from data import records
from feedback.journal import Journal


def key(p):
    """The name of an item (a records.Preference), the same in every file and run: what it says, hashed."""
    return hashlib.sha256(json.dumps([p.prompt, p.responses]).encode()).hexdigest()[:16]


def read(path):
    """A person's choices: {key: records.Preference}."""
    return {key(p): p for p in records.read("preferences", path)}


class Choices:
    """What a person has to rank, and the file of what they chose."""

    def __init__(self, cfg, tasks, gold, guidelines):
        self.cfg, self.gold, self.guidelines = cfg, {key(p): p for p in gold}, guidelines
        self.saved = []                                         # (key, where its line begins) in this run
        rng = random.Random(cfg.seed)
        for p in gold:
            tasks.insert(rng.randint(0, len(tasks)), p)
        self.items, self.journal = {key(p): p for p in tasks}, Journal(cfg.out)
        self.done = read(cfg.out) if self.journal.size() else {}

    def order(self, item):
        """In which order the answers stand on this person's page: their numbers in the record."""
        n = len(self.items[item].responses)
        return random.Random(f"{self.cfg.name}/{item}").sample(range(n), n)

    def talk(self, change):
        """Save or undo a choice, if the page asks for it; returns what it shows next."""
        item = change.get("item") if isinstance(change, dict) else 0
        if item is not None:
            if not isinstance(item, str) or item not in self.items:
                raise ValueError("no such item")
            if change.get("undo") is True:
                self.undo(item)
            else:
                self.save(item, change.get("ranks"), change.get("cannot_judge") is True)
        left = [item for item in self.items if item not in self.done]
        state = {"total": len(self.items), "done": len(self.items) - len(left), "guidelines": self.guidelines,
                 "last": self.saved[-1][0] if self.saved else None, "item": None, "prompt": [], "answers": []}
        if not left:
            return state | {"end": f"All {len(self.items)} are ranked. Thank you! {self.gold_score()}"}
        p = self.items[left[0]]                                 # nothing here tells a gold item from another
        return state | {"item": left[0], "prompt": p.prompt,
                        "answers": [p.responses[i] for i in self.order(left[0])]}

    def save(self, item, ranks, cannot_judge):
        """ranks: in the page's order. What has been saved, by a double click or another tab, stays."""
        p, order = self.items[item], self.order(item)
        if item in self.done:
            return
        if cannot_judge:
            ranks = [1] * len(order)
        if not isinstance(ranks, list) or len(ranks) != len(order) or \
                not all(type(r) is int and 1 <= r <= len(order) for r in ranks):
            raise ValueError("expected a rank for each answer")
        p = replace(p, ranks=[ranks[order.index(i)] for i in range(len(order))], cannot_judge=cannot_judge)
        record = {"prompt": p.prompt, "responses": p.responses, "ranks": p.ranks, "by": self.cfg.name,
                  "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "order": order}
        record |= {"cannot_judge": True} if cannot_judge else {}
        record |= {"gold": True} if item in self.gold else {}
        self.saved.append((item, self.journal.append(record)))
        self.done[item] = p

    def undo(self, item):
        """Take this choice out of the file, if it is the last one of this run."""
        if self.saved and self.saved[-1][0] == item:
            del self.done[item]
            self.journal.cut(self.saved.pop()[1])

    def gold_score(self):
        """A sentence, or nothing where nothing of known order has been ranked."""
        right = [a == b for item, p in self.gold.items() if item in self.done
                 for a, b in zip(pairwise(p.ranks), pairwise(self.done[item].ranks))
                 if a != 0 and not self.done[item].cannot_judge]
        return f"{sum(right)} of {len(right)} pairs of known order are right." if right else ""


def pairwise(ranks):
    """Of every two answers, in their order: 1 if the first is better, -1 if the second is, 0 if they tie."""
    return [(a < b) - (a > b) for a, b in itertools.combinations(ranks, 2)]


def kappa(mine, theirs):
    """(share of equal choices, Cohen's kappa) of two people (Cohen 1960): (p_o − p_e)/(1 − p_e), where p_o is
    that share, and p_e the one that they would reach if each kept to how often they make a choice and drew it
    blindly. Without p_e, two people who call almost everything a tie would seem to agree. Kappa is 1 for
    equal choices, 0 for blind ones, and NaN where both always make the same choice."""
    n = len(mine)
    observed = sum(a == b for a, b in zip(mine, theirs)) / n
    expected = sum(mine.count(c) * theirs.count(c) for c in (1, 0, -1)) / n ** 2
    return observed, (observed - expected) / (1 - expected) if expected < 1 else math.nan


def compare(ours, theirs):
    """Print how far two people, {key: Preference} each, agree on every two answers of what both ranked."""
    both = [item for item in ours if item in theirs]
    judged = [item for item in both if not ours[item].cannot_judge and not theirs[item].cannot_judge]
    pairs = [[c for item in judged for c in pairwise(found[item].ranks)] for found in (ours, theirs)]
    if not judged:
        raise ValueError("the two files share nothing that both could judge")
    for item in judged:
        p, other = ours[item], theirs[item].ranks
        if pairwise(p.ranks) != pairwise(other):
            print(f"\n{p.prompt[-1]['content']}")
            for mine, their, answer in zip(p.ranks, other, p.responses):
                print(f"  {mine} {their}  {answer}")
    share, k = kappa(*pairs)
    print(f"\nAbove: where they differ, each answer with its place for either.\n{len(judged)} items, without "
          f"{len(both) - len(judged)} that one of them could not judge; {len(pairs[0])} pairs of answers: "
          f"{share:.1%} equal choices, kappa {k:.2f}")
