"""Fresh preferences: a model answers prompts, each several times, and the answers are ranked.

    python -m feedback.collect --model out/ppo                          the world's simulated annotators rank
    python -m feedback.collect --model out/ppo --by out/reward_model    a reward model does
    python -m feedback.collect --model out/ppo --by folder              a chat model does: see judge.py

Labels of other models' answers say little about the mistakes of this one, least of all once it has learnt
from them. Labels of its own answers do.
"""
import os
import random
from dataclasses import dataclass
from functools import partial

import torch

from data import annotators, records
from data.tokenizer import Tokenizer
from feedback.answers import Sampling, answer_prompts
from feedback.judge import Judge
from runtime.compute import Compute, pad
from runtime.flags import flag
from runtime.launch import main
from runtime.models import load


@dataclass
class Config(Sampling):
    out: str = flag("out/feedback", "folder of preferences.jsonl, the rankings")
    by: str = flag("annotators", "who ranks: annotators, or the folder of a reward model or of a chat model")
    constitution: str = flag("", "file of the principles by which a chat model judges; none is "
                                 "feedback/principles.txt")


def labeller(by, run, tokenizer, constitution=""):
    """The function that ranks answers: rank(prompts, answers, rng) takes

        prompts   a list of message lists
        answers   for each prompt a list of answers with .text, .ids (with the end token) and .ended
        rng       random.Random, for the annotators' noise

    and returns for each prompt a list of ranks, 1 for the best; equal ranks are ties.

    by: "annotators", in panels of five as in the world's preferences; the folder of a reward model with the
    same tokenizer as the model that answers; or that of a chat model, which judges by the principles in
    the file `constitution`."""
    if by == "annotators":
        rank = rank_by_annotators
    else:
        own = Tokenizer.load(by)
        model = load(by, vocab_size=own.vocab_size).requires_grad_(False)
        run.place(model)
        if model.head_kind == "lm":
            return partial(rank_by, Judge(run, model, own, constitution).scores)
        tokenizer.check_same(by)
        rank = partial(rank_by, partial(reward_scores, run, model, tokenizer))
    if constitution:
        raise ValueError(f"--constitution is for a chat model that judges: --by {by} is none")
    return rank


def rank_by_annotators(prompts, answers, rng):
    return [annotators.rank(prompt, [a.text for a in some], rng, panel=5)
            for prompt, some in zip(prompts, answers)]


def rank_by(scores, prompts, answers, rng):
    return [[1 + sum(other > x for other in some) for x in some] for some in scores(prompts, answers)]


def reward_scores(run, model, tokenizer, prompts, answers):
    """A reward model's score of each answer: for each prompt a list. An answer without an end, which the
    model has never seen, gets −∞."""
    rows = [tokenizer.prompt(prompt) + a.ids for prompt, some in zip(prompts, answers) for a in some]

    def score(rows):
        lengths = torch.tensor([len(ids) for ids in rows], device=run.device)
        return {"scores": model.score(pad(rows).to(run.device), lengths)}
    scores = iter(run.map(score, rows, [len(ids) for ids in rows])["scores"].tolist())
    return [[x if a.ended else -torch.inf for a, x in zip(some, scores)] for some in answers]


def collect(cfg):
    run, rng = Compute(cfg), random.Random(cfg.seed)
    rank = labeller(cfg.by, run, Tokenizer.load(cfg.model), cfg.constitution)
    prompts, answers = zip(*answer_prompts(cfg, run, rng))
    rankings = [{"prompt": prompt, "responses": [a.text for a in some], "ranks": ranks}
                for prompt, some, ranks in zip(prompts, answers, rank(prompts, answers, rng))]
    os.makedirs(cfg.out, exist_ok=True)
    records.write(f"{cfg.out}/preferences.jsonl", rankings)
    print(f"wrote {len(rankings)} rankings to {cfg.out}/preferences.jsonl")


if __name__ == "__main__":
    main(Config, collect, __doc__)
