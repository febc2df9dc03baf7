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

import tiktoken

from data.templates import CHATML, LLAMA3, Template
from runtime.files import base_of, find, reading

END_OF_TEXT = "<|endoftext|>"
ROLES = ("system", "user", "assistant")
# A conversation whose rendering shows how a chat format ends answers.
EXAMPLE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
# How a learnt tokenizer cuts text before merging: into words, numbers and punctuation, each with the space
# before it, and whitespace. Uses only syntax that Python's re and tiktoken's engine share.
PATTERN = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"
# GPT-2's, which tokenizer.json calls ByteLevel; and the rest of it where each digit is a token of its own.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


class Tokenizer:
    """document: the content of a tokenizer.json; system: the message put before conversations that have none;
    name: the tokenizer's name in messages; template: the model's own chat template, (source, config), if it
    has one. Raises ValueError for kinds other than byte-level BPE.

    ranks: {bytes: id} of the text's tokens; special: {text: id} of the control tokens."""

    def __init__(self, document, system="", name="a new tokenizer", template=None):
        self.system, self.name = system, name
        self.ranks, self.special = ranks, special = read_vocabulary(document)
        is_llama3 = {LLAMA3.before, LLAMA3.end} <= special.keys() and CHATML.end not in special
        known = LLAMA3 if is_llama3 else CHATML
        own = template and template[0] != known.source(system)          # else it was written by `save`
        self.chat_format = chat = Template(*template) if own else known
        for text in () if own else (chat.before, chat.end):     # a base model lacks them: they get new ids
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
        self.text_ids, self.end = set(ranks.values()), special[self.end_of_answers() if own else chat.end]
        # The token that pads must not be the one that ends answers: other libraries look for the last token
        # that does not pad, and read a reward model's score there.
        used = "".join(chat.cut(EXAMPLE, prompt=True)[0])
        fillers = [text for text in special if text not in used]
        best_first = [text for text in fillers if "pad" in text] + fillers
        self.pad = special[(best_first or [text for text in special if text in used])[0]]
        longest_first = sorted(special, key=len, reverse=True)
        self.control = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def end_of_answers(self):
        """The control token that comes after an answer in the model's own chat template."""
        after = self.chat_format.cut(EXAMPLE)[0][-1]
        here = [text for text in self.special if after.startswith(text)]
        if not here:
            raise ValueError(f"its chat template ends answers with {after!r}, which is no control token")
        return max(here, key=len)

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
        *asked, last = messages
        if not asked or last["role"] != "assistant":
            return self.join(messages)
        # The last answer follows its prompt, as it does where it is sampled. Some templates would write more
        # before it, such as an empty stretch of thinking.
        ids, learn = self.join(asked, prompt=True)
        answer = self.response(last["content"])
        return ids + answer, learn + [True] * len(answer)

    def join(self, messages, prompt=False):
        """A conversation as (ids, learn), up to the point where the assistant starts to speak if `prompt`."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        frames, contents = self.chat_format.cut(messages, prompt)
        # The text since the last control token is encoded in one piece, as transformers does it. Only the
        # assistant's words are encoded alone, as they are where it speaks.
        ids, learn, text = [], [], ""
        for i, frame in enumerate(frames):
            answered = i and messages[i - 1]["role"] == "assistant"
            if answered:
                before, said = self.encode(text), self.encode(contents[i - 1])
                ids += before + said
                learn += [False] * len(before) + [True] * len(said)
                text = ""
            elif i:
                text += contents[i - 1]
            for part in self.control.split(frame):      # text, control token, text, ...
                if part not in self.special:
                    text += part
                    continue
                before = self.encode(text)
                ids += [*before, self.special[part]]
                learn += [False] * len(before) + [bool(answered and not text)]      # the end of an answer
                text, answered = "", False
        before = self.encode(text)
        return ids + before, learn + [False] * len(before)

    def prompt(self, messages):
        """A conversation as ids up to the point where the assistant starts to speak."""
        return self.join(messages, prompt=True)[0]

    def response(self, text):
        """An answer as ids: the ones that follow a prompt, with the token that ends them."""
        return self.encode(text) + [self.end]

    def ids(self):
        """config.json's entries for control tokens: the one that ends an answer, and the one that pads."""
        return {"eos_token_id": self.end, "pad_token_id": self.pad}

    def check_same(self, folder):
        """Raise ValueError if the model in a folder has another vocabulary, other control tokens, or another
        token that ends answers: the same ids would mean something else to it."""
        other = Tokenizer.load(folder)
        for kind, ours, theirs in (("vocabularies", self.ranks, other.ranks),
                                   ("control tokens", self.special, other.special),
                                   ("end tokens", self.end, other.end)):
            if ours != theirs:
                raise ValueError(f"{folder} was trained with another tokenizer than {self.name}: "
                                 f"their {kind} differ")

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, as transformers reads them."""
        names = {i: text for text, i in self.special.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[self.end],
                  "pad_token": names[self.pad], "clean_up_tokenization_spaces": False,
                  # transformers 4 adds token_type_ids, which Llama refuses and GPT-2 adds to its embeddings.
                  "model_input_names": ["input_ids", "attention_mask"], "system": self.system,
                  "chat_template": self.chat_format.source(self.system)}
        if isinstance(self.chat_format, Template):
            config = self.chat_format.special | config
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
        own, jinja, settings = None, Path(folder, "chat_template.jinja"), {}
        if config.exists():
            with reading(config, "a tokenizer's settings") as settings:
                system, own = system or settings.get("system", ""), settings.get("chat_template")
        if isinstance(own, list):                       # several, by name
            own = next((x["template"] for x in own if x["name"] == "default"), None)
        own = jinja.read_text("utf-8") if jinja.exists() else own
        names = {name: x["content"] if isinstance(x, dict) else x for name, x in settings.items()
                 if name in ("bos_token", "eos_token", "unk_token", "pad_token") and x}
        with reading(path, "a readable tokenizer") as document:
            return cls(document, system, name, own and (own, names))

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
