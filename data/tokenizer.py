"""Text to tokens and back, and conversations in the format that a model was trained with.

A tokenizer is a byte-level BPE run by tiktoken: "gpt2", one learnt from texts by `learn`, or the one in a
Hugging Face folder (tokenizer.json). Text is data: in a message, "<|im_end|>" is encoded as those ten
characters and controls nothing.
"""
import json
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path
from string import Template

import tiktoken

from runtime.files import base_of, find, reading

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
# How a learnt tokenizer cuts text before merging: into words, numbers and punctuation, each with the space
# before it, and whitespace. Uses only syntax that Python's re and tiktoken's engine share.
PATTERN = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"
# GPT-2's, which tokenizer.json calls ByteLevel; and the rest of it where each digit is a token of its own.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

# Chat formats: the texts before the first message (begin), before a message's role (before), between its role
# and its content (after), after its content (end: the token that the model learns to end with), and between
# two messages (gap).
CHATML = {"begin": "", "before": IM_START, "after": "\n", "end": IM_END, "gap": "\n"}
LLAMA3 = {"begin": "<|begin_of_text|>", "before": "<|start_header_id|>", "after": "<|end_header_id|>\n\n",
          "end": "<|eot_id|>", "gap": ""}
# In Jinja: what transformers and vLLM do with a conversation. The names after $ stand for texts of a format.
TEMPLATE = Template(
    "{{ $begin }}{% if messages[0]['role'] != 'system' %}{{ $system }}{% endif %}"
    "{% for m in messages %}{{ $before + m['role'] + $after + m['content'] + $end }}{% endfor %}"
    "{% if add_generation_prompt %}{{ $assistant }}{% endif %}")


class Tokenizer:
    """document: the content of a tokenizer.json; system: the message put before conversations that have none;
    name: the tokenizer's name in messages. Raises ValueError for kinds other than byte-level BPE.

    ranks: {bytes: id} of the text's tokens; special: {text: id} of the control tokens."""

    def __init__(self, document, system="", name="a new tokenizer"):
        self.system, self.name = system, name
        self.ranks, self.special = ranks, special = read_vocabulary(document)
        is_llama3 = {LLAMA3["before"], LLAMA3["end"]} <= special.keys() and IM_END not in special
        self.chat_format = chat = LLAMA3 if is_llama3 else CHATML
        for text in (chat["before"], chat["end"]):      # a base model lacks them: they get ids after its last
            if text not in special:
                special[text] = 1 + max([*ranks.values(), *special.values()])
                added = [*document["added_tokens"], control_token(text, special[text])]
                document = document | {"added_tokens": added}
        self.document = document
        self.vocab_size = 1 + max([*ranks.values(), *special.values()])     # ids in use
        # Bytes that a vocabulary lacks get ids after it, and are dropped.
        lacking = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        self.encoding = tiktoken.Encoding(
            "bpe", pat_str=read_pattern(document["pre_tokenizer"]), special_tokens=special,
            mergeable_ranks=ranks | {byte: self.vocab_size + i for i, byte in enumerate(lacking)})
        self.text_ids, self.end = set(ranks.values()), special[chat["end"]]
        # The token that pads must not be the one that ends answers: other libraries look for the last token
        # that does not pad, and read a reward model's score there.
        fillers = [text for text in special if text not in "".join(chat.values())]
        best_first = [text for text in fillers if "pad" in text] + fillers + [chat["before"]]
        self.pad = special[best_first[0]]
        self.begin, self.gap = self.with_control(chat["begin"]), self.with_control(chat["gap"])
        self.headers = {role: self.with_control(chat["before"] + role + chat["after"]) for role in ROLES}

    def with_control(self, text):
        """Text of the chat format itself to ids, control tokens and all."""
        return self.encoding.encode(text, allowed_special="all")

    def encode(self, text):
        """Text to a list of ids, none of them a control token."""
        if self.document["normalizer"]:                 # NFC, in which é is one character and not two
            text = unicodedata.normalize("NFC", text)
        return [i for i in self.encoding.encode_ordinary(text) if i < self.vocab_size]

    def decode(self, ids):
        """Ids to text, control tokens left out; bytes that are not UTF-8 become the replacement character."""
        return self.encoding.decode([i for i in ids if i in self.text_ids])

    def chat(self, messages):
        """A conversation to (ids, learn): learn[t] is true on the assistant's words and the token that ends
        them."""
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
        """An answer as ids: the ones that follow a prompt, with the token that ends them."""
        return self.encode(text) + [self.end]

    def ids(self):
        """config.json's entries for control tokens: the one that ends an answer, and the one that pads."""
        return {"eos_token_id": self.end, "pad_token_id": self.pad}

    def check_same(self, folder):
        """Raise ValueError if the model in a folder has another vocabulary or other control tokens (the end
        token is one of them): it would decode these ids to another text."""
        other = Tokenizer.load(folder)
        for kind, ours, theirs in (("vocabularies", self.ranks, other.ranks),
                                   ("control tokens", self.special, other.special)):
            if ours != theirs:
                raise ValueError(f"{folder} was trained with another tokenizer than {self.name}: "
                                 f"their {kind} differ")

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, as transformers reads them."""
        chat, names = self.chat_format, {i: text for text, i in self.special.items()}
        header, end = chat["before"] + "{}" + chat["after"], chat["end"] + chat["gap"]
        system = header.format("system") + self.system + end if self.system else ""
        texts = chat | {"system": system, "end": end, "assistant": header.format("assistant")}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[self.end],
                  "pad_token": names[self.pad], "clean_up_tokenization_spaces": False,
                  # transformers 4 adds token_type_ids, which Llama refuses and GPT-2 adds to its embeddings.
                  "model_input_names": ["input_ids", "attention_mask"], "system": self.system,
                  "chat_template": TEMPLATE.substitute({k: json.dumps(text) for k, text in texts.items()})}
        os.makedirs(folder, exist_ok=True)
        for name, content in (("tokenizer.json", self.document), ("tokenizer_config.json", config)):
            unfinished = Path(folder, f"{name}.{os.getpid()}.tmp")                  # the file appears whole
            unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
            os.replace(unfinished, Path(folder, name))

    @classmethod
    def load(cls, name, system=""):
        """The tokenizer of a model, by its folder or its name on the hub. system: replaces the folder's own.
        Raises ValueError naming the file that cannot be read."""
        folder = name if os.path.isdir(name) else find(name)
        if not os.path.exists(os.path.join(folder, "tokenizer.json")) and base_of(folder):
            folder = find(base_of(folder))                          # adapters, whose base model has it
        path, config = Path(folder, "tokenizer.json"), Path(folder, "tokenizer_config.json")
        if not path.exists():
            raise ValueError(f"{folder}: no tokenizer here (tokenizer.json is missing)")
        if not system and config.exists():
            with reading(config, "a tokenizer's settings") as settings:
                system = settings.get("system", "")
        with reading(path, "a readable tokenizer") as document:
            return cls(document, system, name)

    @classmethod
    def gpt2(cls, system=""):
        """GPT-2's vocabulary, from tiktoken's cache or its download."""
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as e:                      # a download can fail with any of many exceptions
            raise ValueError("gpt2: its vocabulary is not on this machine and cannot be downloaded "
                             f"({type(e).__name__}): let TIKTOKEN_CACHE_DIR name a folder where tiktoken "
                             "has put it, on any machine") from None
        return cls(new_document(gpt2._mergeable_ranks, [END_OF_TEXT], GPT2_PATTERN), system, "gpt2")


# ------------------------------------------------------------------------- the content of tokenizer.json

# Bytes as visible characters (GPT-2's table): those that can be printed stand for themselves.
LETTERS = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
LETTERS |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in LETTERS)}
BYTES = {letter: b for b, letter in LETTERS.items()}


def spell(token):
    return "".join(LETTERS[b] for b in token)


def read_vocabulary(document):
    """({bytes: id} of the text's tokens, {text: id} of the control tokens). Raises ValueError for kinds of
    tokenizers that tiktoken would run otherwise: it merges in the order of the ids."""
    model, normalizer = document["model"], document["normalizer"] or {"type": "NFC"}
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or not document["pre_tokenizer"]:
        kind = "SentencePiece" if model.get("byte_fallback") else model.get("type")
        raise ValueError(f"tokenizers of the kind {kind} are not supported: byte-level BPE is")
    if normalizer["type"] != "NFC":
        raise ValueError(f"normalizer {normalizer['type']} is not supported")
    special = {token["content"]: token["id"] for token in document["added_tokens"]}
    vocab = {text: i for text, i in model["vocab"].items() if text not in special}
    ranks = {bytes(BYTES[letter] for letter in text): i for text, i in vocab.items()}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    made = [vocab[a + b] for a, b in pairs]
    if made != sorted(made) or len(ranks) + len(special) != len({*ranks.values(), *special.values()}):
        raise ValueError("merges that are not in the order of their ids are not supported")
    return ranks, special


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


def new_document(ranks, control, pattern):
    """The tokenizer.json of a byte-level BPE that merges in the order of its ids. control: the texts of its
    control tokens, whose ids follow. What all of them have in common is in bpe.json."""
    document = json.loads(Path(__file__).with_name("bpe.json").read_text("utf-8"))
    first = 1 + max(ranks.values())
    document["added_tokens"] = [control_token(text, i) for i, text in enumerate(control, first)]
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    document["model"]["vocab"] = {spell(token): i for token, i in ranks.items()}
    document["model"]["merges"] = [[spell(a), spell(b)] for a, b in merges(ranks)]
    return document


def control_token(text, i):
    return {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


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
    """A Tokenizer with at most vocab_size ids, control tokens included, learnt from an iterable of texts: a
    byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2). Merging goes over the distinct words and
    their counts, so its cost does not grow with the length of the corpus."""
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
        for parts in words.values():
            for i in range(len(parts) - 1):         # a merge shortens parts: the last i may have no pair
                if parts[i:i + 2] == [a, b]:
                    parts[i:i + 2] = [a + b]
    return Tokenizer(new_document(ranks, [END_OF_TEXT], PATTERN))
