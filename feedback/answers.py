"""Sampled answers, as those who rank them see them."""
from dataclasses import dataclass


@dataclass
class Answer:
    text: str
    ids: list           # with the end token, if there is one
    ended: bool


def as_answers(batch, tokenizer, k):
    """A batch of Compute.sample with k rows for each prompt: for each prompt a list of k Answers."""
    ids = [tokens[mask].tolist() for tokens, mask in zip(batch["tokens"], batch["mask"])]
    answers = [Answer(tokenizer.decode(x), x, ended) for x, ended in zip(ids, batch["ended"].tolist())]
    return [answers[i:i + k] for i in range(0, len(answers), k)]
