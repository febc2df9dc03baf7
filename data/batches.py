"""Records as tokens, those that fit into a model's block, and their order in batches."""
import itertools
import random
from dataclasses import dataclass, replace

from data import records


@dataclass
class Demonstration:
    """A conversation as tokens."""
    ids: list                   # all turns
    learn: list                 # bools: true on the assistant's words and the tokens that end them

    @property
    def lengths(self):
        return len(self.ids)


@dataclass
class Comparison:
    """One prompt with its K ranked answers, as tokens."""
    sequences: list             # K lists of ids, prompt and answer
    start: int                  # index of the answers' first token
    ranks: list                 # K whole numbers, 1 for the best; equal numbers are ties
    margin: float = 0.0         # how much higher the better answer should score
    probability: float = 1.0    # that it is the better one: a soft label if below 1
    prompt: list = None         # messages
    ref_logprobs: list = None   # K numbers, for DPO: the reference's log-probability of each answer

    @property
    def lengths(self):
        return [len(ids) for ids in self.sequences]

    @property
    def best(self):
        """Indices of the answers with the best rank, several if they tie."""
        return [i for i, rank in enumerate(self.ranks) if rank == min(self.ranks)]

    @property
    def pairs(self):
        return records.pairs(self.ranks)


def encode_demonstrations(tokenizer, conversations, block_size, name):
    """Conversations (message lists) as Demonstrations of at most block_size tokens: see fit."""
    def shorter(messages):
        rest = without_oldest_turn(messages)
        return rest if rest and any(m["role"] == "assistant" for m in rest) else None

    kept = fit(conversations, lambda messages: len(tokenizer.chat(messages)[0]), block_size, name, shorter)
    return [Demonstration(*tokenizer.chat(messages)) for messages in kept]


def encode_comparisons(tokenizer, preferences, block_size, name):
    """Preferences (records.Preference) as Comparisons whose longest answer, with its prompt, takes at most
    block_size tokens: see fit."""
    def encode(p):
        prompt = tokenizer.prompt(p.prompt)
        sequences = [prompt + tokenizer.response(response) for response in p.responses]
        return Comparison(sequences, len(prompt), p.ranks, p.margin, p.probability, p.prompt)

    def shorter(p):
        prompt = without_oldest_turn(p.prompt)
        return replace(p, prompt=prompt) if prompt else None

    kept = fit(preferences, lambda p: max(encode(p).lengths), block_size, name, shorter)
    return [encode(p) for p in kept]


def fit_prompts(tokenizer, prompts, room, name):
    """Prompts (message lists) of at most `room` tokens: see fit."""
    return fit(prompts, lambda messages: len(tokenizer.prompt(messages)), room, name, without_oldest_turn)


def without_oldest_turn(messages):
    """A conversation from its second question on, with its system message; None if it has one question."""
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    system = [m for m in messages[:1] if m["role"] == "system"]
    return system + messages[questions[1]:] if len(questions) > 1 else None


def fit(examples, length, block_size, name, shorter=lambda example: None):
    """The examples of at most block_size tokens, by length(example). Longer ones are replaced by
    shorter(example), as often as necessary, and left out if that is None; prints how many of either, and
    where the first of those left out stand in their file. name: the examples' name in messages. Raises
    ValueError if none is left."""
    if not examples:
        raise ValueError(f"there are no {name}: a file that stands alone holds out every tenth record, "
                         "and has fewer than 10")
    kept, cut, left_out = [], 0, []
    for example in examples:
        rest = example
        while rest is not None and length(rest) > block_size:
            rest = shorter(rest)
        if rest is None:
            left_out.append(getattr(example, "where", ""))
        else:
            kept.append(rest)
            cut += rest is not example
    limit = f"{block_size} tokens (block_size)"
    longer = f"of {len(examples)} {name} are longer than {limit}"
    if not kept:
        raise ValueError(f"none of the {len(examples)} {name} fits into {limit}")
    if cut:
        print(f"{cut} {longer}: without their oldest turns")
    if left_out:
        places = ", ".join(where for where in left_out[:3] if where)
        print(f"{len(left_out)} {longer}: left out" + (f" (the first: {places})" if places else ""))
    return kept


def batches(lengths, size, epochs, seed, start=0):
    """The batches of by_length for each epoch in turn, from batch number `start` on. Their order depends only
    on the seed and the epoch, so that a run can go on where it stopped."""
    orders = (by_length(lengths, size, random.Random(f"{seed}/{epoch}")) for epoch in range(epochs))
    return itertools.islice(itertools.chain.from_iterable(orders), start, None)


def by_length(lengths, size, rng):
    """Indices in batches of `size`, in random order. Examples of similar length share a batch, so that little
    of it is padding. They are sorted only within random pools of 32 batches, so that the batches differ from
    epoch to epoch. rng: random.Random."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for i in range(0, len(order), 32 * size):
        pool = sorted(order[i:i + 32 * size], key=lambda j: lengths[j])
        batches += [pool[j:j + size] for j in range(0, len(pool), size)]
    rng.shuffle(batches)
    return batches
