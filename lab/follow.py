"""Instructions with rules that a program can check: demonstrations, prompts, and the reward.

    python -m lab.follow --model MODEL --data instructions.json       writes out/follow/

One to three rules of lab/rules.py are added to each instruction of --data, and to requests for longer texts
("Write a letter about bees."). Answers to them are changed to keep the rules; where that fails, other rules
are drawn. Every tenth record of --data is held out, and every tenth topic. The script writes

    demonstrations.jsonl            prompts with rules and answers that keep them, for SFT; and, for some
                                    instructions without rules, the model's own answers
    demonstrations_heldout.jsonl    the same of held-out instructions, for the held-out loss of SFT
    preferences.jsonl               prompts with rules and both answers of --data, which are changed to keep
                                    them, for a reward model
    prompts.jsonl                   prompts with other rules, for PPO and GRPO
    prompts_heldout.jsonl           held-out instructions with rules of the same kinds
    prompts_new_kinds.jsonl         held-out instructions with rules of kinds that are in no other file

A demonstration's answer is the better one of --data or the model's own, whole or cut to its first sentences;
every fifth demonstration asks to write such an answer again. Most answers are short, because then most of
what the model learns to imitate is the rules. The longer ones are for rules that need text, such as "the
letter e at least 20 times".

`kept` is the reward: ppo.py --reward lab/follow.py:kept. It needs no judge, but says nothing about how good
the answer is otherwise. `Quality` is a term for that.
"""
import functools
import json
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from data import loading, records
from data.batches import fit
from evaluate import Sampler, Sampling
from lab import rules
from runtime.files import write_json
from runtime.flags import flag
from runtime.inputs import checksum, fingerprints
from runtime.launch import main
from runtime.rewards import ModelReward

FOLDER = "out/follow"               # where everything is written, and where the rewards look for prompts
NEW_KINDS = ("Numbered", "Parentheses", "Start", "Question", "NoDigits")    # held out of training
KNOWN = [name for name in rules.KINDS if name not in NEW_KINDS]
HARD = ("Highlights", "Keywords", "Frequency", "Paragraphs", "Upper", "Lower", "CapitalWords", "TwoAnswers",
        "NoComma", "Bullets", "Quoted", "FirstWord")        # kept least often, on our own held-out prompts,
                                                            # after a first trial of SFT
REWRITE = ('Rewrite this text: "{}"', 'Say this again: "{}"', 'Write this in another form: "{}"')
GENRES = ("a short story", "a letter", "an advertisement", "a blog post", "an email", "a speech", "a song",
          "a poem", "some advice", "an encyclopedia article", "a dialogue", "a review", "an essay",
          "a news report", "a riddle", "a limerick", "a product description", "a lesson plan", "an itinerary",
          "a proposal", "a joke", "a newsletter", "a list of questions", "a template")
TOPICS = ("bees", "a rainy day", "an old bicycle", "learning to cook", "a lost dog", "the history of bread",
          "a trip to the sea", "saving money", "a small bakery", "the first day at school", "a lighthouse",
          "growing tomatoes", "electric cars", "sleeping well", "a chess club", "the moon", "coffee",
          "a family dinner", "work in a library", "recycling", "learning Spanish", "a haunted house",
          "running a marathon", "parks in the city", "moving to another town", "a robot", "winter holidays",
          "a wedding", "old computers", "public transport")
NEW_TOPICS = TOPICS[::10]           # held out
READERS = ("", " for children", " for a newspaper", " for my neighbours", " for a museum")
SHORT = 0.6         # an answer with fewer than this share of the words of the model's own answer is too short


@dataclass
class Config(Sampling):
    model: str = flag("", "chat model that answers the instructions")
    data: str = flag("", "instructions with two answers each: a file of preferences")
    temperature: float = flag(0.7, "of sampling; 0 is greedy", 0)
    max_new_tokens: int = flag(112, "longest answer, in tokens", 1)
    overwrite: bool = flag(False, f"replace the files that are in {FOLDER}")


def with_rules(request, answers, other, kinds, rng, most=3):
    """Add up to `most` rules to a request (text), and change its answers (texts) so that they keep them.

    other: a second answer, for rules that need two. kinds: {kind: number of its uses so far}, to which this
    function adds. One rule is always of the least used kind that suits the answers, so that all kinds come
    about equally often. Returns {"prompt", "rules", "words"} and the changed answers, where words is the
    number of words of the first one; or None where no kind suits."""
    for rarest in sorted(kinds, key=lambda kind: (kinds[kind], rng.random())):
        for _ in range(5):                                                  # other parameters, other company
            drawn = {rarest, *rng.sample(list(kinds), rng.randint(1, most) - 1)}
            some = [rules.KINDS[name].draw(rng, request, answers[0]) for name in rules.KINDS if name in drawn]
            if None in some or sum(rule.is_shape for rule in some) > 1:
                continue
            changed = answers
            for rule in some:
                changed = [rule.repair(answer, other, rng) for answer in changed]
            kept = all(rule.check(answer) for rule in some for answer in changed)
            full = all(rules.words_of(answer) for answer in [*answers, *changed])
            if kept and full and len(set(changed)) == len(answers):         # two answers must stay two
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


def divided(text, rng):
    """The first one to six sentences of a text, and the rest."""
    parts, n = rules.sentences_of(" ".join(text.split())), rng.randint(1, 6)
    return " ".join(parts[:n]), " ".join(parts[n:])


def whole(text, ended):
    """An answer; where sampling stopped before its end, without the unfinished sentence."""
    parts = rules.sentences_of(text.strip())
    return text.strip() if ended or not parts else text[:text.rindex(parts[-1])].strip()


class Answered(NamedTuple):
    """A request and three answers to it. Nobody has ranked answers to requests of `longer`: then better and
    worse are empty."""
    request: str
    own: str                # the model's own answer
    better: str
    worse: str


def longer(topics, n, rng):
    """n different requests for texts of some length, as `answer_all` takes them: with no other answers."""
    every = [(f"Write {genre} about {topic}{reader}.", "", "")
             for genre in GENRES for topic in topics for reader in READERS]
    return rng.sample(every, min(n, len(every)))


def answer_all(cfg, asked):
    """asked: (request, better, worse). Returns those that the model can read, with its answers."""
    sampler = Sampler(cfg, [cfg.model])
    model = sampler.load(cfg.model)
    said = [[{"role": "user", "content": request}] for request, *_ in asked]
    fits = fit(list(zip(asked, said)), lambda pair: len(sampler.tokenizer.prompt(pair[1])),
               model.config.block_size - cfg.max_new_tokens, "instructions")
    print(f"{cfg.model} answers {len(fits)} instructions ...", flush=True)
    batch = sampler.sample(model, [prompt for _, prompt in fits], "follow")
    own = map(whole, sampler.texts(batch), batch["ended"].tolist())
    return [Answered(request, text, better, worse) for ((request, better, worse), _), text in zip(fits, own)]


def counts(n):
    """The number of uses of each kind, as `with_rules` takes it, before n records are made. Hard kinds start
    with a lower count, so that they are drawn more often."""
    return dict.fromkeys(KNOWN, 0) | dict.fromkeys(HARD, -n // 20)


def demonstrations_of(answered, kinds, rng):
    """Records {"prompt", "response"}. answered: a list of Answered; kinds: as in `with_rules`."""
    records = []
    for i, x in enumerate(answered):
        short, rest = divided(x.own, rng)
        # A second answer, where a rule needs one, must not begin like the first.
        cut, other = rng.choice([(x.better, x.own), (short, x.better)]) if x.better else (short, rest)
        again = [(rng.choice(REWRITE).format(cut), cut, "")] * (i % 2)
        for asked, answer, other in [(x.request, x.own, x.better), (x.request, cut, other)] + again:
            if made := with_rules(asked, [answer], other, kinds, rng):
                records.append({"prompt": made[0]["prompt"], "response": made[1][0]})
        if i % 8 == 0 and x.own:        # so that the model still answers as before where there are no rules
            records.append({"prompt": x.request, "response": x.own})
    return records


def training_files(answered, rng):
    """{name: records} of the files for training. answered: a list of Answered."""
    n = len(answered)
    demonstrations = demonstrations_of(answered, counts(5 * n // 2), rng)
    preferences, prompts, for_preferences, for_prompts = [], [], counts(n // 3), counts(2 * n)
    for i, x in enumerate(answered):
        for _ in range(2):                                                  # each with other rules
            if made := with_rules(x.request, [x.own], x.better, for_prompts, rng):
                prompts.append(made[0])
        if i % 3 == 0 and x.better and (
                made := with_rules(x.request, [x.better, x.worse], x.own, for_preferences, rng)):
            chosen, rejected = made[1]
            preferences.append({"prompt": made[0]["prompt"], "chosen": chosen, "rejected": rejected})
    return {"demonstrations": demonstrations, "preferences": preferences, "prompts": prompts}


def held_out_files(answered, rng):
    """{name: records} of the files for evaluation."""
    files = {"prompts_heldout": (dict.fromkeys(KNOWN, 0), 3),
             "prompts_new_kinds": (dict.fromkeys(NEW_KINDS, 0), 1)}
    made = {name: [with_rules(x.request, [x.own], x.better, kinds, rng, most) for x in answered]
            for name, (kinds, most) in files.items()}
    prompts = {name: [pair[0] for pair in some if pair] for name, some in made.items()}
    return {"demonstrations_heldout": demonstrations_of(answered, dict.fromkeys(KNOWN, 0), rng)} | prompts


def ranked(preference):
    """The answers of a Preference, the best first."""
    return [text for _, text in sorted(zip(preference.ranks, preference.responses))]


def make(cfg):
    if not (cfg.model and cfg.data):
        raise ValueError("name a chat model with --model, and a file of preferences with --data")
    code = {os.path.basename(path): checksum(path) for path in (__file__, rules.__file__)}
    about = asdict(cfg) | {"inputs": fingerprints(cfg) | code}
    del about["overwrite"]
    path = Path(FOLDER, "about.json")                           # written last
    if path.exists() and not cfg.overwrite:
        made = json.loads(path.read_text("utf-8"))
        if made != about:
            differ = [name for name in about if about[name] != made.get(name)]
            raise ValueError(f"{FOLDER} was made with other settings ({', '.join(differ)}): --overwrite "
                             "replaces it")
        print(f"{FOLDER} is there already; --overwrite would make it again")
        return
    train, held_out = loading.load("preferences", cfg.data, "", cfg.max_dropped)
    asked, unseen = [[(p.prompt[0]["content"], ranked(p)[0], ranked(p)[-1])
                      for p in part if len(p.prompt) == 1] for part in (train, held_out)]
    if more := len(train) + len(held_out) - len(asked) - len(unseen):
        print(f"{more} instructions come after other messages: left out")
    # An instruction that is in both parts is for training. Its held-out copies are dropped.
    seen = {request for request, *_ in asked}
    unseen = [x for x in unseen if x[0] not in seen]
    if not unseen:
        raise ValueError(f"{cfg.data}: no held-out instruction that is not among those for training too")
    rng = random.Random(cfg.seed)
    asked += longer([topic for topic in TOPICS if topic not in NEW_TOPICS], len(asked) // 2, rng)
    unseen += longer(NEW_TOPICS, len(unseen) // 2, rng)
    answered, kept_out = answer_all(cfg, asked + unseen), {request for request, *_ in unseen}
    for_training = [x for x in answered if x.request not in kept_out]
    held_out = [x for x in answered if x.request in kept_out]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)                    # an interrupted run must not look like a finished one
    for name, rows in (training_files(for_training, rng) | held_out_files(held_out, rng)).items():
        records.write(f"{FOLDER}/{name}.jsonl", rows)
        print(f"wrote {FOLDER}/{name}.jsonl: {len(rows)}")
    write_json(str(path), about)


# ---------------------------------------------------------------------------------------------- rewards

@functools.cache
def known_prompts():
    """{prompt: its record} of all prompts in FOLDER."""
    rows = [json.loads(line) for path in sorted(Path(FOLDER).glob("prompts*.jsonl"))
            for line in path.read_text("utf-8").split("\n") if line]
    return {row["prompt"]: row for row in rows}


def kept(messages, answer):
    """The share of its prompt's rules that an answer keeps, minus a penalty for a short answer, at most 0.5:
    many rules are most easily kept by saying next to nothing."""
    row = known_prompts().get(messages[-1]["content"])
    if row is None:
        raise ValueError(f"this prompt is not in {FOLDER}/prompts*.jsonl, which hold the rules")
    some = [rules.from_dict(rule) for rule in row["rules"]]
    share = sum(bool(answer.strip()) and rule.check(answer) for rule in some) / len(some)
    return share - 0.5 * max(0, 1 - len(answer.split()) / (SHORT * row["words"]))


class Quality(ModelReward):
    """The reward model's score, cut off at −2 and 2. The answers of the model that it started from have mean
    score 0 and standard deviation 1. So few of them score beyond ±2, where its score is unreliable."""

    def __init__(self, tokenizer):
        super().__init__(f"{FOLDER}/reward_model", tokenizer)

    def __call__(self, run, prompts, answers, batch):
        return super().__call__(run, prompts, answers, batch).clamp(-2, 2)


if __name__ == "__main__":
    main(Config, make, __doc__)
