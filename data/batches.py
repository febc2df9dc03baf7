"""Records as tokens, those that fit, and their order in batches."""
import itertools
import random
from dataclasses import dataclass


@dataclass
class Demonstration:
    """A conversation as tokens."""
    ids: list                   # all turns
    learn: list                 # bools: true on what the assistant says


def encode_demonstrations(tokenizer, conversations, block_size, what):
    """Conversations (message lists) as Demonstrations: those that fit into block_size tokens."""
    examples = [Demonstration(*tokenizer.chat(messages)) for messages in conversations]
    return fit(examples, lambda d: len(d.ids), block_size, what)


@dataclass
class Comparison:
    """One prompt with its K ranked answers, as tokens."""
    sequences: list             # K lists of ids, prompt and answer
    start: int                  # where the answers begin
    ranks: list                 # K whole numbers, 1 for the best; equal numbers are ties
    margin: float               # how much the better one should win by
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
        """Indices (better, worse) of every two answers that the ranks tell apart."""
        both_orders = itertools.permutations(range(len(self.ranks)), 2)
        return [(i, j) for i, j in both_orders if self.ranks[i] < self.ranks[j]]


def encode_comparisons(tokenizer, preferences, block_size, what):
    """Preferences (records.Preference) as Comparisons: those whose longest answer, with its prompt, fits into
    block_size tokens."""
    examples = []
    for p in preferences:
        prompt = tokenizer.prompt(p.prompt)
        sequences = [prompt + tokenizer.response(response) for response in p.responses]
        examples.append(Comparison(sequences, len(prompt), p.ranks, p.margin))
    return fit(examples, lambda c: max(c.lengths), block_size, what)


def fit(examples, length, block_size, what):
    """The examples whose length(example) is at most block_size; prints how many are left out. Raises
    ValueError if none is left."""
    if not examples:
        raise ValueError(f"there are no {what}: a file that stands alone holds out every tenth record, "
                         "and has fewer than 10")
    kept = [e for e in examples if length(e) <= block_size]
    if not kept:
        raise ValueError(f"none of the {len(examples)} {what} fits into {block_size} tokens (block_size)")
    too_long = len(examples) - len(kept)
    if too_long:
        print(f"{too_long} of {len(examples)} {what} are longer than {block_size} tokens (block_size): "
              "left out")
    return kept


def batches(lengths, size, epochs, seed, start=0):
    """The batches of by_length for each epoch in turn, from batch number `start` on. Their order depends only
    on the seed and the epoch, so a run can go on where it stopped."""
    def all_epochs():
        for epoch in range(epochs):
            yield from by_length(lengths, size, random.Random(f"{seed}/{epoch}"))
    return itertools.islice(all_epochs(), start, None)


def by_length(lengths, size, rng):
    """Indices in batches of `size`, in random order. rng: random.Random.

    Neighbours in length share a batch, so that little of it is padding. Examples are sorted only within
    random pools of 32 batches, so that neighbours change from epoch to epoch.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    found = []
    for i in range(0, len(order), 32 * size):
        pool = sorted(order[i:i + 32 * size], key=lambda j: lengths[j])
        found += [pool[j:j + size] for j in range(0, len(pool), size)]
    rng.shuffle(found)
    return found
