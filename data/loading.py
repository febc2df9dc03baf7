"""From a flag such as `--data world` to batches: where the files are, what is held out, padding and bucketing."""
import itertools
import os
import random

import torch

import parallel
from data import annotators, records, tokenizer, world

WORLD = "out/world"
DEMONSTRATIONS, PREFERENCES, HELD_OUT_RECORDS = 26000, 7000, 500       # of the world; as many of both held out
READERS = {"demonstrations": records.read_demonstrations, "preferences": records.read_preferences,
           "prompts": records.read_prompts}


def make_world(folder, seed=0):
    """Write the embedded world's demonstrations, preferences and prompts, each with a held-out part, and its
    tokenizer, into a folder. The same seed writes the same bytes."""
    rng = random.Random(seed)
    os.makedirs(folder, exist_ok=True)
    for suffix, held_out, many, compared, panel in (("", False, DEMONSTRATIONS, PREFERENCES, 5),
                                                    ("_heldout", True, HELD_OUT_RECORDS, HELD_OUT_RECORDS, 1)):
        pool = [item for item in world.items() if item.held_out == held_out]
        demonstrations = [demonstration(i, rng) for i in world.choose(pool, rng, many)]
        preferences = [preference(i, rng, panel) for i in world.choose(pool, rng, compared)]
        records.write(f"{folder}/preferences{suffix}.jsonl", preferences)
        records.write(f"{folder}/prompts{suffix}.jsonl", [{"prompt": item.prompt} for item in pool])
        records.write(f"{folder}/demonstrations{suffix}.jsonl", demonstrations)
        if not held_out:
            texts = [m["role"] + "\n" + m["content"] for d in demonstrations for m in d["messages"]]
            tokenizer.learn(texts, vocab_size=1024).save(folder)


def demonstration(item, rng):
    messages = [{"role": role, "content": text} for role, text in item.messages]
    return {"messages": messages + [{"role": "assistant", "content": world.crowd_answer(item, rng)}]}


def preference(item, rng, panel):
    """Four answers to one prompt, ranked by a panel of annotators: two people's manners, each with a right and a wrong
    matter, so that what is said and how it is said can be told apart. They are warmer than the crowd, so that there is
    something to learn about kind words and eager ones. Now and then the wrong one answers another
    question: a policy can always change the subject, so a reward model must have seen it done."""
    answers = []
    while len(set(answers)) < 4:
        manners = [world.manner(rng, rng.random() < 0.5, warmth=2) for _ in range(2)]
        said = [world.matter(item, rng, True), world.matter(item, rng, False)]
        if rng.random() < 0.35:
            said[1] = world.confused(item, rng)
        answers = [world.compose(matter, manner) for manner in manners for matter in said]
    rng.shuffle(answers)
    return {"prompt": item.prompt, "responses": answers, "ranks": annotators.rank(item.prompt, answers, rng, panel)}


def load(kind, data, held_out=""):
    """(training records, held-out records) of a kind: "demonstrations", "preferences" or "prompts".

    data is "world" (made now if it is not there yet) or a file; held_out a second file. A file that stands alone
    holds out every tenth of its records, the same ones for every stage.
    """
    read = READERS[kind]
    if data == "world":
        if parallel.rank() == 0 and not os.path.exists(f"{WORLD}/demonstrations_heldout.jsonl"):    # the last one written
            print(f"Making the embedded world in {WORLD}/ ...", flush=True)
            make_world(WORLD)
        parallel.total(0)                                       # the others wait for it
        parts = read(f"{WORLD}/{kind}.jsonl"), read(held_out or f"{WORLD}/{kind}_heldout.jsonl")
    elif held_out:
        parts = read(data), read(held_out)
    else:
        whole = read(data)
        parts = [r for i, r in enumerate(whole) if i % 10 != 9], whole[9::10]
    return tuple(map(untied, parts)) if kind == "preferences" else parts


def untied(preferences):
    """The comparisons that say something; says how many do not. Only now, so that every stage holds out the same records."""
    kept = [p for p in preferences if len(set(p.ranks)) > 1]
    if len(kept) < len(preferences):
        print(f"{len(preferences) - len(kept)} of {len(preferences)} comparisons are ties: left out")
    return kept


def load_tokenizer(name, data):
    """The tokenizer of a model that starts from nothing. name: "gpt2", a folder, or "" for the data's own: the world's
    for the world, gpt2 for the rest."""
    return tokenizer.Tokenizer.load(name or (WORLD if data == "world" else "gpt2"))


def pad(rows):
    """Lists of different lengths to one tensor (B, T), right-padded with 0: int64, or bool for lists of bools."""
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool if isinstance(rows[0][0], bool) else torch.long)
    for i, row in enumerate(rows):
        out[i, :len(row)] = torch.tensor(row)
    return out


def fit(examples, length, block_size, what):
    """The examples whose length(example) is at most block_size; says how many are left out. ValueError if none is left."""
    if not examples:
        raise ValueError(f"there are no {what}: a file that stands alone holds out every tenth record, and has fewer than 10")
    kept = [e for e in examples if length(e) <= block_size]
    if not kept:
        raise ValueError(f"none of the {len(examples)} {what} fits into {block_size} tokens (block_size)")
    if len(kept) < len(examples):
        print(f"{len(examples) - len(kept)} of {len(examples)} {what} are longer than {block_size} tokens (block_size): left out")
    return kept


def batches(lengths, size, epochs, seed, start=0):
    """by_length's batches of every epoch in turn, from the start-th on: the order depends on the seed and the epoch alone,
    so that a run can go on where it stopped."""
    whole = (batch for epoch in range(epochs) for batch in by_length(lengths, size, random.Random(f"{seed}/{epoch}")))
    return itertools.islice(whole, start, None)


def by_length(lengths, size, rng):
    """Indices in batches of `size` neighbours in length, so that little is padding, in random order. rng: random.Random.
    Examples are sorted inside random pools of 32 batches: neighbours change from epoch to epoch."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for i in range(0, len(order), 32 * size):
        pool = sorted(order[i:i + 32 * size], key=lambda j: lengths[j])
        batches += [pool[j:j + size] for j in range(0, len(pool), size)]
    rng.shuffle(batches)
    return batches
