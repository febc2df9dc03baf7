"""Fresh preferences: a model answers prompts several times, and somebody says which answers are better.

    python -m feedback.collect --model out/ppo --by annotators    the world's simulated people rank them
    python -m feedback.collect --model out/ppo --by out/reward_model    a reward model does
    python -m feedback.collect --model out/ppo --by folder    a chat model that judges does: judge.py

Labels of answers that others gave say little about what this model does wrong, least of all once it has
learnt from them. Labels of its own answers do.
"""
import os
import random
from dataclasses import dataclass

from data import annotators, loading, records
from data.answers import sample, score
from data.batches import fit_prompts
from data.records import Preference
from data.tokenizer import Tokenizer
from feedback import judge
from runtime.compute import Compute, row_seeds
from runtime.flags import Settings, flag
from runtime.launch import main
from runtime.models import load


@dataclass
class Config(Settings):
    out: str = flag("out/feedback", "folder of what is written, preferences.jsonl")
    model: str = flag("out/sft", "model that answers")
    by: str = flag("annotators", "who ranks: annotators, a reward model, or a chat model that judges")
    data: str = flag(loading.WORLD, "prompts: a folder of the world's, or a file")
    prompts: int = flag(1000, "prompts drawn from them", 1)
    answers: int = flag(4, "answers to each", 2, 9)
    max_new_tokens: int = flag(48, "longest answer, in tokens", 1)


def labeller(by, run):
    """A function of prompts, lists of Answers to each and a random.Random, to the ranks of these answers. by:
    annotators, in panels of five as in the world's preferences, or a folder."""
    if by == "annotators":
        return lambda prompts, answers, rng: [annotators.rank(prompt, [a.text for a in some], rng, panel=5)
                                              for prompt, some in zip(prompts, answers)]
    tokenizer = Tokenizer.load(by)
    model = load(by, vocab_size=tokenizer.vocab_size).requires_grad_(False)
    run.place(model)

    def rank(prompts, answers, rng):
        scores = score if model.head_kind == "scalar" else judge_scores
        return [[1 + sum(other > x for other in some) for x in some]
                for some in scores(run, model, tokenizer, prompts, answers)]
    return rank


def judge_scores(run, model, tokenizer, prompts, answers):
    """How much a judge prefers each answer to the others: the sum of its d over its pairs (see judge.py)."""
    with open(judge.PRINCIPLES, encoding="utf-8") as f:
        principles = f.read().strip()
    places = [(n, i, j) for n, some in enumerate(answers) for i in range(len(some)) for j in range(i)]
    pairs = [Preference(prompts[n], [answers[n][i].text, answers[n][j].text], [1, 1]) for n, i, j in places]
    first, second = judge.ask_twice(run, model, tokenizer, principles, pairs)
    scores = [[0.0] * len(some) for some in answers]
    for (n, i, j), d in zip(places, ((first - second) / 2).tolist()):
        scores[n][i] += d
        scores[n][j] -= d
    return scores


def collect(cfg):
    tokenizer, run, rng = Tokenizer.load(cfg.model), Compute(cfg), random.Random(cfg.seed)
    model = load(cfg.model, "lm", tokenizer.vocab_size).requires_grad_(False)
    run.place(model)
    rank = labeller(cfg.by, run)
    prompts, _ = loading.load("prompts", cfg.data, "", cfg.max_dropped)
    prompts = fit_prompts(tokenizer, prompts, model.config.block_size - cfg.max_new_tokens, "prompts")
    chosen = rng.choices(prompts, k=cfg.prompts)
    seeds = row_seeds(rng, cfg.prompts * cfg.answers)
    answers = sample(run, model, tokenizer, chosen, cfg.answers, cfg.max_new_tokens, seeds)
    found = [{"prompt": prompt, "responses": [a.text for a in some], "ranks": ranks}
             for prompt, some, ranks in zip(chosen, answers, rank(chosen, answers, rng))
             if all(a.text.strip() for a in some)]
    os.makedirs(cfg.out, exist_ok=True)
    records.write(f"{cfg.out}/preferences.jsonl", found)
    print(f"wrote {len(found)} rankings to {cfg.out}/preferences.jsonl")


if __name__ == "__main__":
    main(Config, collect, __doc__)
