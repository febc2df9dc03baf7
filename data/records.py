"""The record formats: one JSON object per line (.jsonl, .jsonl.gz), or a list of them (.json).

    demonstrations   {"messages": [{"role", "content"}, ...]}; {"prompt", "response"};
                     or {"instruction", "input", "output"}
    preferences      {"prompt", "chosen", "rejected"}; {"instruction", "input", "chosen", "rejected"};
                     {"chosen", "rejected"}, two transcripts as in Anthropic HH;
                     or {"prompt", "responses", "ranks"}
    prompts          {"prompt"}; or {"instruction", "input"}

A prompt is text or a list of messages whose last is the user's. "input" is optional, and so is a "margin"
beside "chosen" and "rejected". Each reader returns all records of a file or raises RecordError naming file,
line and field: a bad record stops a run before it trains on anything.
"""
import gzip
import json
import os
import re
import zlib
from dataclasses import dataclass

from data.tokenizer import ROLES


class RecordError(ValueError):
    """One line of text: file, line (or number in the list), field, and what is wrong."""


@dataclass
class Preference:
    prompt: list            # messages, a user's last
    responses: list         # K ≥ 2 texts
    ranks: list             # K whole numbers, 1 for the best; equal numbers are ties
    margin: float = 0.0     # how much the chosen one should win by (pairs only)


class UnknownShape(RecordError):
    """A field of the record itself is missing. The reader adds which shapes it accepts."""


def read_demonstrations(path):
    """Conversations to imitate: a list of message lists, each with something the assistant says."""
    shapes = "demonstrations have messages, prompt and response, or instruction and output"
    return _read(path, _demonstration, shapes)


def read_preferences(path):
    """Comparisons: a list of Preference."""
    shapes = ("preferences have prompt, chosen and rejected; prompt, responses and ranks; "
              "instruction, chosen and rejected; or chosen and rejected as transcripts")
    return _read(path, _preference, shapes)


def read_prompts(path):
    """Prompts without answers: a list of message lists. Records that hold more than a prompt serve too."""
    return _read(path, _prompt, "prompts have prompt, or instruction")


def write(path, records):
    """Write records (dicts), one per line."""
    aside = f"{path}.{os.getpid()}.tmp"     # the file appears whole, whoever else writes it too
    with open(aside, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    os.replace(aside, path)


def _read(path, parse, shapes):
    out = []
    for where, record in _objects(path):
        try:
            if not isinstance(record, dict):
                raise RecordError(f"expected an object, found {_kind(record)}")
            out.append(parse(record))
        except UnknownShape as e:
            raise RecordError(f"{path}, {where}: {e} ({shapes})") from None
        except RecordError as e:
            raise RecordError(f"{path}, {where}: {e}") from None
    if not out:
        raise RecordError(f"{path}: no records")
    return out


def _objects(path):
    """(where, parsed JSON) of each record in a file."""
    open_file = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_file(path, "rb") as f:
            content = f.read().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise RecordError(f"{path}: not UTF-8 (byte {e.start})") from None
    except (OSError, EOFError, zlib.error) as e:
        reason = getattr(e, "strerror", None) or e          # a damaged .gz file has no strerror
        raise RecordError(f"{path}: cannot be read: {reason}") from None
    if str(path).endswith((".json", ".json.gz")):
        try:
            records = json.loads(content)
        except (ValueError, RecursionError) as e:
            raise RecordError(f"{path}: not JSON: {e}") from None
        if not isinstance(records, list):
            raise RecordError(f"{path}: expected a list of records, found {_kind(records)}")
        for i, record in enumerate(records, 1):
            yield f"record {i}", record
        return
    for i, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {i}", json.loads(line)
            except (ValueError, RecursionError) as e:
                raise RecordError(f"{path}, line {i}: not JSON: {e}") from None


def _kind(value):
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number",
             float: "a number", type(None): "null"}
    return names[type(value)]


def _text(record, field, where="", empty=False):
    """A field that must be text. where: what leads to the record, such as "messages[0]."."""
    name = f"{where}{field}"
    if field not in record:
        missing = f'field "{name}" is missing'
        if where:
            raise RecordError(missing)
        raise UnknownShape(missing)
    return _check_text(record[field], name, empty)


def _check_text(value, name, empty=False):
    """The value itself, if it is text, and not blank unless empty is allowed."""
    if not isinstance(value, str):
        raise RecordError(f'field "{name}": expected text, found {_kind(value)}')
    if not value.strip() and not empty:
        raise RecordError(f'field "{name}" is empty')
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise RecordError(f'field "{name}": holds half of a surrogate pair, which is no character')
    return value


def _messages(value, name):
    if not isinstance(value, list) or not value:
        found = "none" if value == [] else _kind(value)
        raise RecordError(f'field "{name}": expected a list of messages, found {found}')
    out = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise RecordError(f'field "{name}[{i}]": expected an object, found {_kind(message)}')
        role = _text(message, "role", f"{name}[{i}].")
        if role not in ROLES:
            raise RecordError(f'field "{name}[{i}].role": {role[:40]!r} is none of {", ".join(ROLES)}')
        out.append({"role": role, "content": _text(message, "content", f"{name}[{i}].")})
    return out


def _prompt(record):
    if "prompt" not in record and "instruction" in record:
        text = _text(record, "instruction")
        if record.get("input") is not None:
            more = _text(record, "input", empty=True)
            if more.strip():
                text += "\n\n" + more
        return [{"role": "user", "content": text}]
    if isinstance(record.get("prompt"), list):
        messages = _messages(record["prompt"], "prompt")
        last = messages[-1]["role"]
        if last != "user":
            raise RecordError(f'field "prompt": the last message must be the user\'s, not the {last}\'s')
        return messages
    return [{"role": "user", "content": _text(record, "prompt")}]


def _demonstration(record):
    if "messages" in record:
        messages = _messages(record["messages"], "messages")
        if not any(m["role"] == "assistant" for m in messages):
            raise RecordError('field "messages": the assistant says nothing')
        return messages
    field = "output" if "instruction" in record and "prompt" not in record else "response"
    return _prompt(record) + [{"role": "assistant", "content": _text(record, field)}]


def _preference(record):
    if "responses" in record:
        prompt, responses, ranks = _prompt(record), record["responses"], record.get("ranks")
        if not isinstance(responses, list) or len(responses) < 2:
            raise RecordError('field "responses": expected a list of at least two')
        responses = [_check_text(r, f"responses[{i}]") for i, r in enumerate(responses)]
        if not isinstance(ranks, list) or len(ranks) != len(responses):
            raise RecordError('field "ranks": expected a list as long as "responses"')
        if not all(type(r) is int and 1 <= r <= len(ranks) for r in ranks):
            raise RecordError(f'field "ranks": expected whole numbers from 1 (best) to {len(ranks)}')
        return Preference(prompt, responses, ranks)
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    if "prompt" in record or "instruction" in record:
        prompt = _prompt(record)
    else:
        prompt, chosen, rejected = _hh(chosen, rejected)
    margin = record.get("margin", 0.0)
    if type(margin) not in (int, float) or not 0 <= margin <= 1e6:
        raise RecordError('field "margin": expected a number from 0 to 1000000')
    ranks = [1, 1] if chosen == rejected else [1, 2]                # the same answer twice is a tie
    return Preference(prompt, [chosen, rejected], ranks, float(margin))


def _hh(chosen, rejected):
    """Anthropic HH: two transcripts of "Human:" and "Assistant:" turns that differ in the last answer, as
    (prompt, chosen answer, rejected answer)."""
    def turns(text, field):
        # pieces: "", speaker, text, speaker, text, ...
        pieces = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text.strip())
        speakers, contents = pieces[1::2], [c.strip() for c in pieces[2::2]]
        if pieces[0] or not speakers or speakers[-1] != "Assistant":
            raise RecordError(f'field "{field}": with no "prompt", expected a transcript of Human: and '
                              "Assistant: turns that ends with the assistant's")
        if not all(contents):
            raise RecordError(f'field "{field}": a turn is empty')
        roles = {"Human": "user", "Assistant": "assistant"}
        return [{"role": roles[s], "content": c} for s, c in zip(speakers, contents)]

    chosen_turns, rejected_turns = turns(chosen, "chosen"), turns(rejected, "rejected")
    prompt = chosen_turns[:-1]
    if prompt != rejected_turns[:-1] or not prompt or prompt[-1]["role"] != "user":
        raise RecordError('fields "chosen" and "rejected": '
                          "the transcripts must share all but the last answer")
    return prompt, chosen_turns[-1]["content"], rejected_turns[-1]["content"]
