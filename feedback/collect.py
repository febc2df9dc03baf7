"""Fresh preferences: a model answers prompts, each several times, and the answers are ranked.

    python -m feedback.collect --model out/ppo                          by the world's simulated annotators
    python -m feedback.collect --model out/ppo --by out/reward_model    by a reward model
    python -m feedback.collect --model out/ppo --by folder              by a chat model: see judge.py
    python -m feedback.collect --model out/ppo --by person              by nobody yet: see label.py

Labels of other models' answers say little about the mistakes of this one, least of all once it has learnt
from them. Labels of its own answers do.
"""
import math
import os
import random
from dataclasses import dataclass
from functools import partial

import torch

from data import annotators, loading, records
from data.batches import fit_prompts
from data.tokenizer import Tokenizer
from feedback.judge import Judge
from runtime.compute import Compute, row_seeds
from runtime.files import refuse_existing
from runtime.flags import Settings, flag
from runtime.launch import main
from runtime.models import load


@dataclass
class Config(Settings):
    out: str = flag("out/feedback", "folder of preferences.jsonl, or of tasks.jsonl for a person")
    model: str = flag("out/sft", "model that answers")
    by: str = flag("annotators", "annotators, person, or the folder of a reward model or of a chat model")
    constitution: str = flag("", "file of a chat model's principles; none is feedback/principles.txt")
    data: str = flag(loading.WORLD, "prompts: a file, or a folder of the world's files")
    prompts: int = flag(1000, "prompts drawn at random", 1)
    answers: int = flag(4, "answers sampled to each prompt; equal ones count once", 2, 9)
    temperature: float = flag(1.0, "sampling temperature; 0 is greedy", 0)
    max_new_tokens: int = flag(48, "longest answer, in tokens", 1)
    overwrite: bool = flag(False, "replace the file that is in --out")


@dataclass
class Answer:
    text: str
    ids: list           # with the end token, if there is one
    ended: bool


def as_answers(tokenizer, batch, k):
    """A batch of Compute.sample with k rows for each prompt: for each prompt a list of k Answers."""
    ids = [tokens[mask].tolist() for tokens, mask in zip(batch["tokens"], batch["mask"])]
    answers = [Answer(tokenizer.decode(x), x, ended) for x, ended in zip(ids, batch["ended"].tolist())]
    return [answers[i:i + k] for i in range(0, len(answers), k)]


def answer_prompts(cfg, run, tokenizer, rng):
    """cfg.model's Answers to cfg.prompts prompts, all of which are drawn once before one comes again. Returns
    (prompt, its different Answers) for each prompt that got at least two; ValueError if none did."""
    model = load(cfg.model, "lm", tokenizer.vocab_size).requires_grad_(False)
    run.place(model)
    prompts, _ = loading.load("prompts", cfg.data, "", cfg.max_dropped)
    room = model.config.block_size - cfg.max_new_tokens
    prompts = fit_prompts(tokenizer, prompts, room, "prompts")
    times = math.ceil(cfg.prompts / len(prompts))
    drawn = [p for _ in range(times) for p in rng.sample(prompts, len(prompts))][:cfg.prompts]
    print(f"{cfg.model} answers {len(drawn)} prompts {cfg.answers} times ...", flush=True)
    rows = [tokenizer.prompt(p) for p in drawn for _ in range(cfg.answers)]
    batch = run.sample(model, rows, row_seeds(rng, len(rows)), cfg.max_new_tokens,
                       temperature=cfg.temperature, stop_token=tokenizer.end)
    different = [list({a.text: a for a in some if a.text.strip()}.values())
                 for some in as_answers(tokenizer, batch, cfg.answers)]
    answered = [(prompt, some) for prompt, some in zip(drawn, different) if len(some) > 1]
    if not answered:
        raise ValueError("no prompt got two different answers: a higher --temperature may give some")
    return answered


def labeller(by, run, tokenizer, constitution=""):
    """The function that ranks answers: rank(prompts, answers, rng) returns for each prompt a list of ranks, 1
    for the best; equal ranks are ties. prompts: a list of message lists; answers: for each a list of Answers;
    rng: random.Random, for the annotators' noise.

    by: "annotators", in panels of five as in the world's preferences; the folder of a reward model, which
    must have the tokenizer of the model that answers; or the folder of a chat model, which judges by the
    principles in the file `constitution`."""
    model = None
    if by != "annotators":
        own = Tokenizer.load(by)
        model = load(by, vocab_size=own.vocab_size).requires_grad_(False)
        run.place(model)
    if model and model.head_kind == "lm":
        scores = Judge(run, model, own, constitution).scores
    elif constitution:
        raise ValueError(f"--constitution is for a chat model that judges, and {by} is none")
    elif model:
        tokenizer.check_same(by)
        scores = partial(reward_scores, run, model, tokenizer)
    else:
        return lambda prompts, answers, rng: [annotators.rank(prompt, [a.text for a in some], rng, panel=5)
                                              for prompt, some in zip(prompts, answers)]
    return lambda prompts, answers, rng: [[1 + sum(other > x for other in some) for x in some]
                                          for some in scores(prompts, answers)]


def reward_scores(run, model, tokenizer, prompts, answers):
    """A reward model's score of each answer: for each prompt a list. An answer without an end, which the
    model has never seen, gets −∞."""
    rows = [tokenizer.prompt(prompt) + a.ids for prompt, some in zip(prompts, answers) for a in some]
    scores = iter(run.score(model, run.batch(rows)).tolist())
    return [[x if a.ended else -torch.inf for a, x in zip(some, scores)] for some in answers]


def collect(cfg):
    person = cfg.by == "person"                     # who ranks later: until then all answers tie
    file = os.path.join(cfg.out, "tasks.jsonl" if person else "preferences.jsonl")
    refuse_existing(file, cfg.overwrite)
    tokenizer, run, rng = Tokenizer.load(cfg.model), Compute(cfg), random.Random(cfg.seed)
    if person and cfg.constitution:
        raise ValueError("--constitution is for a chat model that judges, and person is none")
    rank = None if person else labeller(cfg.by, run, tokenizer, cfg.constitution)
    prompts, answers = zip(*answer_prompts(cfg, run, tokenizer, rng))
    ranks = [[1] * len(some) for some in answers] if person else rank(prompts, answers, rng)
    rankings = [{"prompt": prompt, "responses": [a.text for a in some], "ranks": places}
                for prompt, some, places in zip(prompts, answers, ranks)]
    os.makedirs(cfg.out, exist_ok=True)
    records.write(file, rankings)
    print(f"wrote {file}: answers to {len(rankings)} prompts")


if __name__ == "__main__":
    main(Config, collect, __doc__)
