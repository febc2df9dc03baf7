"""The record formats: one JSON object per line (.jsonl, .jsonl.gz), or a list of them (.json).

    demonstrations   {"messages": [{"role", "content"}, ...]}, TRL's and OpenAI's
                     {"conversations": [{"from", "value"}, ...]}, ShareGPT's
                     {"prompt", "response"}, or "completion" in place of "response"
                     {"instruction", "output"}, Alpaca's
                     {"chosen"}, with or without a "prompt": the chosen answer of a preference
                     {"prompt", "responses", "ranks"}: the answer that is ranked first
    preferences      {"prompt", "chosen", "rejected"}
                     {"chosen", "rejected"}: two lists of messages, as in UltraFeedback, or two transcripts,
                     as in Anthropic HH, that share all but the last answer
                     {"prompt", "responses", "ranks"}: K ranked answers
    prompts          {"prompt"}; or the messages before the last answer in "messages", "conversations" or
                     "chosen"

A prompt is text or a list of messages whose last is the user's; in its place, a record may have Alpaca's
"instruction", with or without an "input". An answer is text or a list of messages that continues the prompt
or begins with it. Beside "chosen" and "rejected" there may be a "margin", and a "probability" that the chosen
answer is the better one (a soft label; 1 by default). Files may also be .parquet, where pyarrow is installed.

Two kinds of records are bad. Malformed ones (not JSON, wrong types, missing fields) mean that the file has
another format than expected: they stop a run before it trains on anything. Real files also hold records that
are well formed and unusable (an empty turn, two conversations with different prompts, the same answer chosen
and rejected): a reader returns None for each, and more of them than max_dropped, a share of all records, stop
the run too; but if max_dropped is above 0, one record may go in a file of any size. Either error counts the
records and names the first few.
"""
import gzip
import itertools
import json
import os
import re
import zlib
from dataclasses import dataclass, field

from data.tokenizer import ROLES


class RecordError(ValueError):
    """A malformed record or file. The message is one line: file, line (or number in list), field, reason."""


class UnknownShape(RecordError):
    """A field of the record itself is missing. The message will list the shapes that the reader accepts."""


class Unusable(RecordError):
    """A record that is well formed but cannot be used."""


class Messages(list):
    """A conversation or a prompt: a list of {"role", "content"}."""
    where = ""              # its place in the file, such as "line 7", for what is printed about it


@dataclass
class Preference:
    prompt: list            # messages, a user's last
    responses: list         # K ≥ 2 texts
    ranks: list             # K whole numbers, 1 for the best; equal numbers are ties
    margin: float = 0.0     # how much higher the chosen answer should score (pairs only)
    probability: float = 1.0        # that the chosen answer is the better one (pairs only)
    where: str = field(default="", compare=False)           # as of Messages

    @property
    def pairs(self):
        return pairs(self.ranks)


def pairs(ranks):
    """Indices (better, worse) of every two answers that the ranks tell apart."""
    both_orders = itertools.permutations(range(len(ranks)), 2)
    return [(i, j) for i, j in both_orders if ranks[i] < ranks[j]]


def write(path, records):
    """Write records (dicts), one per line. The file appears whole, even if several processes write it."""
    unfinished = f"{path}.{os.getpid()}.tmp"
    with open(unfinished, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    os.replace(unfinished, path)


def read(kind, path, max_dropped=0.0):
    """The records of a file: a list with Messages for each of the "demonstrations" or "prompts", a Preference
    for each of the "preferences" or "tasks" (in which all answers tie); None for unusable ones."""
    parse, shapes = KINDS[kind]
    out, malformed, unusable, chosen = [], [], [], 0
    for where, record in _records(str(path)):
        try:
            if isinstance(record, RecordError):
                raise record
            if not isinstance(record, dict):
                raise RecordError(f"expected an object, found {_kind(record)}")
            example = parse(record)
            out.append(Messages(example) if isinstance(example, list) else example)
            out[-1].where = where
            chosen += "rejected" in record and not record.keys() & ANSWERS
        except Unusable as e:
            unusable.append(f"{where}: {e}")
            out.append(None)
        except RecordError as e:
            accepted = f" ({kind} have {shapes})" if isinstance(e, UnknownShape) and not malformed else ""
            malformed.append(f"{where}: {e}{accepted}")
    bad, total = malformed or unusable, len(out) + len(malformed)
    first_few = "; ".join(bad[:3] + ["..."] * (len(bad) > 3))
    if malformed:
        raise RecordError(f"{path}, {first_few} ({len(bad)} of {total} records are malformed)")
    if not out:
        raise RecordError(f"{path}: no records")
    if kind == "demonstrations" and chosen:
        print(f"{path}: {chosen} of {total} records are preferences: their chosen answers are imitated")
    if unusable:
        count = f"{len(bad)} of {total} records of no use"
        if len(bad) > max(max_dropped * total, max_dropped > 0):
            raise RecordError(f"{path}, {first_few} ({count}, --max_dropped is {max_dropped:g})")
        print(f"{path}: {count} are left out: {first_few}")
    return out


def _records(path):
    """(where, record) for each record of a file. For a line that is not JSON the record is a RecordError."""
    try:
        if path.endswith(".parquet"):
            from pyarrow import parquet
            rows = parquet.read_table(path).to_pylist()     # null in each column that a row does not use
            return [(f"record {i}", {key: x for key, x in row.items() if x is not None})
                    for i, row in enumerate(rows, 1)]
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
            content = f.read().decode("utf-8-sig")
    except ImportError:
        raise RecordError(f"{path}: Parquet is read where pyarrow is installed") from None
    except UnicodeDecodeError as e:
        raise RecordError(f"{path}: not UTF-8 (byte {e.start})") from None
    except (OSError, EOFError, ValueError, NotImplementedError, zlib.error) as e:
        reason = getattr(e, "strerror", None) or str(e).split("\n")[0]      # a damaged file has no strerror
        raise RecordError(f"{path}: cannot be read: {reason}") from None
    if not path.endswith((".json", ".json.gz")):
        return [(f"line {i}", _json(line)) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    whole = _json(content)
    if not isinstance(whole, list):
        found = f"expected a list of records, found {_kind(whole)}"
        raise RecordError(f"{path}: {whole if isinstance(whole, RecordError) else found}")
    return [(f"record {i}", record) for i, record in enumerate(whole, 1)]


def _json(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        return RecordError(f"not JSON: {e}")


def _kind(value):
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number",
             float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _text(value, field):
    """A field's value, which must be text. field: its name in messages, such as "messages[0].content"."""
    if not isinstance(value, str):
        raise RecordError(f'field "{field}": expected text, found {_kind(value)}')
    if not value.strip():
        raise Unusable(f'field "{field}" is empty')
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise RecordError(f'field "{field}": holds half of a surrogate pair, which is no character')
    return value


def _number(record, field, default, high):
    value = record.get(field, default)
    if type(value) not in (int, float) or not 0 <= value <= high:
        raise RecordError(f'field "{field}": expected a number from 0 to {high}')
    return float(value)


SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _messages(value, field):
    """A field's value, which must be a list of {"role", "content"}, or of ShareGPT's {"from", "value"}."""
    out = []
    if not isinstance(value, list) or not value:
        found = "none" if value == [] else _kind(value)
        raise RecordError(f'field "{field}": expected a list of messages, found {found}')
    for i, message in enumerate(value):
        name = f"{field}[{i}]"
        if not isinstance(message, dict):
            raise RecordError(f'field "{name}": expected an object, found {_kind(message)}')
        speaker, content, roles = "role", "content", {role: role for role in ROLES}
        if "from" in message:
            speaker, content, roles = "from", "value", SHAREGPT
        for key in (speaker, content):
            if key not in message:
                raise RecordError(f'field "{name}.{key}" is missing')
        role = _text(message[speaker], f"{name}.{speaker}")
        if role not in roles:
            raise RecordError(f'field "{name}.{speaker}": {role[:40]!r} is none of {", ".join(roles)}')
        out.append({"role": roles[role], "content": _text(message[content], f"{name}.{content}")})
    return out


def _transcript(text, field):
    """Anthropic HH: "Human:" and "Assistant:" turns, the last one the assistant's, as messages."""
    # pieces: "", speaker, text, speaker, text, ...
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text.strip())
    speakers, contents = pieces[1::2], [c.strip() for c in pieces[2::2]]
    if pieces[0] or not speakers or speakers[-1] != "Assistant":
        raise RecordError(f'field "{field}": with no "prompt", expected a transcript of Human: and '
                          "Assistant: turns that ends with the assistant's")
    if not all(contents):
        raise Unusable(f'field "{field}": a turn is empty')
    return [{"role": SHAREGPT[s.lower()], "content": c} for s, c in zip(speakers, contents)]


ANSWERS = {"messages", "conversations", "response", "completion", "output"}
CONVERSATIONS = ("messages", "conversations", "chosen")     # fields that may hold a whole conversation
TWO_WAYS = "can be read in two ways, by its {} and by its {}: leave one out"


def _prompt(record):
    """The messages before the answer, a user's last."""
    field = next((name for name in ("prompt", "instruction", *CONVERSATIONS) if name in record), None)
    if field is None:
        raise UnknownShape('field "prompt" is missing')
    if field in CONVERSATIONS:
        messages = _conversation(record, field)
        while len(messages) > 1 and messages[-1]["role"] == "assistant":    # the last answer is left out
            messages.pop()
    elif field == "prompt" and isinstance(record["prompt"], list):
        messages = _messages(record["prompt"], "prompt")
    else:
        text, more = _text(record[field], field), record.get("input")
        is_blank = more is None or (isinstance(more, str) and not more.strip())
        if field == "instruction" and not is_blank:
            text += "\n\n" + _text(more, "input")
        messages = [{"role": "user", "content": text}]
    last = messages[-1]["role"]
    if last != "user":
        raise Unusable(f'field "{field}": the last message must be the user\'s, not the {last}\'s')
    return messages


def _conversation(record, field):
    """The conversation that a field holds, alone or together with the prompt, as messages. An answer to a
    prompt is text, or a list of messages that continues the prompt or begins with it."""
    if field in ("messages", "conversations"):
        return _messages(record[field], field)
    if field not in record:
        raise UnknownShape(f'field "{field}" is missing')
    is_whole = field in ("chosen", "rejected") and not {"prompt", "instruction"} & record.keys()
    prompt = [] if is_whole else _prompt(record)
    if not isinstance(record[field], list):
        text = _text(record[field], field)
        return _transcript(text, field) if is_whole else [*prompt, {"role": "assistant", "content": text}]
    messages = _messages(record[field], field)
    if messages[-1]["role"] != "assistant":
        raise Unusable(f'field "{field}": the last message must be the assistant\'s')
    if isinstance(record.get("prompt"), str) and prompt[0] in messages:     # UltraFeedback
        return messages
    if messages[:len(prompt)] == prompt:
        return messages
    if messages[0]["role"] != "assistant":
        raise RecordError(f'fields "prompt" and "{field}": the conversation does not hold the prompt, and '
                          f"after the prompt the assistant must speak, not the {messages[0]['role']}")
    return prompt + messages


def _demonstration(record):
    """A conversation. If several fields hold one, they must agree."""
    fields = [name for name in ("messages", "conversations", "response", "completion") if name in record]
    if "chosen" in record and not {"prompt", "instruction"} & record.keys():
        fields.append("chosen")
    if not fields and "responses" not in record:
        is_alpaca = "prompt" not in record and {"instruction", "output"} & record.keys()
        fields = ["output" if is_alpaca else "response"]
        if fields[0] not in record and "chosen" in record:                      # a preference
            fields = ["chosen"]
    found = {field: _conversation(record, field) for field in fields}
    if "responses" in record:
        p = _ranking(record)
        if not p.pairs:
            raise Unusable('field "ranks": no answer is better than another')
        best = p.responses[p.ranks.index(min(p.ranks))]
        found["responses"] = [*p.prompt, {"role": "assistant", "content": best}]
    (field, messages), *others = found.items()
    for other, conversation in others:
        if conversation != messages:
            raise RecordError(TWO_WAYS.format(field, other))
    if not any(m["role"] == "assistant" for m in messages):
        raise Unusable(f'field "{field}": the assistant says nothing')
    return messages


def _preference(record):
    if "responses" in record:
        return _ranking(record)
    chosen, rejected = _conversation(record, "chosen"), _conversation(record, "rejected")
    if chosen[:-1] != rejected[:-1] or not chosen[:-1] or chosen[-2]["role"] != "user":
        raise Unusable('fields "chosen" and "rejected": '
                       "the conversations must share all but the last answer")
    if chosen == rejected:
        raise Unusable('fields "chosen" and "rejected" are the same')
    answers = [chosen[-1]["content"], rejected[-1]["content"]]
    margin, probability = _number(record, "margin", 0.0, 10 ** 6), _number(record, "probability", 1.0, 1)
    return Preference(chosen[:-1], answers, [1, 2], margin, probability)


def _ranking(record):
    if "chosen" in record:
        raise RecordError(TWO_WAYS.format("responses", "chosen"))
    prompt, responses, ranks = _prompt(record), record["responses"], record.get("ranks")
    if not isinstance(responses, list) or len(responses) < 2:
        raise RecordError('field "responses": expected a list of at least two')
    responses = [_text(response, f"responses[{i}]") for i, response in enumerate(responses)]
    if not isinstance(ranks, list) or len(ranks) != len(responses):
        raise RecordError('field "ranks": expected a list as long as "responses"')
    if not all(type(r) is int and 1 <= r <= len(ranks) for r in ranks):
        raise RecordError(f'field "ranks": expected whole numbers from 1 (best) to {len(ranks)}')
    return Preference(prompt, responses, ranks)


def _task(record):
    """A ranking without ranks: all answers tie."""
    if not isinstance(record.get("responses"), list):
        raise UnknownShape('field "responses": expected a list')
    return _preference({**record, "ranks": [1] * len(record["responses"])})


# {kind: (the function that reads a record, the shapes that it accepts)}
KINDS = {
    "demonstrations": (_demonstration, "messages, conversations, prompt and response or completion, "
                                       "instruction and output, chosen, or prompt, responses and ranks"),
    "preferences": (_preference, "prompt, chosen and rejected; prompt, responses and ranks; instruction, "
                                 "chosen and rejected; or chosen and rejected as messages or transcripts"),
    "prompts": (_prompt, "prompt, instruction, messages, conversations or chosen"),
    "tasks": (_task, "prompt and responses"),
}
