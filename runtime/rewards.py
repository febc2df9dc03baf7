"""What gives an answer its score: a reward model, a function, or a weighted sum of several.

    folder                                      a reward model
    file.py:function                            a Python function (messages, answer) -> number
    file.py:Class                               a class of your own: Class(tokenizer) is a reward
    0.3*folder,file.py:function                 their weighted sum

A reward is an object with

    networks                                    a list of frozen networks, which the caller places
    folder                                      of a network from which a value network can start, or None
    reward(run, prompts, answers, batch)        scores (B,)

for B answers: prompts are message lists, answers texts; batch holds their tokens (B, T), mask (B, T) and
lengths (B,).
"""
import importlib.util
import math
import os
import sys

import torch

from runtime.models import load_reward_model


def find_reward(names, tokenizer):
    """The reward that --reward names. tokenizer: that of the model whose answers are scored. Raises
    ValueError for what is not there, and for a reward model with another tokenizer."""
    terms = []
    for term in names.split(","):
        weight, _, name = term.rpartition("*")
        try:
            weight = float(weight or 1)
        except ValueError:
            raise ValueError(f"--reward {names}: the weight {weight!r} is not a number") from None
        reward = from_file(name, tokenizer) if ".py:" in name else ModelReward(name, tokenizer)
        terms.append((weight, reward, os.path.basename(os.path.normpath(name)).rpartition(":")[2]))
    return WeightedSum(terms)


class ModelReward:
    """The score of a reward model."""

    def __init__(self, folder, tokenizer):
        self.folder, self.model = folder, load_reward_model(folder).requires_grad_(False)
        self.networks = [self.model]
        tokenizer.check_same(folder)        # it reads ids, not texts

    def __call__(self, run, prompts, answers, batch):
        return run.score(self.model, batch)


class FunctionReward:
    """The number that a Python function gives. Where an answer can be checked, nothing has to be learnt, and
    there is no wrong guess to exploit."""
    folder, networks = None, []

    def __init__(self, function):
        self.function = function

    def __call__(self, run, prompts, answers, batch):
        def score(rows):
            return {"scores": torch.tensor([self.function(*row) for row in rows])}
        return run.map(score, list(zip(prompts, answers)), batch["lengths"])["scores"]


class WeightedSum:
    """Σ weight·score. terms: (weight, reward, name). Where there are several, the step's metrics hold the
    mean of each, by its name: so one sees which of them rises."""

    def __init__(self, terms):
        self.terms = terms
        self.networks = [network for _, reward, _ in terms for network in reward.networks]
        self.folder = next((reward.folder for _, reward, _ in terms if reward.folder), None)

    def __call__(self, run, prompts, answers, batch):
        scores = [reward(run, prompts, answers, batch) for _, reward, _ in self.terms]
        if len(self.terms) > 1:
            run.note(**{f"score_{i}_{name}": x.mean()
                        for i, (x, (_, _, name)) in enumerate(zip(scores, self.terms), 1)})
        return sum(weight * x for x, (weight, _, _) in zip(scores, self.terms))


def from_file(name, tokenizer):
    """The reward of `file.py:name`, a class or a function. The file may import modules beside it. An
    exception in a function, and a result that is not a finite number, become a ValueError that names the
    prompt."""
    path, _, called = name.rpartition(":")
    sys.path.append(os.path.dirname(os.path.abspath(path)))         # the function may import them later, too
    try:
        spec = importlib.util.spec_from_file_location("reward_function", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)     # dataclasses look there
        spec.loader.exec_module(module)
        function = getattr(module, called)
        if isinstance(function, type):
            return function(tokenizer)
    except Exception as e:                              # the code is the user's own
        raise ValueError(f"--reward {name}: {type(e).__name__}: {e}") from e

    def checked(messages, answer):
        try:
            number = float(function(messages, answer))
            if math.isfinite(number):
                return number
            wrong = f"returned {number}"
        except Exception as e:
            wrong = f"{type(e).__name__}: {e}"
        prompt = messages[-1]["content"]
        raise ValueError(f"--reward {name}: {wrong}, for the answer {answer[:80]!r} to {prompt[:80]!r}")
    return FunctionReward(checked)
