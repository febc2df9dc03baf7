"""An AI judge: a chat model that reads principles and says which of two answers is better.

    python -m feedback.judge --model folder --data pairs.jsonl    label pairs, and say how good the labels are

This is RLAIF (Bai et al. 2022, "Constitutional AI", section 4; Lee et al. 2023). The model writes nothing:
its preference is in the probabilities of "A" and "B" as the next token. Judges favour one of the two places,
so each pair is asked in both orders. With ℓ₁ = log p(A) − log p(B) where y₁ is A, and ℓ₂ the same where y₂ is
A, a preference d for y₁ and a bias b towards A give ℓ₁ = b + d and ℓ₂ = b − d. The bias cancels in
d = (ℓ₁ − ℓ₂)/2, and P(y₁ is better) = σ(d). This probability is written beside each pair: reward_model.py and
dpo.py learn from it as a soft label. feedback/collect.py has a judge rank the answers that a model samples.
"""
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from data import records
from data.batches import fit
from data.tokenizer import Tokenizer
from runtime.compute import Compute
from runtime.files import refuse_existing
from runtime.flags import Settings, flag
from runtime.launch import main
from runtime.models import load

PRINCIPLES = Path(__file__).with_name("principles.txt")
ASK = ("{principles}\n\nQuestion: {question}\n\nAnswer A: {a}\n\nAnswer B: {b}\n\n"
       "Which answer is better, A or B?")


@dataclass
class Config(Settings):
    out: str = flag("out/judge", "folder of labels.jsonl")
    model: str = flag("out/sft", "chat model that judges")
    data: str = flag("out/world/preferences_heldout.jsonl", "file of preferences")
    constitution: str = flag("", "file of the principles; none is feedback/principles.txt")
    overwrite: bool = flag(False, "replace the file that is in --out")


class Judge:
    """A chat model that compares two answers to a prompt by the principles in a file, by default
    principles.txt. A pair is (prompt as messages, text of the first answer, text of the second)."""

    def __init__(self, run, model, tokenizer, constitution=""):
        self.run, self.model, self.tokenizer = run, model, tokenizer
        self.principles = Path(constitution or PRINCIPLES).read_text("utf-8").strip()

    def question(self, prompt, a, b):
        """The question about a pair, as ids."""
        asked = "\n".join(message["content"] for message in prompt)
        text = ASK.format(principles=self.principles, question=asked, a=a, b=b)
        return self.tokenizer.prompt([{"role": "user", "content": text}])

    def log_odds(self, questions):
        """log p(A) − log p(B) as the next token after each of N questions (lists of ids), (N,)."""
        letters = [self.tokenizer.encode(letter)[:1] for letter in "AB"]
        rows = [ids + letter for ids in questions for letter in letters]
        longest, limit = max(map(len, rows)), self.model.config.block_size
        if longest > limit:
            raise ValueError(f"a question about two answers takes {longest} tokens: the judge reads {limit}")
        batch = self.run.batch(rows, starts=[len(ids) - 1 for ids in rows])
        a, b = self.run.logprobs(self.model, batch).sum(1).view(-1, 2).T
        return a - b

    def compare(self, pairs):
        """ℓ₁ and ℓ₂ of N pairs, (N,) each."""
        return (self.log_odds([self.question(prompt, a, b) for prompt, a, b in pairs]),
                self.log_odds([self.question(prompt, b, a) for prompt, a, b in pairs]))

    def scores(self, prompts, answers):
        """By how much each answer is preferred to the others to its prompt, the sum of d over its pairs: for
        each prompt a list. answers: for each prompt a list of objects with .text."""
        places = [(n, i, j) for n, some in enumerate(answers) for i in range(len(some)) for j in range(i)]
        first, second = self.compare([(prompts[n], answers[n][i].text, answers[n][j].text)
                                      for n, i, j in places])
        scores = [[0.0] * len(some) for some in answers]
        for (n, i, j), d in zip(places, ((first - second) / 2).tolist()):
            scores[n][i] += d
            scores[n][j] -= d
        return scores


def label(cfg):
    refuse_existing(f"{cfg.out}/labels.jsonl", cfg.overwrite)
    tokenizer, run = Tokenizer.load(cfg.model), Compute(cfg)
    model = load(cfg.model, "lm", tokenizer.vocab_size).requires_grad_(False)
    run.place(model)
    judge = Judge(run, model, tokenizer, cfg.constitution)
    preferences = [p for p in records.read("preferences", cfg.data, cfg.max_dropped) if p]
    pairs = [(p.prompt, p.responses[better], p.responses[worse])
             for p in preferences for better, worse in p.pairs]
    pairs = fit(pairs, lambda pair: 1 + len(judge.question(*pair)), model.config.block_size, "pairs")
    first, second = judge.compare(pairs)
    d, place = (first - second) / 2, torch.cat([first, second]).sigmoid().mean()
    changed = ((first > 0) == (second > 0)).float().mean()
    right = torch.cat([first > 0, second < 0]).float().mean()
    print(f"{len(pairs)} pairs: the answer at the first place is preferred with {place:.1%} on average, 50% "
          f"would be no bias; {changed:.1%} of the choices change with the order\n"
          f"agrees with the labels on {right:.1%} asked in one order, {(d > 0).float().mean():.1%} in both")
    labels = []
    for (prompt, a, b), p in zip(pairs, d.sigmoid().tolist()):
        chosen, rejected = (a, b) if p >= 0.5 else (b, a)
        labels.append({"prompt": prompt, "chosen": chosen, "rejected": rejected,
                       "probability": round(max(p, 1 - p), 4)})
    os.makedirs(cfg.out, exist_ok=True)
    records.write(f"{cfg.out}/labels.jsonl", labels)
    print(f"wrote {cfg.out}/labels.jsonl")


if __name__ == "__main__":
    main(Config, label, __doc__)
