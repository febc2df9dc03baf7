"""Instructions with rules that a program can check: demonstrations, prompts, and the reward.

    python -m lab.follow --model MODEL --data instructions.json       writes out/follow/

One to three rules of lab/rules.py are added to each instruction of --data, and an answer is changed until it
keeps them. The script writes

    demonstrations.jsonl        such prompts and answers, and the model's own to some without rules, for SFT
    preferences.jsonl           the same with the two answers of --data, for a reward model
    prompts.jsonl               other rules for the same instructions, for PPO and GRPO
    prompts_heldout.jsonl       instructions that are in none of these files
    prompts_new_kinds.jsonl     the same instructions with kinds of rules that are in no other file

Demonstrations start from the short answer of --data, from the model's own answer cut to at most six
sentences, and from a request to write one of them again: with few other words to imitate, a model learns the
rules in fewer steps. How short an answer may be is taken from the model's own answer to the instruction.

`kept` is the reward: ppo.py --reward lab/follow.py:kept. It needs no judge, but says nothing about how good
the answer is otherwise. `Quality` is a term for that.
"""
import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from data import loading, records
from data.batches import fit
from evaluate import Sampler, Sampling
from lab import rules
from runtime.files import refuse_existing
from runtime.flags import flag
from runtime.launch import main
from runtime.rewards import ModelReward

FOLDER = "out/follow"               # where everything is written, and where the rewards look for prompts
NEW_KINDS = ("Numbered", "Parentheses", "Start", "Question", "NoDigits")    # held out of training
KNOWN = [name for name in rules.KINDS if name not in NEW_KINDS]
HARD = ("Highlights", "Keywords", "Frequency", "Paragraphs", "Upper", "Lower", "CapitalWords", "TwoAnswers",
        "NoComma", "Bullets", "Quoted", "FirstWord")        # those that take most demonstrations to learn
REWRITE = ("Rewrite this text: {}", "Say this again:\n{}", 'Here is a text: "{}"\nWrite it in another form.')
SHORT = 0.6         # an answer is too short with a smaller share of the words that the model's own answer had


@dataclass
class Config(Sampling):
    model: str = flag("", "chat model that answers the instructions")
    data: str = flag("", "instructions with two answers each: a file of preferences")
    copies: int = flag(2, "demonstrations of each instruction, each with other rules", 1)
    temperature: float = flag(0.7, "of sampling; 0 is greedy", 0)
    max_new_tokens: int = flag(112, "longest answer, in tokens", 1)
    overwrite: bool = flag(False, f"replace the files that are in {FOLDER}")


def with_rules(request, answers, other, kinds, rng, most=3):
    """Add up to `most` rules to a request (text), and change its answers (texts) so that they keep them.
    other: a second answer, for rules that need two. kinds: {kind: how often it was used}, which is kept up;
    one rule is of the kind that was used least of those that suit the answers. Returns {"prompt", "rules",
    "words"} and the changed answers, where words is the number of words of the first one; or None."""
    for rarest in sorted(kinds, key=lambda kind: (kinds[kind], rng.random())):
        for _ in range(5):
            drawn = {rarest, *rng.sample(list(kinds), rng.randint(1, most) - 1)}
            some = [rules.KINDS[name].draw(rng, request, answers[0]) for name in rules.KINDS if name in drawn]
            if None in some or sum(rule.is_shape for rule in some) > 1:
                continue
            changed = answers
            for rule in some:
                changed = [rule.repair(answer, other, rng) for answer in changed]
            kept = all(rule.check(answer) for rule in some for answer in changed)
            if kept and all(map(rules.words_of, [*answers, *changed])) and len(set(changed)) == len(answers):
                kinds.update({name: kinds[name] + 1 for name in drawn})
                record = {"prompt": together(request, some, rng), "words": len(changed[0].split()),
                          "rules": [rules.as_dict(rule) for rule in some]}
                return record, changed
    return None


def together(request, some, rng):
    """A request and some rules, in words. At times the rules come first, unless one says "above"."""
    said = " ".join(introduced(rule.text(rng), rng) for rule in rng.sample(some, len(some)))
    first = rng.random() < 0.2 and not any(isinstance(rule, rules.Repeat) for rule in some)
    return rng.choice([" ", "\n", "\n\n"]).join([said, request] if first else [request, said])


def introduced(sentence, rng):
    """A sentence, at times with words before it."""
    before = rng.choice([""] * 4 + ["Also, ", "And ", "Note: ", "Please note: "])
    return before + sentence[0].lower() + sentence[1:] if before else sentence


def shortened(text, rng):
    """The first one to six sentences of a text."""
    return " ".join(rules.sentences_of(" ".join(text.split()))[:rng.randint(1, 6)])


def whole(text, ended):
    """An answer; where sampling stopped before its end, without the unfinished sentence."""
    parts = rules.sentences_of(text.strip())
    return text.strip() if ended or not parts else text[:text.rindex(parts[-1])].strip()


def answer_all(cfg, preferences):
    """The model's own answers to those of the Preferences that it can read: pairs of both."""
    sampler = Sampler(cfg, [cfg.model])
    model = sampler.load(cfg.model)
    preferences = fit(preferences, lambda p: len(sampler.tokenizer.prompt(p.prompt)),
                      model.config.block_size - cfg.max_new_tokens, "instructions")
    print(f"{cfg.model} answers {len(preferences)} instructions ...", flush=True)
    batch = sampler.sample(model, [p.prompt for p in preferences], "follow")
    return list(zip(preferences, map(whole, sampler.texts(batch), batch["ended"].tolist())))


def training_files(cfg, answered, rng):
    """{name: records} of the files for training. answered: as from `answer_all`."""
    demonstrations, preferences, prompts = [], [], []
    turns = dict.fromkeys(KNOWN, 0) | dict.fromkeys(HARD, -len(answered) // 8)      # so they come more often
    for_demonstrations, for_preferences, for_prompts = dict(turns), dict(turns), dict(turns)
    for i, (p, own) in enumerate(answered):
        request, (best, *_, worst) = p.prompt[-1]["content"], ranked(p)
        for _ in range(cfg.copies):
            if made := with_rules(request, [own], best, for_prompts, rng):
                prompts.append(made[0])
        short = shortened(own, rng)
        text = rng.choice([best, short])
        for asked, answer in ((request, best), (request, short), (rng.choice(REWRITE).format(text), text)):
            if made := with_rules(asked, [answer], own, for_demonstrations, rng):
                demonstrations.append({"prompt": made[0]["prompt"], "response": made[1][0]})
        if i % 4 == 0 and own:          # so that the model still answers as before where there are no rules
            demonstrations.append({"prompt": request, "response": own})
        if i % 3 == 0 and (made := with_rules(request, [best, worst], own, for_preferences, rng)):
            chosen, rejected = made[1]
            preferences.append({"prompt": made[0]["prompt"], "chosen": chosen, "rejected": rejected})
    return {"demonstrations": demonstrations, "preferences": preferences, "prompts": prompts}


def held_out_files(answered, rng):
    """{name: records} of the files for evaluation."""
    files = {"prompts_heldout": (dict.fromkeys(KNOWN, 0), 3),
             "prompts_new_kinds": (dict.fromkeys(NEW_KINDS, 0), 1)}
    made = {name: [with_rules(p.prompt[-1]["content"], [own], ranked(p)[0], kinds, rng, most)
                   for p, own in answered] for name, (kinds, most) in files.items()}
    return {name: [pair[0] for pair in some if pair] for name, some in made.items()}


def ranked(preference):
    """The answers of a Preference, the best first."""
    return [text for _, text in sorted(zip(preference.ranks, preference.responses))]


def make(cfg):
    if not (cfg.model and cfg.data):
        raise ValueError("name a chat model with --model, and a file of preferences with --data")
    refuse_existing(f"{FOLDER}/prompts_new_kinds.jsonl", cfg.overwrite)             # the last one written
    train, held_out = loading.load("preferences", cfg.data, "", cfg.max_dropped)
    single = [p for p in train + held_out if len(p.prompt) == 1]
    if more := len(train) + len(held_out) - len(single):
        print(f"{more} instructions come after other turns: left out")
    seen, rng = {p.prompt[0]["content"] for p in train}, random.Random(cfg.seed)
    answered, kept_out = answer_all(cfg, single), {id(p) for p in held_out}
    for_training = [pair for pair in answered if id(pair[0]) not in kept_out]
    unseen = [pair for pair in answered if pair[0].prompt[0]["content"] not in seen]
    Path(FOLDER).mkdir(parents=True, exist_ok=True)
    for name, rows in (training_files(cfg, for_training, rng) | held_out_files(unseen, rng)).items():
        records.write(f"{FOLDER}/{name}.jsonl", rows)
        print(f"wrote {FOLDER}/{name}.jsonl: {len(rows)}")


# ---------------------------------------------------------------------------------------------- rewards

@functools.cache
def known_prompts():
    """{prompt: its record} of all prompts in FOLDER."""
    rows = [json.loads(line) for path in sorted(Path(FOLDER).glob("prompts*.jsonl"))
            for line in path.read_text("utf-8").split("\n") if line]
    return {row["prompt"]: row for row in rows}


def kept(messages, answer):
    """The share of its prompt's rules that an answer keeps, less up to a half where the answer is too short:
    many rules are most easily kept by saying next to nothing."""
    row = known_prompts()[messages[-1]["content"]]
    some = [rules.from_dict(rule) for rule in row["rules"]]
    share = sum(bool(answer.strip()) and rule.check(answer) for rule in some) / len(some)
    return share - 0.5 * max(0, 1 - len(answer.split()) / (SHORT * row["words"]))


class Quality(ModelReward):
    """The reward model's score, cut off at −2 and 2. Its scale gives the SFT model's answers mean 0 and
    standard deviation 1, so few answers that it knows lie beyond: such scores would be extrapolation."""

    def __init__(self, tokenizer):
        super().__init__(f"{FOLDER}/reward_model", tokenizer)

    def __call__(self, run, prompts, answers, batch):
        return super().__call__(run, prompts, answers, batch).clamp(-2, 2)


if __name__ == "__main__":
    main(Config, make, __doc__)
