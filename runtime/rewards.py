"""What earns an answer its score: the flag --reward.

    folder                              a reward model
    file.py:function                    a Python function (messages, answer) -> number
    0.3*folder,file.py:function         their weighted sum

A reward is an object with

    networks        those to be placed with the others, before it is called
    folder          of a reward model from which a value network can start, or None
    reward(run, batch, prompts, answers) -> (scores (B,), {name: number} to be logged)

where batch holds the answers' tokens, mask and lengths, prompts are message lists and answers texts. Scores
of None end the run.
"""
import torch

from runtime.files import find
from runtime.models import load_function, load_reward_model


def find_reward(names, tokenizer, of_model=None):
    """What --reward names. of_model: what makes a reward of a reward model's folder, if not OfModel."""
    of_model = of_model or OfModel
    terms = []
    for name in names.split(","):
        weight, _, name = name.rpartition("*")
        try:
            weight = float(weight or 1)
        except ValueError:
            raise ValueError(f"--reward {names}: {weight!r} is no weight") from None
        terms.append((weight, OfProgram(name) if ".py:" in name else of_model(name, tokenizer)))
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else Sum(terms)


class OfModel:
    """A reward model's score."""

    def __init__(self, folder, tokenizer):
        find(folder)
        tokenizer.check_same(folder)
        self.folder, self.model = folder, load_reward_model(folder).requires_grad_(False)
        self.networks = [self.model]

    def __call__(self, run, batch, prompts, answers):
        return run.map(lambda b: {"scores": self.model.score(b["tokens"], b["lengths"])}, batch)["scores"], {}


class OfProgram:
    """What a program says. What can be checked need not be learnt, and a program that checks it leaves no
    wrong guess to exploit."""
    folder, networks = None, []

    def __init__(self, name):
        self.function = load_function(name)

    def __call__(self, run, batch, prompts, answers):
        def check(rows):
            return {"scores": torch.tensor([self.function(*row) for row in rows])}
        return run.map(check, list(zip(prompts, answers)), batch["lengths"])["scores"], {}


class Sum:
    """A weighted sum of rewards. terms: (weight, reward)."""

    def __init__(self, terms):
        self.terms = terms
        self.networks = [network for _, reward in terms for network in reward.networks]
        self.folder = next((reward.folder for _, reward in terms if reward.folder), None)

    def __call__(self, run, batch, prompts, answers):
        scores, signs = 0.0, {}
        for weight, reward in self.terms:
            found, more = reward(run, batch, prompts, answers)
            scores, signs = scores + weight * found, signs | more
        return scores, signs
