"""What a model answers, and what a reward model thinks of it."""
from dataclasses import dataclass

import torch

from runtime import pad


@dataclass
class Answer:
    ids: list           # with the token that ends it, if it ends
    text: str
    ended: bool


def sample(run, model, tokenizer, prompts, k, max_new_tokens, seeds, temperature=1.0):
    """k Answers to each prompt (message lists): a list of lists. seeds: one for each answer."""
    rows = [tokenizer.prompt(prompt) for prompt in prompts for _ in range(k)]
    found = run.sample(model, rows, seeds, max_new_tokens, temperature, tokenizer.end)
    ids = [tokens[mask].tolist() for tokens, mask in zip(found["tokens"], found["mask"])]
    answers = [Answer(x, tokenizer.decode(x), ended) for x, ended in zip(ids, found["ended"].tolist())]
    return [answers[i:i + k] for i in range(0, len(answers), k)]


def score(run, model, tokenizer, prompts, answers):
    """A reward model's scores of the Answers to each prompt: a list of lists. One without an end, which the
    model has never seen, is worse than any other."""
    pairs = [(p, a) for p, some in zip(prompts, answers) for a in some]
    rows = [tokenizer.prompt(p) + a.ids for p, a in pairs]

    def read(rows):
        lengths = torch.tensor([len(ids) for ids in rows], device=run.device)
        return {"scores": model.score(pad(rows).to(run.device), lengths)}
    found = run.map(read, rows, [len(ids) for ids in rows])["scores"].tolist()
    flat = iter([x if a.ended else -torch.inf for x, (_, a) in zip(found, pairs)])
    return [[next(flat) for _ in some] for some in answers]
