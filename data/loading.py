"""From --data to records: which files, how the embedded world's are made, what is held out."""
import os
import random

from data import annotators, records, tokenizer, world
from data.batches import fit_prompts
from runtime.launch import warn

WORLD = "out/world"         # the embedded world's files, made where they are asked for
# Records of the world to train on, and how many more of either kind are held out.
DEMONSTRATIONS, PREFERENCES, HELD_OUT_RECORDS = 26000, 10000, 500
READERS = {"demonstrations": records.read_demonstrations, "preferences": records.read_preferences,
           "prompts": records.read_prompts}


def make_world(folder, seed=0):
    """Write the embedded world's demonstrations, preferences and prompts, each with a held-out part, and its
    tokenizer, into a folder. The same seed writes the same bytes."""
    rng = random.Random(seed)
    os.makedirs(folder, exist_ok=True)
    # Held out are rankings of one person, for that is what a reward model has to predict.
    for suffix, n_demonstrations, n_preferences, panel in (
            ("", DEMONSTRATIONS, PREFERENCES, 5), ("_heldout", HELD_OUT_RECORDS, HELD_OUT_RECORDS, 1)):
        pool = [item for item in world.items() if item.held_out == (suffix == "_heldout")]
        demonstrations = [demonstration(item, rng) for item in world.choose(pool, rng, n_demonstrations)]
        preferences = [preference(item, rng, panel) for item in world.choose(pool, rng, n_preferences)]
        records.write(f"{folder}/preferences{suffix}.jsonl", preferences)
        records.write(f"{folder}/prompts{suffix}.jsonl", [{"prompt": item.prompt} for item in pool])
        checkable = [{"prompt": item.prompt} for item in pool if item.kind in ("sum", "fact")]
        records.write(f"{folder}/checkable{suffix}.jsonl", checkable)       # see world.exact
        records.write(f"{folder}/demonstrations{suffix}.jsonl", demonstrations)
        if not suffix:
            texts = [m["role"] + "\n" + m["content"] for d in demonstrations for m in d["messages"]]
            tokenizer.learn(texts, vocab_size=1024).save(folder)


def demonstration(item, rng):
    """A record: the item's messages and what somebody in the crowd answers."""
    return {"messages": [*item.turns, {"role": "assistant", "content": world.crowd_answer(item, rng)}]}


def preference(item, rng, panel):
    """A record: four answers to one prompt, ranked by a panel of annotators.

    The answers combine the manners of two people with a right and a wrong matter each, so that what is said
    and how it is said can be told apart. The manners are warmer than the crowd's, so that there is something
    to learn about kind and eager words. Sometimes the wrong matter answers another question: a policy can
    always change the subject, so a reward model must have seen it.
    """
    answers = []
    while len(set(answers)) < 4:
        manners = [world.manner(rng, rng.random() < 0.5, warmth=2) for _ in range(2)]
        said = [world.matter(item, rng, True), world.matter(item, rng, False)]
        if rng.random() < 0.35:
            said[1] = world.confused(item, rng)
        answers = [world.compose(matter, manner) for manner in manners for matter in said]
    rng.shuffle(answers)
    ranks = annotators.rank(item.prompt, answers, rng, panel)
    return {"prompt": item.prompt, "responses": answers, "ranks": ranks}


def load(kind, data, held_out="", max_dropped=0.0):
    """(training records, held-out records) of a kind: "demonstrations", "preferences" or "prompts".

    data: a folder of the world's files, of which out/world is made now if it is not there yet, or a file;
    held_out: a second file. A file that stands alone holds out every tenth of its records, the same ones for
    every stage. max_dropped: see records.py.
    """
    read = READERS[kind]
    if data == WORLD and not os.path.exists(f"{WORLD}/demonstrations_heldout.jsonl"):   # the last one written
        print(f"Making the embedded world in {WORLD}/ ...", flush=True)
        make_world(WORLD)               # several processes may do so at once: they write the same bytes
    if is_world(data):
        data, held_out = f"{data}/{kind}.jsonl", held_out or f"{data}/{kind}_heldout.jsonl"
    if held_out:
        train, rest = read(data, max_dropped), read(held_out, max_dropped)
    else:
        whole = read(data, max_dropped)
        train = [record for i, record in enumerate(whole) if i % 10 != 9]
        rest = whole[9::10]
    train, rest = ([record for record in part if record is not None] for part in (train, rest))
    if kind == "preferences":
        return without_ties(train), without_ties(rest)
    return train, rest


def is_world(data):
    """Whether --data names a folder of the world's files."""
    return data == WORLD or os.path.isdir(data)


def load_prompts(cfg, tokenizer, room):
    """The prompts (message lists) that a stage's --data names, those of at most `room` tokens."""
    prompts, _ = load("prompts", cfg.data, "", cfg.max_dropped)
    warn_if_foreign(tokenizer, prompts, cfg.data, cfg.init)
    return fit_prompts(tokenizer, prompts, room, "prompts", cfg.max_dropped)


def without_ties(preferences):
    """The preferences that do not tie all their answers; prints how many do. This comes after holding out, so
    that every stage holds out the same records."""
    kept = [p for p in preferences if len(set(p.ranks)) > 1]
    if len(kept) < len(preferences):
        print(f"{len(preferences) - len(kept)} of {len(preferences)} comparisons are ties: left out")
    return kept


def load_tokenizer(name, data, system=""):
    """The tokenizer of a model that starts from nothing. name: "gpt2", a folder, or "" for the data's own,
    which is the world's for a folder of the world and gpt2 for a file. system: for conversations without a
    system message."""
    name = name or (data if is_world(data) else "gpt2")
    if name == "gpt2":
        return tokenizer.Tokenizer.gpt2(system)
    return tokenizer.Tokenizer.load(name, system)


def warn_if_foreign(tokenizer, prompts, data, folder):
    """Warn if prompts (message lists) hold other text than a small vocabulary was made for: the embedded
    world's knows its few words, and cuts all others to pieces."""
    texts = [message["content"] for messages in prompts[:1000] for message in messages]
    words = sum(len(text.split()) for text in texts)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    if tokenizer.vocab_size < 5000 and tokens > 2 * words:
        warn(f"{folder} knows {tokenizer.vocab_size} tokens, which were made for other text than {data}: "
             f"{tokens / words:.1f} tokens per word. "
             "Train a model on such text first (python sft.py --data ...), and name its folder with --init")
