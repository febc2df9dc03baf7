"""Instructions with rules that a program can check: demonstrations, prompts, and the reward.

    python -m lab.follow --model MODEL --data instructions.json       writes out/follow/

One to three rules of lab/rules.py are added to each instruction of --data, and an answer is changed until it
keeps them. Demonstrations start from the short answers of --data, because with few other words a model learns
the rules in the fewest steps. How long an answer may be is taken from the model's own answers. It gives

    demonstrations.jsonl        such prompts and answers, for SFT
    preferences.jsonl           the same with the two answers of --data, for a reward model
    prompts.jsonl               other rules for the same instructions, for PPO and GRPO
    prompts_heldout.jsonl       instructions that are in none of these files
    prompts_new_kinds.jsonl     the same instructions with kinds of rules that are in no other file

`kept` is the reward: ppo.py --reward lab/follow.py:kept. It needs no judge, but says nothing about how good
the answer is otherwise. `Quality` is a term for that.
"""
import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from data import loading, records
from evaluate import Sampler, Sampling
from lab import rules
from runtime.files import refuse_existing
from runtime.flags import flag
from runtime.launch import main
from runtime.rewards import ModelReward

FOLDER = "out/follow"                                   # where the rewards look for prompts and their rules
NEW_KINDS = ("Numbered", "Parentheses", "Start", "Question", "NoDigits")    # held out of training
FILES = ("demonstrations", "preferences", "prompts", "prompts_heldout", "prompts_new_kinds")
SHORT = 0.6             # an answer with a smaller share of the words of its demonstration counts as too short


@dataclass
class Config(Sampling):
    model: str = flag("", "chat model that answers the instructions")
    data: str = flag("", "instructions with two answers each: a file of preferences")
    out: str = flag(FOLDER, "folder to write")
    copies: int = flag(2, "demonstrations of each instruction, each with other rules", 1)
    temperature: float = flag(0.7, "of sampling; 0 is greedy", 0)
    max_new_tokens: int = flag(160, "longest answer, in tokens", 1)
    overwrite: bool = flag(False, "replace the files that are in --out")


def with_rules(request, answers, other, kinds, rng, most=3):
    """Add up to `most` rules to a request (text): {"prompt", "rules", "words"}, and its answers, changed to
    keep them. Draws again until all do; None if 50 draws are not enough. other: an answer for rules that want
    two; words: of the first answer, once changed."""
    for _ in range(50):
        drawn = rng.sample(kinds, rng.randint(1, most))
        some = [rules.KINDS[name].draw(rng, request, answers[0]) for name in rules.KINDS if name in drawn]
        if None in some:
            continue
        changed = answers
        for rule in some:
            changed = [rule.repair(answer, other, rng) for answer in changed]
        kept = all(rule.check(answer) for rule in some for answer in changed)
        if kept and all(map(rules.words_of, changed)) and len(set(changed)) == len(answers):
            said = " ".join(rule.text(rng) for rule in rng.sample(some, len(some)))
            record = {"prompt": request + rng.choice([" ", "\n", "\n\n"]) + said,
                      "rules": [rules.as_dict(rule) for rule in some], "words": len(changed[0].split())}
            return record, changed
    return None


def whole(text, ended):
    """An answer without the last sentence if that was cut off."""
    parts = rules.sentences_of(text.strip())
    return text.strip() if ended or len(parts) < 2 else text[:text.rindex(parts[-1])].strip()


def answer_all(cfg, preferences):
    """The model's own answers to the prompts of Preferences, without what was cut off."""
    sampler = Sampler(cfg, [cfg.model])
    print(f"{cfg.model} answers {len(preferences)} instructions ...", flush=True)
    batch = sampler.sample(sampler.load(cfg.model), [p.prompt for p in preferences], "follow")
    return [whole(*pair) for pair in zip(sampler.texts(batch), batch["ended"].tolist())]


def make(cfg):
    refuse_existing(f"{cfg.out}/prompts.jsonl", cfg.overwrite)
    train, held_out = loading.load("preferences", cfg.data, "", cfg.max_dropped)
    known = [name for name in rules.KINDS if name not in NEW_KINDS]
    files = {name: [] for name in FILES}
    rng = random.Random(cfg.seed)
    for i, (p, answer) in enumerate(zip(train + held_out, answer_all(cfg, train + held_out))):
        request = p.prompt[-1]["content"]
        best, *_, worst = [text for _, text in sorted(zip(p.ranks, p.responses))]

        def add(name, answers, other, kinds=known, most=3, write=lambda record, answers: record):
            if made := with_rules(request, answers, other, kinds, rng, most):
                files[name].append(write(*made))
        if i >= len(train):
            add("prompts_heldout", [answer], best)
            add("prompts_new_kinds", [answer], best, list(NEW_KINDS), 1)
            continue
        for _ in range(cfg.copies):
            add("prompts", [answer], best)
            add("demonstrations", [best], answer, write=lambda record, answers: {
                "prompt": record["prompt"], "response": answers[0]})
        if i % 4 == 0:                                      # without rules it should answer as before
            files["demonstrations"].append({"prompt": request, "response": answer})
        add("preferences", [best, worst], answer, write=lambda record, answers: {
            "prompt": record["prompt"], "chosen": answers[0], "rejected": answers[1]})
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        records.write(f"{cfg.out}/{name}.jsonl", rows)
        print(f"wrote {cfg.out}/{name}.jsonl: {len(rows)}")


# ---------------------------------------------------------------------------------------------- rewards

@functools.cache
def known_prompts():
    """{prompt: its record} of all prompts in FOLDER."""
    rows = [json.loads(line) for path in sorted(Path(FOLDER).glob("prompts*.jsonl"))
            for line in path.read_text("utf-8").splitlines()]
    return {row["prompt"]: row for row in rows}


def kept(messages, answer):
    """The share of its prompt's rules that an answer keeps, less up to 1 where the answer is too short: many
    rules are most easily kept by saying next to nothing."""
    row = known_prompts()[messages[-1]["content"]]
    some = [rules.from_dict(rule) for rule in row["rules"]]
    share = sum(bool(answer.strip()) and rule.check(answer) for rule in some) / len(some)
    return share - max(0, 1 - len(answer.split()) / (SHORT * row["words"]))


class Quality(ModelReward):
    """The reward model's score, cut off at −2 and 2 standard deviations. Few of the answers that it was
    trained on have scores beyond that: those would be guesses."""

    def __init__(self, tokenizer):
        super().__init__(f"{FOLDER}/reward_model", tokenizer)

    def __call__(self, run, prompts, answers, batch):
        return super().__call__(run, prompts, answers, batch).clamp(-2, 2)


if __name__ == "__main__":
    main(Config, make, __doc__)
