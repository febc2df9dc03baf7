"""Text to tokens and back, and conversations in the format that a model was trained with.

A tokenizer is a byte-level BPE run by tiktoken: "gpt2", one learnt from any text by `learn`, or that of a
Hugging Face folder (tokenizer.json). Text is data: a message that spells "<|im_end|>" is encoded as those ten
characters and controls nothing.
"""
import json
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from runtime.files import base_of, find

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
# How a learnt tokenizer cuts text before merging: into words, numbers and punctuation, each with the space
# before it, and whitespace. Uses only syntax that Python's re and tiktoken's engine share.
PATTERN = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"
# GPT-2's, which tokenizer.json calls ByteLevel; and what is left of it where each digit stands alone.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
                  r"|\s+(?=\p{N})|\s+(?!\S)|\s+")


@dataclass
class Chat:
    """The texts around the messages of a conversation, control tokens among them."""
    begin: str          # before the first message
    before: str         # before a message's role
    after: str          # between its role and its content
    end: str            # after its content: the token that the model learns to end with
    gap: str            # between two messages


CHATML = Chat("", IM_START, "\n", IM_END, "\n")
LLAMA3 = Chat("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "")


class Tokenizer:
    """ranks: {bytes: id} of a byte-level BPE, merged in the order of the ids; special: {text: id} of its
    control tokens; pattern: how text is cut before merging; system: the message put before conversations that
    have none; about: the tokenizer.json that it was read from."""

    def __init__(self, ranks, special, pattern, system="", about=None):
        self.ranks, self.special, self.pattern = ranks, special, pattern
        self.system, self.about = system, about
        is_llama3 = LLAMA3.before in special and LLAMA3.end in special and IM_END not in special
        self.chat_format = chat = LLAMA3 if is_llama3 else CHATML
        for text in (chat.before, chat.end):                    # a base model: in rows after its last
            special.setdefault(text, 1 + max([*ranks.values(), *special.values()]))
        self.vocab_size = 1 + max([*ranks.values(), *special.values()])     # ids in use
        # Bytes that a vocabulary lacks get ids after it, and are dropped.
        lacking = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        ranks = ranks | {byte: self.vocab_size + i for i, byte in enumerate(lacking)}
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special)
        self.composed = bool(about and about["normalizer"])             # NFC: é is one character, not two
        self.text_ids, self.end = set(self.ranks.values()), special[chat.end]
        # What fills a batch elsewhere must not be what ends an answer: a reward model's score stands there.
        fillers = [text for text in special if text not in "".join(vars(chat).values())]
        best_first = [text for text in fillers if "pad" in text] + fillers + [chat.before]
        self.pad = special[best_first[0]]
        self.begin, self.gap = self.with_control(chat.begin), self.with_control(chat.gap)
        self.headers = {role: self.with_control(chat.before + role + chat.after) for role in ROLES}

    def with_control(self, text):
        """Text of the chat format itself to ids, control tokens and all."""
        return self.encoding.encode(text, allowed_special="all")

    def encode(self, text):
        """Text to a list of ids, none of them a control token."""
        if self.composed:
            text = unicodedata.normalize("NFC", text)
        return [i for i in self.encoding.encode_ordinary(text) if i < self.vocab_size]

    def decode(self, ids):
        """Ids to text, control tokens left out; bytes that are not UTF-8 become the replacement character."""
        return self.encoding.decode([i for i in ids if i in self.text_ids])

    def chat(self, messages):
        """A conversation to (ids, learn): learn[t] is true on what the assistant says and the token that ends
        it."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        ids, learn = [], []
        for i, message in enumerate(messages):
            header = (self.gap if i else self.begin) + self.headers[message["role"]]
            content = self.encode(message["content"]) + [self.end]
            ids += header + content
            learn += [False] * len(header) + [message["role"] == "assistant"] * len(content)
        return ids, learn

    def prompt(self, messages):
        """A conversation as ids up to the point where the assistant starts to speak."""
        return self.chat(messages)[0] + self.gap + self.headers["assistant"]

    def response(self, text):
        """An answer as ids: what follows a prompt, with the token that ends it."""
        return self.encode(text) + [self.end]

    def template(self):
        """The chat format as the Jinja template that transformers and vLLM read."""
        f = self.chat_format
        system = f.before + "system" + f.after + self.system + f.end + f.gap if self.system else ""
        texts = {"BEGIN": f.begin, "SYSTEM": system, "BEFORE": f.before, "AFTER": f.after,
                 "END": f.end + f.gap, "ASSISTANT": f.before + "assistant" + f.after}
        template = ("{{ BEGIN }}{% if messages[0]['role'] != 'system' %}{{ SYSTEM }}{% endif %}"
                    "{% for m in messages %}{{ BEFORE + m['role'] + AFTER + m['content'] + END }}{% endfor %}"
                    "{% if add_generation_prompt %}{{ ASSISTANT }}{% endif %}")
        for name, text in texts.items():
            template = template.replace(name, json.dumps(text))
        return template

    # ---------------------------------------------------------------------------------------- files

    def ids(self):
        """What config.json says of control tokens: where an answer ends, and what fills a batch."""
        return {"eos_token_id": self.end, "pad_token_id": self.pad}

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, as transformers reads them."""
        names = {i: text for text, i in self.special.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[self.end],
                  "pad_token": names[self.pad], "clean_up_tokenization_spaces": False,
                  # transformers 4 adds token_type_ids, which Llama refuses and GPT-2 adds to its embeddings.
                  "model_input_names": ["input_ids", "attention_mask"],
                  "system": self.system, "chat_template": self.template()}
        os.makedirs(folder, exist_ok=True)
        for name, about in (("tokenizer.json", self.to_json()), ("tokenizer_config.json", config)):
            aside = os.path.join(folder, f"{name}.{os.getpid()}.tmp")     # the file appears whole
            Path(aside).write_text(json.dumps(about, indent=1, ensure_ascii=False), "utf-8")
            os.replace(aside, os.path.join(folder, name))

    def to_json(self):
        """tokenizer.json: as it was read, with the control tokens that have been added; or written anew."""
        about = self.about or {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": write_pattern(self.pattern), "post_processor": None,
            "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "vocab": {spell(token): i for token, i in self.ranks.items()},
                      "merges": [[spell(a), spell(b)] for a, b in merges(self.ranks)]}}
        known = {token["id"] for token in about["added_tokens"]}
        added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                  "normalized": False, "special": True}
                 for text, i in self.special.items() if i not in known]
        return about | {"added_tokens": about["added_tokens"] + added}

    @classmethod
    def load(cls, source, system=""):
        """The tokenizer of a model, by its folder or name of the hub. system: in place of the folder's own.
        Raises ValueError naming what cannot be read."""
        if not os.path.isdir(source):
            source = find(source)
        if not os.path.exists(os.path.join(source, "tokenizer.json")) and base_of(source):
            source = find(base_of(source))                          # adapters, whose model has it
        try:
            about = json.loads(Path(source, "tokenizer.json").read_text("utf-8"))
            config = Path(source, "tokenizer_config.json")
            if not system and config.exists():
                system = json.loads(config.read_text("utf-8")).get("system", "")
            return cls.from_json(about, system)
        except FileNotFoundError:
            raise ValueError(f"{source}: no tokenizer here (tokenizer.json is missing)") from None
        except Exception as e:                      # tiktoken raises exceptions of its own for a bad file
            reason = f"{e} is missing" if isinstance(e, KeyError) else e
            raise ValueError(f"{source}: not a readable tokenizer: {reason}") from None

    @classmethod
    def from_json(cls, about, system=""):
        """The tokenizer of a tokenizer.json. Raises ValueError for kinds other than byte-level BPE."""
        model = about["model"]
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or not about["pre_tokenizer"]:
            kind = "SentencePiece" if model.get("byte_fallback") else model.get("type")
            raise ValueError(f"tokenizers of the kind {kind} are not supported: byte-level BPE is")
        if (about["normalizer"] or {}).get("type", "NFC") != "NFC":
            raise ValueError(f"normalizer {about['normalizer']['type']} is not supported")
        special = {token["content"]: token["id"] for token in about["added_tokens"]}
        ranks = {unspell(text): i for text, i in model["vocab"].items() if text not in special}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        made = [ranks[unspell(a + b)] for a, b in pairs]
        if made != sorted(made) or len(ranks) + len(special) != len({*ranks.values(), *special.values()}):
            raise ValueError("merges that are not in the order of their ids are not supported")
        return cls(ranks, special, read_pattern(about["pre_tokenizer"]), system, about)

    @classmethod
    def gpt2(cls, system=""):
        """GPT-2's vocabulary, from tiktoken's cache or its download."""
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as e:                      # a download can fail with any of many exceptions
            raise ValueError("gpt2: its vocabulary is not on this machine and cannot be downloaded "
                             f"({type(e).__name__}): let TIKTOKEN_CACHE_DIR name a folder where tiktoken "
                             "has put it, on any machine") from None
        return cls(gpt2._mergeable_ranks, {END_OF_TEXT: 50256}, GPT2_PATTERN, system)

    def check_same(self, folder):
        """Raise ValueError if the model in a folder was trained with another vocabulary."""
        if Tokenizer.load(folder).ranks != self.ranks:
            raise ValueError(f"{folder} was trained with another tokenizer than the policy")


# ----------------------------------------------------------------------- what tokenizer.json spells out

# Bytes as characters that can be seen (GPT-2's table): those that print stand for themselves.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {b: chr(b) for b in VISIBLE}
LETTERS |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in LETTERS)}
BYTES = {letter: b for b, letter in LETTERS.items()}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def spell(token):
    return "".join(LETTERS[b] for b in token)


def unspell(text):
    return bytes(BYTES[letter] for letter in text)


def read_pattern(pre):
    """The pattern of a pre_tokenizer. Raises ValueError for kinds that are not known to be one pattern."""
    *steps, last = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if last["use_regex"] and not steps:
            return GPT2_PATTERN
        if last["use_regex"] and steps == [{"type": "Digits", "individual_digits": True}]:
            return DIGITS_PATTERN
        if (not last["use_regex"] and len(steps) == 1 and steps[0]["type"] == "Split"
                and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]):
            return steps[0]["pattern"]["Regex"]
    raise ValueError(f"pre_tokenizer {' + '.join(step['type'] for step in [*steps, last])} is not supported")


def write_pattern(pattern):
    """The reverse of read_pattern, for patterns of ours."""
    if pattern == GPT2_PATTERN:
        return BYTE_LEVEL
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}


def merges(ranks):
    """The pair of tokens that each token of a BPE is made of, in the order of their ids."""
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:                                   # as an encoder that knows only the ids before
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts


def learn(texts, vocab_size):
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
    return Tokenizer(ranks, {END_OF_TEXT: len(ranks)}, PATTERN)
