"""The record formats: one JSON object per line (.jsonl, .jsonl.gz), or a list of them (.json).

    demonstrations   {"messages": [{"role", "content"}, ...]}, TRL's and OpenAI's
                     {"conversations": [{"from", "value"}, ...]}, ShareGPT's
                     {"prompt", "response"}, or "completion" in place of "response"
                     {"instruction", "input", "output"}, Alpaca's
                     {"chosen"}, from preferences of whole conversations
                     {"prompt", "responses", "ranks"}: the answer that is ranked first
    preferences      {"prompt", "chosen", "rejected"}
                     {"instruction", "input", "chosen", "rejected"}
                     {"chosen", "rejected"}: two lists of messages, as in UltraFeedback, or two transcripts,
                     as in Anthropic HH, that share all but the last answer
                     {"prompt", "responses", "ranks"}: K ranked answers
    prompts          {"prompt"} or {"instruction", "input"}; or what comes before the last answer in
                     "messages", "conversations" or "chosen"

A prompt is text or a list of messages whose last is the user's, an answer text or a list with the assistant's
message. "input" is optional, and so are a "margin" and a "probability" (that the chosen one is the better: a
soft label, 1 where it is not said) beside "chosen" and "rejected". Files may also be .parquet,
where pyarrow is installed.

Two kinds of records are bad. Malformed ones (not JSON, wrong types, missing fields) say that the file is not
what it is taken for: they stop a run before it trains on anything, all of them counted and the first few
named. Real files also hold records that are well formed and no use (an empty turn, conversations that do not
share their prompt, the same answer chosen and rejected): each is None in what a reader returns, and more of
them than max_dropped, a share of all records, stop the run too.
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
    probability: float = 1.0        # that the chosen one is the better (pairs only)
    cannot_judge: bool = False      # whether the ties mean only that (feedback/label.py)


class UnknownShape(RecordError):
    """A field of the record itself is missing. The reader adds which shapes it accepts."""


class Unusable(RecordError):
    """A record that is well formed, and of no use."""


def read_demonstrations(path, max_dropped=0.0):
    """Conversations to imitate: a list of message lists, each with something the assistant says."""
    shapes = ("demonstrations have messages, conversations, prompt and response or completion, "
              "instruction and output, chosen, or prompt, responses and ranks")
    return _read(path, _demonstration, shapes, max_dropped)


def read_preferences(path, max_dropped=0.0):
    """Comparisons: a list of Preference."""
    shapes = ("preferences have prompt, chosen and rejected; prompt, responses and ranks; "
              "instruction, chosen and rejected; or chosen and rejected as messages or transcripts")
    return _read(path, _preference, shapes, max_dropped)


def read_tasks(path):
    """Answers to rank, {"prompt", "responses"}: a list of Preference in which all of them tie."""
    def parse(record):
        if not isinstance(record.get("responses"), list):
            raise UnknownShape('field "responses": expected a list')
        return _preference({**record, "ranks": [1] * len(record["responses"])})
    return _read(path, parse, "tasks have prompt and responses", max_dropped=0.0)


def read_prompts(path, max_dropped=0.0):
    """Prompts without answers: a list of message lists. Records that hold more than a prompt serve too."""
    shapes = "prompts have prompt, instruction, messages, conversations or chosen"
    return _read(path, _prompt, shapes, max_dropped)


def write(path, records):
    """Write records (dicts), one per line."""
    aside = f"{path}.{os.getpid()}.tmp"     # the file appears whole, whoever else writes it too
    with open(aside, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    os.replace(aside, path)


def _read(path, parse, shapes, max_dropped):
    out, malformed, unusable = [], [], []
    for where, record in _objects(path):
        try:
            if isinstance(record, RecordError):
                raise record
            if not isinstance(record, dict):
                raise RecordError(f"expected an object, found {_kind(record)}")
            out.append(parse(record))
        except Unusable as e:
            unusable.append(f"{where}: {e}")
            out.append(None)
        except RecordError as e:
            known = f" ({shapes})" if isinstance(e, UnknownShape) and not malformed else ""
            malformed.append(f"{where}: {e}{known}")
    total = len(out) + len(malformed)
    if malformed:
        count = f" ({len(malformed)} of {total} records are malformed)" if len(malformed) > 1 else ""
        raise RecordError(f"{path}, {first_few(malformed)}{count}")
    if not out:
        raise RecordError(f"{path}: no records")
    if unusable:
        what = f"{len(unusable)} of {total} records of no use"
        if len(unusable) > max_dropped * total:
            raise RecordError(f"{path}, {first_few(unusable)} ({what}, --max_dropped is {max_dropped:g})")
        print(f"{path}: {what} are left out: {first_few(unusable)}")
    return out


def first_few(texts, n=3):
    return "; ".join(texts[:n]) + ("; ..." if len(texts) > n else "")


def _objects(path):
    """(where, parsed JSON) of each record in a file."""
    if str(path).endswith(".parquet"):
        yield from _parquet(path)
        return
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
                yield f"line {i}", RecordError(f"not JSON: {e}")


def _parquet(path):
    try:
        from pyarrow import parquet
    except ImportError:
        raise RecordError(f"{path}: Parquet is read where pyarrow is installed") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as e:                              # pyarrow raises exceptions of its own for a bad file
        raise RecordError(f"{path}: not a readable Parquet file: {str(e).splitlines()[0]}") from None
    for i, row in enumerate(rows, 1):                   # a column that this record has no value for is null
        yield f"record {i}", {key: x for key, x in row.items() if x is not None}


def _kind(value):
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number",
             float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _text(record, field, where="", empty=False):
    """A field that must be text, and not blank unless empty is allowed. where: what leads to the record, such
    as "messages[0]."."""
    name = f"{where}{field}"
    if field not in record:
        kind = RecordError if where else UnknownShape
        raise kind(f'field "{name}" is missing')
    value = record[field]
    if not isinstance(value, str):
        raise RecordError(f'field "{name}": expected text, found {_kind(value)}')
    if not value.strip() and not empty:
        raise Unusable(f'field "{name}" is empty')
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise RecordError(f'field "{name}": holds half of a surrogate pair, which is no character')
    return value


SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TWO_WAYS = "can be read in two ways, by its {} and by its {}: leave one out"


def _messages(record, field):
    """A list of {"role", "content"}, or ShareGPT's {"from", "value"}."""
    out = []
    if not isinstance(record[field], list) or not record[field]:
        found = "none" if record[field] == [] else _kind(record[field])
        raise RecordError(f'field "{field}": expected a list of messages, found {found}')
    for i, message in enumerate(record[field]):
        name = f"{field}[{i}]"
        if not isinstance(message, dict):
            raise RecordError(f'field "{name}": expected an object, found {_kind(message)}')
        by, said, roles = "role", "content", {role: role for role in ROLES}
        if "from" in message:
            by, said, roles = "from", "value", SHAREGPT
        role = _text(message, by, f"{name}.")
        if role not in roles:
            raise RecordError(f'field "{name}.{by}": {role[:40]!r} is none of {", ".join(roles)}')
        out.append({"role": roles[role], "content": _text(message, said, f"{name}.")})
    return out


def _prompt(record):
    """What comes before the answer: messages, a user's last."""
    fields = ("prompt", "instruction", "messages", "conversations", "chosen")
    field = next((name for name in fields if name in record), None)
    if field is None:
        raise UnknownShape('field "prompt" is missing')
    if field == "instruction" or (field == "prompt" and not isinstance(record["prompt"], list)):
        text = _text(record, field)
        if field == "instruction" and record.get("input") is not None:
            more = _text(record, "input", empty=True)
            if more.strip():
                text += "\n\n" + more
        return [{"role": "user", "content": text}]
    messages = _conversation(record, field)[:-1] if field == "chosen" else _messages(record, field)
    if field in ("messages", "conversations"):                              # what was answered is left out
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
    if not messages or messages[-1]["role"] != "user":
        last = messages[-1]["role"] if messages else "assistant"
        raise Unusable(f'field "{field}": the last message must be the user\'s, not the {last}\'s')
    return messages


def _demonstration(record):
    """A conversation, as all fields that hold one say it."""
    readers = {"messages": _messages, "conversations": _messages,
               "response": _answered, "completion": _answered}
    readings = {field: read(record, field) for field, read in readers.items() if field in record}
    if "prompt" not in record and not readings and {"instruction", "output"} & record.keys():
        readings["output"] = _answered(record, "output")
    if "chosen" in record and not {"prompt", "instruction"} & record.keys():
        readings["chosen"] = _conversation(record, "chosen")
    if "responses" in record:
        p = _preference(record)
        if len(set(p.ranks)) == 1:
            raise Unusable('field "ranks": no answer is better than another')
        readings["responses"] = [*p.prompt, _said(p.responses[p.ranks.index(min(p.ranks))])]
    if not readings:
        raise UnknownShape('field "response" is missing')
    (field, messages), *others = readings.items()
    for other, said in others:
        if said != messages:
            raise RecordError(TWO_WAYS.format(field, other))
    if not any(m["role"] == "assistant" for m in messages):
        raise Unusable(f'field "{field}": the assistant says nothing')
    return messages


def _said(text):
    return {"role": "assistant", "content": text}


def _answered(record, field):
    """A prompt with its answer: text, or as a completion a list of messages that goes on from it."""
    prompt = _prompt(record)
    if field == "completion" and isinstance(record[field], list):
        return _follows(_messages(record, field), field, prompt)
    return [*prompt, _said(_text(record, field))]


def _follows(messages, field, prompt):
    if messages[0]["role"] != "assistant":
        raise RecordError(f'field "{field}": after the prompt the assistant must speak, not the '
                          f"{messages[0]['role']}")
    return prompt + messages


def _preference(record):
    if "responses" in record:
        if "chosen" in record:
            raise RecordError(TWO_WAYS.format("responses", "chosen"))
        prompt, responses, ranks = _prompt(record), record["responses"], record.get("ranks")
        if not isinstance(responses, list) or len(responses) < 2:
            raise RecordError('field "responses": expected a list of at least two')
        named = {f"responses[{i}]": response for i, response in enumerate(responses)}
        responses = [_text(named, name) for name in named]
        if not isinstance(ranks, list) or len(ranks) != len(responses):
            raise RecordError('field "ranks": expected a list as long as "responses"')
        if not all(type(r) is int and 1 <= r <= len(ranks) for r in ranks):
            raise RecordError(f'field "ranks": expected whole numbers from 1 (best) to {len(ranks)}')
        return Preference(prompt, responses, ranks, cannot_judge=record.get("cannot_judge") is True)
    chosen, rejected = _conversation(record, "chosen"), _conversation(record, "rejected")
    if chosen[:-1] != rejected[:-1] or not chosen[:-1] or chosen[-2]["role"] != "user":
        raise Unusable('fields "chosen" and "rejected": '
                       "the conversations must share all but the last answer")
    if chosen == rejected:
        raise Unusable('fields "chosen" and "rejected" are the same')
    margin, probability = record.get("margin", 0.0), record.get("probability", 1.0)
    if type(margin) not in (int, float) or not 0 <= margin <= 1e6:
        raise RecordError('field "margin": expected a number from 0 to 1000000')
    if type(probability) not in (int, float) or not 0 <= probability <= 1:
        raise RecordError('field "probability": expected a number from 0 to 1')
    answers = [chosen[-1]["content"], rejected[-1]["content"]]
    return Preference(chosen[:-1], answers, [1, 2], float(margin), float(probability))


def _conversation(record, field):
    """A whole conversation, whose last message is the answer: the prompt with a text, with a list of messages
    that goes on from it or begins with it; or without a prompt such a list, or a transcript."""
    has_prompt = "prompt" in record or "instruction" in record
    if field not in record or not isinstance(record[field], list):
        text = _text(record, field)
        return _prompt(record) + [_said(text)] if has_prompt else _transcript(text, field)
    messages = _messages(record, field)
    if messages[-1]["role"] != "assistant":
        raise Unusable(f'field "{field}": the last message must be the assistant\'s')
    if has_prompt and messages[:-1] and isinstance(record.get("prompt"), str):
        # UltraFeedback: the prompt's text stands beside a conversation that holds it.
        if all(m["content"] != record["prompt"] for m in messages[:-1]):
            raise RecordError(f'fields "prompt" and "{field}": the conversation does not hold the prompt')
    elif has_prompt:
        prompt = _prompt(record)
        if messages[:len(prompt)] != prompt:
            messages = _follows(messages, field, prompt)
    return messages


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
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[s], "content": c} for s, c in zip(speakers, contents)]
