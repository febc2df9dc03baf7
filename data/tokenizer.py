"""Text to tokens and back, and conversations as ChatML.

A tokenizer is a byte-level BPE run by tiktoken: "gpt2", or one learnt from any text by `learn`. Both get
three control tokens after their vocabulary. Text is data: a message that spells "<|im_end|>" is encoded as
those ten characters and controls nothing.
"""
import base64
import json
import os
import re
from collections import Counter

import tiktoken

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
# How a learnt tokenizer cuts text before merging: into words, numbers and punctuation, each with the space
# before it, and whitespace. Uses only syntax that Python's re and tiktoken's engine share.
PATTERN = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"


class Tokenizer:
    """ranks: {bytes: rank} of a byte-level BPE, special: {text: id} with the three control tokens."""

    def __init__(self, name, pattern, ranks, special):
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special)
        self.name, self.pattern, self.ranks, self.special = name, pattern, ranks, special
        self.end = special[IM_END]
        self.newline = self.encode("\n")
        self.headers = {role: [special[IM_START], *self.encode(role), *self.newline] for role in ROLES}

    @property
    def vocab_size(self):
        """Number of ids in use, control tokens included."""
        return self.encoding.n_vocab

    def encode(self, text):
        """Text to a list of ids, none of them a control token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Ids to text, control tokens left out; bytes that are not UTF-8 become the replacement character."""
        control, known = set(self.special.values()), self.vocab_size
        return self.encoding.decode([i for i in ids if i not in control and i < known])

    def chat(self, messages):
        """A conversation to (ids, learn): learn[t] is true on what the assistant says and its <|im_end|>."""
        ids, learn = [], []
        for i, message in enumerate(messages):
            header = self.headers[message["role"]]
            content = self.encode(message["content"]) + [self.end]
            gap = self.newline if i + 1 < len(messages) else []
            by_assistant = message["role"] == "assistant"
            ids += header + content + gap
            learn += [False] * len(header) + [by_assistant] * len(content) + [False] * len(gap)
        return ids, learn

    def prompt(self, messages):
        """A conversation as ids up to the point where the assistant starts to speak."""
        return self.chat(messages)[0] + self.newline + self.headers["assistant"]

    def response(self, text):
        """An answer as ids: what follows a prompt, with the <|im_end|> that closes it."""
        return self.encode(text) + [self.end]

    # ---------------------------------------------------------------------------------------- files

    def save(self, folder):
        """Write tokenizer.tiktoken (tiktoken's own format: base64 of the bytes, rank) and tokenizer.json."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "tokenizer.tiktoken"), "w", encoding="ascii") as f:
            for token, rank in sorted(self.ranks.items(), key=lambda entry: entry[1]):
                f.write(f"{base64.b64encode(token).decode()} {rank}\n")
        with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as f:
            json.dump({"name": self.name, "pattern": self.pattern, "special": self.special}, f, indent=1)

    @classmethod
    def load(cls, source):
        """Load "gpt2", or a folder that save() wrote. Raises ValueError naming what cannot be read."""
        if source == "gpt2":
            return cls.gpt2()
        try:
            with open(os.path.join(source, "tokenizer.json"), encoding="utf-8") as f:
                about = json.load(f)
            ranks = {}
            with open(os.path.join(source, "tokenizer.tiktoken"), encoding="ascii") as f:
                for line in f:
                    token, rank = line.split()
                    ranks[base64.b64decode(token)] = int(rank)
            special = about["special"]
            # tiktoken panics on vocabularies with holes, so they are refused before it sees them.
            all_ids = sorted(ranks.values()) + sorted(special.values())
            in_order = all_ids == list(range(len(all_ids)))
            has_controls = {END_OF_TEXT, IM_START, IM_END} <= special.keys()
            has_all_bytes = all(bytes([b]) in ranks for b in range(256))
            if not (in_order and has_controls and has_all_bytes):
                raise ValueError("the vocabulary has holes, or ids used twice")
            return cls(about["name"], about["pattern"], ranks, special)
        except FileNotFoundError as e:
            missing = os.path.basename(e.filename)
            raise ValueError(f"{source}: no tokenizer here ({missing} is missing)") from None
        except Exception as e:                      # tiktoken raises exceptions of its own for a bad file
            raise ValueError(f"{source}: not a readable tokenizer: {e}") from None

    @classmethod
    def gpt2(cls):
        """GPT-2's vocabulary, from tiktoken's cache or its download."""
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as e:                      # a download can fail with any of many exceptions
            raise ValueError("gpt2: its vocabulary is not on this machine and cannot be downloaded "
                             f"({type(e).__name__}): let TIKTOKEN_CACHE_DIR name a folder where tiktoken "
                             "has put it, on any machine") from None
        special = {END_OF_TEXT: 50256, IM_START: 50257, IM_END: 50258}
        return cls("gpt2", gpt2._pat_str, gpt2._mergeable_ranks, special)

    def check_same(self, folder):
        """Raise ValueError if the model in a folder was trained with another vocabulary."""
        if Tokenizer.load(folder).ranks != self.ranks:
            raise ValueError(f"{folder} was trained with another tokenizer than the policy")


def learn(texts, vocab_size, name="world"):
    """Learn a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) from an iterable of texts.

    Returns a Tokenizer with at most vocab_size ids, control tokens included. Merging goes over the distinct
    words and their counts, so its cost does not grow with the length of the corpus.
    """
    counts = Counter(word.encode() for text in texts for word in re.findall(PATTERN, text))
    ranks = {bytes([b]): b for b in range(256)}
    words = {word: [bytes([b]) for b in word] for word in counts}
    while len(ranks) < vocab_size - 3:
        seen = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                seen[pair] += counts[word]
        if not seen:
            break
        a, b = max(seen, key=lambda pair: (seen[pair], pair))  # the pair breaks ties, not the order of a dict
        ranks[a + b] = len(ranks)
        for word, parts in words.items():
            if a in parts:
                merged, i = [], 0
                while i < len(parts):
                    step = 2 if parts[i:i + 2] == [a, b] else 1
                    merged.append(b"".join(parts[i:i + step]))
                    i += step
                words[word] = merged
    special = {text: len(ranks) + i for i, text in enumerate((END_OF_TEXT, IM_START, IM_END))}
    return Tokenizer(name, PATTERN, ranks, special)
