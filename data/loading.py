"""From --data to records: which files are read, how the embedded world's are made, what is held out."""
import os
import random
import time
import warnings
from pathlib import Path

from data import annotators, records, world
from data.batches import fit_prompts
from data.tokenizer import Tokenizer, learn
from runtime.files import write_json

WORLD = "out/world"         # the folder of the embedded world's files, which are made when they are asked for
# The numbers of the world's training records, and of its held-out demonstrations and preferences.
DEMONSTRATIONS, PREFERENCES, HELD_OUT_RECORDS = 26000, 10000, 500


def make_world(folder, seed=0):
    """Write the embedded world's demonstrations, preferences and prompts, each with a held-out part, its
    development prompts, and its tokenizer, into a folder. The same seed writes the same bytes. run.json holds
    the seed and the time that it took; while the files are written there is none."""
    rng, started = random.Random(seed), time.time()
    os.makedirs(folder, exist_ok=True)
    Path(folder, "run.json").unlink(missing_ok=True)
    records.write(f"{folder}/prompts_development.jsonl",
                  [{"prompt": item.prompt} for item in world.items() if item.part == "development"])
    # Held-out rankings come from one person each, because that is what a reward model has to predict.
    for suffix, n_demonstrations, n_preferences, panel in (
            ("", DEMONSTRATIONS, PREFERENCES, 5), ("_heldout", HELD_OUT_RECORDS, HELD_OUT_RECORDS, 1)):
        pool = [item for item in world.items() if item.part == (suffix[1:] or "training")]
        demonstrations = [
            {"messages": [*item.turns, {"role": "assistant", "content": world.crowd_answer(item, rng)}]}
            for item in world.choose(pool, rng, n_demonstrations)]
        preferences = [preference(item, rng, panel) for item in world.choose(pool, rng, n_preferences)]
        prompts = [{"prompt": item.prompt} for item in pool]
        checkable = [{"prompt": item.prompt} for item in pool if item.kind in ("sum", "fact")]  # world.exact
        for kind, made in (("preferences", preferences), ("prompts", prompts), ("checkable", checkable),
                           ("demonstrations", demonstrations)):
            records.write(f"{folder}/{kind}{suffix}.jsonl", made)
        if not suffix:
            texts = [m["role"] + "\n" + m["content"] for d in demonstrations for m in d["messages"]]
            learn(texts, vocab_size=1024).save(folder)
    ended = time.time()
    write_json(f"{folder}/run.json", {"seed": seed, "started": started, "ended": ended,
                                      "seconds": round(ended - started, 1)})


def preference(item, rng, panel):
    """A record: four answers to one prompt, ranked by a panel of annotators.

    Each of two contents, one right and one wrong, is said in each of two manners, so that a reward model can
    tell content and manner apart. The manners are warmer than the crowd's, so that kind and eager words make
    a difference that can be learnt. Sometimes the wrong content answers another question: a policy can always
    change the subject, so a reward model must have seen it."""
    answers = []
    while len(set(answers)) < 4:
        manners = [world.manner(rng, rng.random() < 0.5, warmth=2) for _ in range(2)]
        contents = [world.matter(item, rng, True), world.matter(item, rng, False)]
        if rng.random() < 0.35:
            contents[1] = world.confused(item, rng)
        answers = [world.compose(content, manner) for manner in manners for content in contents]
    rng.shuffle(answers)
    ranks = annotators.rank(item.prompt, answers, rng, panel)
    return {"prompt": item.prompt, "responses": answers, "ranks": ranks}


def load(kind, data, held_out="", max_dropped=0.0):
    """(training records, held-out records) of a kind: "demonstrations", "preferences" or "prompts".

    data: a file, or a folder of the world's files (out/world is made first if it is not there); held_out: a
    second file. Without a second file every tenth record is held out, the same ones in every stage.
    max_dropped: see records.py."""
    if data == WORLD and not os.path.exists(f"{WORLD}/demonstrations_heldout.jsonl"):   # the last one written
        print(f"Making the embedded world in {WORLD}/ ...", flush=True)
        make_world(WORLD)               # several processes may do so at once: they write the same bytes
    if is_world(data):
        data, held_out = f"{data}/{kind}.jsonl", held_out or f"{data}/{kind}_heldout.jsonl"
    train = records.read(kind, data, max_dropped)
    if held_out:
        rest = records.read(kind, held_out, max_dropped)
    else:
        train, rest = [record for i, record in enumerate(train) if i % 10 != 9], train[9::10]
        if rest:
            print(f"{data}: every tenth of {len(train) + len(rest)} records is held out: {len(rest)}")
    train, rest = ([record for record in part if record is not None] for part in (train, rest))
    if kind == "preferences":
        return without_ties(train), without_ties(rest)
    return train, rest


def is_world(data):
    """Whether --data names a folder of the world's files."""
    return data == WORLD or os.path.isdir(data)


def load_prompts(cfg, tokenizer, room):
    """The prompts (message lists) of at most `room` tokens that a stage's --data names."""
    prompts, _ = load("prompts", cfg.data, "", cfg.max_dropped)
    warn_if_foreign(tokenizer, prompts, cfg.data, cfg.init)
    return fit_prompts(tokenizer, prompts, room, "prompts")


def without_ties(preferences):
    """The preferences in which not all answers tie; prints how many do. Ties are left out only after records
    have been held out, so that every stage holds out the same records."""
    kept = [p for p in preferences if p.pairs]
    if len(kept) < len(preferences):
        print(f"{len(preferences) - len(kept)} of {len(preferences)} comparisons are ties: left out")
    return kept


def load_tokenizer(name, data, system=""):
    """The tokenizer of a model that starts from random weights. name: "gpt2", a folder, or "" for the
    default: the world's tokenizer for a folder of the world, gpt2 for a file. system: the message for
    conversations without a system message."""
    name = name or (data if is_world(data) else "gpt2")
    return Tokenizer.gpt2(system) if name == "gpt2" else Tokenizer.load(name, system)


def warn_if_foreign(tokenizer, prompts, data, folder):
    """Warn if a small vocabulary was made for other text than the prompts (message lists). The embedded
    world's vocabulary, for example, has tokens for the world's few words and spells out all others."""
    own = f"{data}/tokenizer.json"                      # that of the folder's texts, if it has one
    if os.path.exists(own) and tokenizer.ranks == Tokenizer.load(data).ranks:
        return
    texts = [message["content"] for messages in prompts[:1000] for message in messages]
    words = sum(len(text.split()) for text in texts)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    if tokenizer.vocab_size < 5000 and tokens > 2 * words:
        warnings.warn(f"{folder} knows {tokenizer.vocab_size} tokens, which were made for other text than "
                      f"{data}: {tokens / words:.1f} tokens per word. Train a model on such text first "
                      "(python sft.py --data ...), and name its folder with --init", stacklevel=2)
