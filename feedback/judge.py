"""An AI judge in people's place: a chat model reads principles, and says which of two answers is better.

    python -m feedback.judge --model folder --data pairs.jsonl    label pairs, and say how often people agree
    python -m feedback.judge --model folder --data prompts.jsonl    label pairs of the model's own answers

This is RLAIF (Bai et al. 2022, "Constitutional AI", section 4; Lee et al. 2023). The model does not write: it
only says how likely "A" and "B" are as the next token. Judges favour a place, so each pair is asked in both
orders. With ℓ₁ = log p(A) − log p(B) where y₁ is A, ℓ₂ the same where y₂ is A, a preference d for y₁ and a
bias b towards A, ℓ₁ = b + d and ℓ₂ = b − d; so b is gone from P(y₁ is better) = σ(d), d = (ℓ₁ − ℓ₂)/2.
This probability is written beside each pair: reward_model.py and dpo.py learn from it as from a soft label.
"""
import itertools
import os
import random
from dataclasses import dataclass

import torch

from data import records
from data.answers import Answer, sample, score
from data.batches import fit, fit_prompts
from data.tokenizer import Tokenizer
from runtime.compute import Compute, pad, row_seeds
from runtime.flags import Settings, flag
from runtime.launch import main
from runtime.models import load, load_reward_model

PRINCIPLES = os.path.join(os.path.dirname(__file__), "principles.txt")
ASK = ("{principles}\n\nQuestion: {question}\n\nAnswer A: {a}\n\nAnswer B: {b}\n\n"
       "Which answer is better, A or B?")


@dataclass
class Config(Settings):
    out: str = flag("out/judge", "folder of the labels, labels.jsonl")
    model: str = flag("out/sft", "chat model that judges")
    data: str = flag("out/world/preferences_heldout.jsonl", "file of preferences, or of prompts")
    reward: str = flag("", "reward model to be compared with, where the pairs are labelled")
    constitution: str = flag("", "file of the principles that it judges by; none is feedback/principles.txt")
    max_new_tokens: int = flag(64, "longest answer to a prompt that comes without any, in tokens", 1)


def question(tokenizer, principles, prompt, a, b):
    """What the judge is asked of two answers to a prompt (messages), as ids."""
    asked = "\n".join(m["content"] for m in prompt)
    text = ASK.format(principles=principles, question=asked, a=a, b=b)
    return tokenizer.prompt([{"role": "user", "content": text}])


def log_odds(run, model, tokenizer, questions):
    """log p(A) − log p(B) after each question (a list of ids), (N,)."""
    letters = [tokenizer.encode(letter)[:1] for letter in "AB"]

    def ask(rows):
        both = [ids + letter for ids in rows for letter in letters]
        last = pad([[False] * len(ids) + [True] for ids in rows for _ in letters])
        a, b = model.logprobs(pad(both).to(run.device), last.to(run.device)).sum(1).view(-1, 2).T
        return {"odds": a - b}
    return run.map(ask, questions, [[len(ids) + 1] * 2 for ids in questions])["odds"]


def ask_twice(run, model, tokenizer, principles, pairs):
    """ℓ₁ and ℓ₂ of Preferences for pairs, (N,) each: asked in their own order, and in the other one."""
    return [log_odds(run, model, tokenizer, [question(tokenizer, principles, p.prompt, *p.responses[::step])
                                             for p in pairs]) for step in (1, -1)]


def preferred(run, model, tokenizer, pairs):
    """P(the first answer is the better one) = σ(d) of Preferences for pairs, by principles.txt: a list.
    Raises ValueError where a question is longer than the judge reads."""
    if not pairs:
        return []
    with open(PRINCIPLES, encoding="utf-8") as f:
        principles = f.read().strip()
    longest = 1 + max(len(question(tokenizer, principles, p.prompt, *p.responses)) for p in pairs)
    if longest > model.config.block_size:
        raise ValueError(f"{model.folder} reads {model.config.block_size} tokens, and a question about two "
                         f"answers takes {longest}: it cannot judge them")
    first, second = ask_twice(run, model, tokenizer, principles, pairs)
    return ((first - second) / 2).sigmoid().tolist()


def read_pairs(cfg, run, model, tokenizer):
    """Every two answers that a file's preferences tell apart, as Preferences with the better one first; or if
    it holds prompts, two samples for each, which tie."""
    try:
        preferences = [p for p in records.read("preferences", cfg.data, cfg.max_dropped) if p]
    except records.RecordError:
        prompts = [p for p in records.read("prompts", cfg.data, cfg.max_dropped) if p]
        prompts = fit_prompts(tokenizer, prompts, model.config.block_size - cfg.max_new_tokens, "prompts")
        seeds = row_seeds(random.Random(cfg.seed), 2 * len(prompts))
        answers = sample(run, model, tokenizer, prompts, 2, cfg.max_new_tokens, seeds)
        return [records.Preference(p, [a.text, b.text], [1, 1]) for p, (a, b) in zip(prompts, answers)
                if a.text != b.text and a.text.strip() and b.text.strip()]
    return [records.Preference(p.prompt, [p.responses[i], p.responses[j]], [1, 2]) for p in preferences
            for i, j in itertools.permutations(range(len(p.ranks)), 2) if p.ranks[i] < p.ranks[j]]


def rewarded(run, folder, pairs):
    """Whether a reward model scores the first answer higher, (N,)."""
    tokenizer, model = Tokenizer.load(folder), load_reward_model(folder).requires_grad_(False)
    run.place(model)
    answers = [[Answer(tokenizer.response(text), text, True) for text in p.responses] for p in pairs]
    scores = torch.tensor(score(run, model, tokenizer, [p.prompt for p in pairs], answers))
    return scores[:, 0] > scores[:, 1]


def judge(cfg):
    with open(cfg.constitution or PRINCIPLES, encoding="utf-8") as f:
        principles = f.read().strip()
    tokenizer, run = Tokenizer.load(cfg.model), Compute(cfg)
    model = load(cfg.model, "lm", tokenizer.vocab_size).requires_grad_(False)
    run.place(model)
    pairs = fit(read_pairs(cfg, run, model, tokenizer),
                lambda p: 1 + len(question(tokenizer, principles, p.prompt, *p.responses)),
                model.config.block_size, "pairs", max_dropped=cfg.max_dropped)
    first, second = ask_twice(run, model, tokenizer, principles, pairs)
    d, same = (first - second) / 2, ((first > 0) == (second > 0)).float().mean()
    place = torch.cat([first, second]).sigmoid().mean()
    print(f"{len(pairs)} pairs: what stands first is preferred with {place:.1%} on average, 50% would be no "
          f"bias; {same:.1%} of the choices change with the order")
    if pairs[0].ranks == [1, 2]:                                    # there are labels
        one_order = ((first > 0).float() + (second < 0).float()).mean() / 2
        print(f"agrees with the labels on {one_order:.1%} asked in one order, {(d > 0).float().mean():.1%} "
              f"in both; on every tenth pair, {(d[9::10] > 0).float().mean():.1%}")
        if cfg.reward:
            right = rewarded(run, cfg.reward, pairs).float()
            print(f"{cfg.reward} agrees on {right.mean():.1%}; "
                  f"on every tenth pair, {right[9::10].mean():.1%}")
    found = []
    for pair, p in zip(pairs, d.sigmoid().tolist()):
        chosen, rejected = pair.responses if p >= 0.5 else pair.responses[::-1]
        found.append({"prompt": pair.prompt, "chosen": chosen, "rejected": rejected,
                      "probability": round(max(p, 1 - p), 4)})
    os.makedirs(cfg.out, exist_ok=True)
    records.write(f"{cfg.out}/labels.jsonl", found)
    print(f"wrote {cfg.out}/labels.jsonl")


if __name__ == "__main__":
    main(Config, judge, __doc__)
