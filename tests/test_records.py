"""The record formats: what is good is read as documented, what is bad is one line that names file, line
and field."""
import gzip
import json
import sys
from functools import partial

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from data import records
from data.records import Preference, RecordError, write

demonstrations, preferences, prompts = (partial(records.read, kind)
                                        for kind in ("demonstrations", "preferences", "prompts"))

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
NO = {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be kind."}
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who are you?\n\nAssistant: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


# ------------------------------------------------------------------------------------ good records

@pytest.mark.parametrize("record, expected", [
    ({"messages": [USER, BOT]}, [USER, BOT]),
    ({"messages": [SYSTEM, USER, BOT, USER, BOT]}, [SYSTEM, USER, BOT, USER, BOT]),
    ({"prompt": "Hi", "response": "Hello."}, [USER, BOT]),
    ({"prompt": [SYSTEM, USER], "response": "Hello."}, [SYSTEM, USER, BOT]),
    ({"instruction": "Hi", "output": "Hello."}, [USER, BOT]),
    ({"instruction": "Hi", "input": "", "output": "Hello."}, [USER, BOT]),
    ({"instruction": "Hi", "input": None, "output": "Hello."}, [USER, BOT]),
    ({"instruction": "Add", "input": "1 2", "output": "Hello."},
     [{"role": "user", "content": "Add\n\n1 2"}, BOT]),
    ({"messages": [{**USER, "name": "Ann"}, BOT], "source": 3}, [USER, BOT]),   # what is not ours is left out
    ({"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"},
                        {"from": "gpt", "value": "Hello."}]}, [SYSTEM, USER, BOT]),         # ShareGPT
    ({"prompt": "Hi", "completion": "Hello."}, [USER, BOT]),                                # TRL
    ({"prompt": [SYSTEM, USER], "completion": [BOT]}, [SYSTEM, USER, BOT]),
    ({"prompt": "Hi", "completion": [USER, BOT]}, [USER, BOT]),                 # it begins with the prompt
    ({"prompt": "Hi", "response": [BOT]}, [USER, BOT]),
    ({"chosen": [USER, BOT], "rejected": [USER, NO]}, [USER, BOT]),
    ({"chosen": [USER, BOT], "messages": [USER, BOT]}, [USER, BOT]),            # two readings that agree
    ({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}, [USER, BOT]),
    ({"prompt": [USER], "chosen": [BOT], "rejected": [NO]}, [USER, BOT]),
    ({"prompt": "Hi", "chosen": [USER, BOT], "rejected": [USER, NO]}, [USER, BOT]),
    ({"instruction": "Hi", "chosen": "Hello.", "rejected": "No."}, [USER, BOT]),
    ({"chosen": HH + "A friend.", "rejected": HH + "Nobody."},                              # Anthropic HH
     [USER, BOT, {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A friend."}]),
    ({"instruction": "Hi", "output": "Hello.", "chosen": "a", "rejected": "b"}, [USER, BOT]),
    ({"prompt": "Hi", "responses": ["No.", "Hello.", "Go."], "ranks": [3, 1, 2]}, [USER, BOT]),
    ({"prompt": "Hi", "responses": ["No.", "Hello.", "Go."], "ranks": [3, 2, 2]}, [USER, BOT]),
])
def test_each_demonstration_format_is_read(tmp_path, record, expected):
    write(tmp_path / "a.jsonl", [record])
    assert demonstrations(tmp_path / "a.jsonl") == [expected]


@pytest.mark.parametrize("record, expected", [
    ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, Preference([USER], ["a", "b"], [1, 2], 0.0)),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": 2},
     Preference([USER], ["a", "b"], [1, 2], 2.0)),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b", "probability": 0.75},
     Preference([USER], ["a", "b"], [1, 2], 0.0, 0.75)),
    ({"prompt": [USER, BOT, USER], "chosen": "a", "rejected": "b"},
     Preference([USER, BOT, USER], ["a", "b"], [1, 2])),
    ({"instruction": "Hi", "input": "x", "chosen": "a", "rejected": "b"},
     Preference([{"role": "user", "content": "Hi\n\nx"}], ["a", "b"], [1, 2])),
    ({"prompt": "Hi", "responses": ["a", "b", "c"], "ranks": [2, 3, 1]},
     Preference([USER], ["a", "b", "c"], [2, 3, 1])),
    ({"prompt": "Hi", "responses": ["a", "b", "c"], "ranks": [1, 1, 2]},
     Preference([USER], ["a", "b", "c"], [1, 1, 2])),
    ({"chosen": HH + "A friend.", "rejected": HH + "Nobody."},
     Preference([USER, BOT, {"role": "user", "content": "Who are you?"}], ["A friend.", "Nobody."], [1, 2])),
    ({"prompt": [USER], "chosen": [BOT], "rejected": [NO]}, Preference([USER], ["Hello.", "No."], [1, 2])),
    ({"chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, NO], "margin": 1.5},
     Preference([SYSTEM, USER], ["Hello.", "No."], [1, 2], 1.5)),
    ({"prompt": "Hi", "chosen": [USER, BOT], "rejected": [USER, NO], "score_chosen": 7.5,
      "messages": [USER, BOT]},
     Preference([USER], ["Hello.", "No."], [1, 2])),                                        # UltraFeedback
    ({"prompt": "Hi", "chosen": [BOT], "rejected": [NO]}, Preference([USER], ["Hello.", "No."], [1, 2])),
    ({"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, NO]},
     Preference([USER], ["Hello.", "No."], [1, 2])),
    # only a blank line and the name start a turn
    ({"chosen": "Human: Hi\n\nAssistant: One:\n\ntwo", "rejected": "Human: Hi\n\nAssistant: a Human: b"},
     Preference([USER], ["One:\n\ntwo", "a Human: b"], [1, 2])),
])
def test_each_preference_format_is_read(tmp_path, record, expected):
    write(tmp_path / "a.jsonl", [record])
    assert preferences(tmp_path / "a.jsonl") == [expected]


@pytest.mark.parametrize("record, expected", [
    ({"prompt": "Hi"}, [USER]),
    ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, [USER]),
    ({"instruction": "Hi", "input": "", "output": "x"}, [USER]),
    ({"messages": [SYSTEM, USER, BOT]}, [SYSTEM, USER]),
    ({"messages": [USER, BOT, USER]}, [USER, BOT, USER]),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, [USER]),
    ({"chosen": HH + "A friend.", "rejected": HH + "Nobody."},
     [USER, BOT, {"role": "user", "content": "Who are you?"}]),
    ({"chosen": [USER, BOT], "rejected": [USER, NO]}, [USER]),
])
def test_prompts_are_read_from_records_with_more(tmp_path, record, expected):
    write(tmp_path / "a.jsonl", [record])
    assert prompts(tmp_path / "a.jsonl") == [expected]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["no BOM", "BOM"])
def test_every_kind_of_file_is_read(tmp_path, name, bom):
    good = [{"prompt": "naïve 猫"}, {"prompt": "two\u2028lines\nof text"}]
    text = json.dumps(good, ensure_ascii=False) if ".jsonl" not in name else "\r\n\n".join(
        json.dumps(r, ensure_ascii=False) for r in good)
    content = bom + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [m[0]["content"] for m in prompts(tmp_path / name)] == [r["prompt"] for r in good]


def test_parquet_is_read_where_pyarrow_is_installed_and_refused_in_one_line_elsewhere(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RecordError, match="a.parquet: Parquet is read where pyarrow is installed"):
        prompts(path)
    monkeypatch.undo()
    pyarrow = pytest.importorskip("pyarrow")
    with pytest.raises(RecordError, match="a.parquet: cannot be read: ") as e:
        prompts(path)
    assert "\n" not in str(e.value)
    rows = [{"messages": [USER, BOT], "prompt": None}, {"messages": None, "prompt": "naïve 猫"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert prompts(path) == [[USER], [{"role": "user", "content": "naïve 猫"}]]


def test_written_records_are_read_back(tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": "naïve\u2028猫\n\"x\""}, {"prompt": "b"}])
    assert [m[0]["content"] for m in prompts(tmp_path / "a.jsonl")] == ["naïve\u2028猫\n\"x\"", "b"]


# ------------------------------------------------------------------------------------ bad records

PAIR = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 2]}


@pytest.mark.parametrize("read, record, expected", [
    (prompts, [], ["expected an object", "a list"]),
    (prompts, "Hi", ["expected an object", "text"]),
    (prompts, 3.5, ["expected an object", "a number"]),
    (prompts, None, ["expected an object", "null"]),
    (prompts, True, ["expected an object", "true or false"]),
    (prompts, {}, ['"prompt" is missing']),
    (prompts, {"prompt": None}, ['"prompt"', "expected text, found null"]),
    (prompts, {"prompt": 7}, ['"prompt"', "expected text, found a number"]),
    (prompts, {"prompt": " \n"}, ['"prompt" is empty']),
    (prompts, {"prompt": "\ud83d"}, ['"prompt"', "surrogate"]),
    (prompts, {"prompt": []}, ['"prompt"', "found none"]),
    (prompts, {"prompt": [USER, BOT]}, ['"prompt"', "last message", "assistant"]),
    (prompts, {"prompt": [USER, "Hi"]}, ['"prompt[1]"', "expected an object, found text"]),
    (prompts, {"prompt": [{"role": "user"}]}, ['"prompt[0].content" is missing']),
    (prompts, {"prompt": [{"content": "Hi"}]}, ['"prompt[0].role" is missing']),
    (prompts, {"prompt": [{"role": "human", "content": "Hi"}]},
     ['"prompt[0].role"', "human", "system, user, assistant"]),
    (prompts, {"instruction": ""}, ['"instruction" is empty']),
    (prompts, {"instruction": "Hi", "input": 3}, ['"input"', "a number"]),
    (prompts, {"messages": [BOT]}, ['"messages"', "last message", "assistant"]),
    (prompts, {"chosen": [BOT]}, ['"chosen"', "last message"]),
    (prompts, {"chosen": "Assistant: hi"}, ['"chosen"', "last message"]),
    (demonstrations, {"prompt": "Ho", "completion": [USER, BOT]},
     ['"completion"', "the assistant must speak"]),
    (preferences, {"prompt": [USER], "chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, NO]},
     ['"chosen"', "the assistant must speak"]),
    (prompts, {"conversations": [{"from": "bing", "value": "Hi"}]},
     ['"conversations[0].from"', "bing", "gpt"]),
    (prompts, {"conversations": [{"from": 3, "value": "Hi"}]}, ['"conversations[0].from"', "a number"]),
    (demonstrations, {"prompt": "Hi", "response": "a", "completion": "b"},
     ["response", "completion", "two ways"]),
    (demonstrations, {"messages": [USER, BOT], "chosen": [USER, NO]}, ["messages", "chosen", "two ways"]),
    (demonstrations, {"prompt": "Hi", "completion": []}, ['"completion"', "found none"]),
    (demonstrations, {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 1]}, ["no answer is better"]),
    (demonstrations, {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1]}, ['"ranks"', "as long as"]),
    (preferences, {**RANKED, "chosen": "a"}, ["responses", "chosen", "two ways"]),
    (preferences, {"chosen": [USER, BOT], "rejected": [USER]}, ['"rejected"', "must be the assistant's"]),
    (preferences, {"chosen": [USER, BOT], "rejected": [SYSTEM, USER, NO]}, ["share all but the last"]),
    (preferences, {"chosen": [BOT], "rejected": [NO]}, ["share all but the last"]),
    (preferences, {"prompt": "Ho", "chosen": [USER, BOT], "rejected": [USER, NO]},
     ['"prompt" and "chosen"', "does not hold the prompt"]),
    (demonstrations, {"prompt": "Hi"}, ['"response" is missing']),
    (demonstrations, {"prompt": "Hi", "response": ""}, ['"response" is empty']),
    (demonstrations, {"prompt": "Hi", "response": ["x"]}, ['"response[0]"', "found text"]),
    (demonstrations, {"prompt": "Hi", "response": {}}, ['"response"', "expected text, found an object"]),
    (demonstrations, {"instruction": "Hi"}, ['"output" is missing']),
    (demonstrations, {"messages": {}}, ['"messages"', "an object"]),
    (demonstrations, {"messages": []}, ['"messages"', "found none"]),
    (demonstrations, {"messages": [USER]}, ['"messages"', "assistant says nothing"]),
    (demonstrations, {"messages": [USER, {"role": "assistant", "content": ""}]},
     ['"messages[1].content" is empty']),
    (demonstrations, {"messages": [USER, {"role": "assistant", "content": "\udc00"}]},
     ['"messages[1].content"', "surrogate"]),
    (preferences, {"prompt": "Hi", "chosen": "a"}, ['"rejected" is missing']),
    (preferences, {"prompt": "Hi", "rejected": "a"}, ['"chosen" is missing']),
    (preferences, {"chosen": "a", "rejected": "b"}, ['"chosen"', "transcript"]),
    (preferences, {**PAIR, "prompt": None}, ['"prompt"', "null"]),
    (preferences, {**PAIR, "margin": -1}, ['"margin"', "from 0"]),
    (preferences, {**PAIR, "margin": True}, ['"margin"']),
    (preferences, {**PAIR, "probability": 1.01}, ['"probability"', "from 0 to 1"]),
    (preferences, {**PAIR, "probability": "0.5"}, ['"probability"']),
    (preferences, {**PAIR, "probability": float("nan")}, ['"probability"']),
    (preferences, {**PAIR, "margin": "1"}, ['"margin"']),
    (preferences, {**PAIR, "margin": float("nan")}, ['"margin"']),
    (preferences, {**PAIR, "margin": float("inf")}, ['"margin"']),
    (preferences, {**PAIR, "margin": 10 ** 400}, ['"margin"']),
    (preferences, {**RANKED, "responses": "ab"}, ['"responses"', "at least two"]),
    (preferences, {**RANKED, "responses": ["a"]}, ['"responses"', "at least two"]),
    (preferences, {**RANKED, "responses": ["a", 1]}, ['"responses[1]"', "a number"]),
    (preferences, {**RANKED, "responses": ["a", ""]}, ['"responses[1]" is empty']),
    (preferences, {"prompt": "Hi", "responses": ["a", "b"]}, ['"ranks"', "as long as"]),
    (preferences, {**RANKED, "ranks": [1]}, ['"ranks"', "as long as"]),
    (preferences, {**RANKED, "ranks": [0, 1]}, ['"ranks"', "from 1"]),
    (preferences, {**RANKED, "ranks": [1, 3]}, ['"ranks"', "to 2"]),
    (preferences, {**RANKED, "ranks": [1, 2.0]}, ['"ranks"', "whole numbers"]),
    (preferences, {**RANKED, "ranks": [True, 2]}, ['"ranks"', "whole numbers"]),
    # Anthropic HH
    (preferences, {"chosen": HH, "rejected": HH + "x"}, ['"chosen"', "a turn is empty"]),
    (preferences, {"chosen": HH + "x", "rejected": "\n\nHuman: Hi"},
     ['"rejected"', "ends with the assistant's"]),
    (preferences, {"chosen": "Well. " + HH + "x", "rejected": HH + "y"}, ['"chosen"', "transcript"]),
    (preferences, {"chosen": HH + "x", "rejected": HH.replace("Hello", "Hey") + "y"},
     ["share all but the last answer"]),
    (preferences, {"chosen": "Assistant: x", "rejected": "Assistant: y"}, ["share all but the last answer"]),
    (preferences, {"chosen": "Human: Hi\n\nAssistant: x\n\nAssistant: y",
                   "rejected": "Human: Hi\n\nAssistant: x\n\nAssistant: z"},
     ["share all but the last answer"]),
    (demonstrations, {"messages": [{"role": "a\nb", "content": "x"}]}, ['"messages[0].role"']),
])
def test_a_bad_record_is_one_line_naming_file_line_and_field(tmp_path, read, record, expected):
    good = {"prompt": "Hi", "response": "Hello.", "chosen": "a", "rejected": "b"}
    for name, where in (("a.jsonl", "line 3"), ("a.json", "record 2")):
        path = tmp_path / name
        # line 2 is blank: it counts as a line, though not as a record
        lines = f"{json.dumps(good)}\n\n{json.dumps(record)}\n"
        path.write_text(json.dumps([good, record]) if name == "a.json" else lines)
        with pytest.raises(RecordError) as e:
            read(path)
        assert str(e.value).startswith(f"{path}, {where}: ")
        assert "\n" not in str(e.value)
        for words in expected:
            assert words in str(e.value)


@pytest.mark.parametrize("read, record, shapes", [
    (demonstrations, {"question": "Hi", "answer": "Hello."},
     ["messages", "prompt and response", "instruction and output"]),
    (demonstrations, {"prompt": "Hi"}, ["messages", "prompt and response"]),
    (preferences, {"question": "Hi", "good": "a", "bad": "b"},
     ["prompt, chosen and rejected", "responses and ranks"]),
    (prompts, {"text": "Hi"}, ["prompt", "instruction"])])
def test_a_record_of_no_known_shape_is_told_which_there_are(tmp_path, read, record, shapes):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(RecordError, match="line 1: field .* is missing") as e:
        read(tmp_path / "a.jsonl")
    assert all(shape in str(e.value) for shape in shapes) and "\n" not in str(e.value)


@pytest.mark.parametrize("name, content, expected", [
    ("a.jsonl", b"", "no records"),
    ("a.jsonl", b"\n \n", "no records"),
    ("a.jsonl", b"\xef\xbb\xbf", "no records"),
    ("a.json", b"[]", "no records"),
    ("a.json", b"", "not JSON"),
    ("a.json", b'{"prompt": "Hi"}', "expected a list of records, found an object"),
    ("a.jsonl", b'{"prompt": "Hi"}\n{"prompt": "H', "line 2: not JSON"),
    ("a.jsonl", b'{"prompt": "Hi"} {"prompt": "Hi"}', "line 1: not JSON"),
    ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
    ("a.json", b"[" * 100_000, "not JSON"),
    ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
    ("a.jsonl", b'{"prompt": "\xff"}', "not UTF-8 (byte 12)"),
    ("a.jsonl", '{"prompt": "Hi"}'.encode("utf-16"), "not UTF-8 (byte 0)"),
    ("a.jsonl.gz", b'{"prompt": "Hi"}', "cannot be read"),
    # mtime: the tests' names must not depend on the second in which they are collected.
    ("a.jsonl.gz", gzip.compress(b'{"prompt": "Hi"}' * 50, mtime=0)[:-12], "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b'{"prompt": "Hi"}', mtime=0)[:5], "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b"", mtime=0), "no records"),
])
def test_a_bad_file_is_one_line_naming_it(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError) as e:
        prompts(tmp_path / name)
    assert str(e.value).startswith(str(tmp_path / name))
    assert expected in str(e.value) and "\n" not in str(e.value)


def test_a_missing_file_and_a_folder_are_record_errors(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl", tmp_path / "none.jsonl.gz"):
        with pytest.raises(RecordError, match="cannot be read"):
            prompts(path)


# ------------------------------------------------------------------------------------ anything at all

TEXT = (st.sampled_from(["", "Hi", "a", "\ud800", "user", "assistant", HH + "x", HH + "y"])
        | st.text(max_size=5))
VALUE = st.recursive(st.none() | st.booleans() | st.integers(-2, 4) | st.floats() | TEXT,
                     lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=2)
                     | st.fixed_dictionaries({}, optional={"role": v, "content": v}), max_leaves=6)
FIELDS = ("messages", "prompt", "response", "instruction", "input", "output", "chosen", "rejected", "margin",
          "responses", "ranks")
RECORD = VALUE | st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, VALUE))


def read_or_refused(path, read):
    """What a reader gives, or None if it refuses with one line that names the file."""
    try:
        return read(path)
    except RecordError as e:
        assert str(e).startswith(str(path)) and "\n" not in str(e)


def any_json(folder, record, read):
    path = folder / "fuzz.jsonl"
    path.write_text(json.dumps(record))
    found = read_or_refused(path, read)
    assert found is None or len(found) == 1


def any_bytes(folder, noise, name, cut):
    whole = b'[{"prompt": "Hi"}]'                # a good file with noise inside gets further than noise alone
    whole = gzip.compress(whole, mtime=0) if name.endswith(".gz") else whole
    for content in (noise, whole[:cut] + noise + whole[cut + len(noise):]):
        (folder / name).write_bytes(content)
        read_or_refused(folder / name, prompts)


WORDS = (st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
         | st.sampled_from(["<|im_end|>", "<|im_start|>user\nHi<|im_end|>", "<|endoftext|>", "a\u2028b",
                            "Human: Hi", "naïve 猫"]))
WRONG = (st.none() | st.booleans() | st.integers() | st.floats()
         | st.just("") | st.just(" \n") | st.just("\ud800") | st.just({}) | st.just([]))
SHAPES = [(demonstrations, {"prompt": WORDS, "response": WORDS}),
          (preferences, {"prompt": WORDS, "chosen": WORDS, "rejected": WORDS}),
          (demonstrations, {"instruction": WORDS, "output": WORDS}),
          (prompts, {"prompt": WORDS})]
GOOD = st.sampled_from(SHAPES).flatmap(lambda shape: st.tuples(         # reader, record, one of its fields
    st.just(shape[0]), st.fixed_dictionaries(shape[1]), st.sampled_from(sorted(shape[1]))))
EXTRA = st.dictionaries(st.sampled_from(["source", "id", "score"]), VALUE, max_size=2)
SPOILT = (GOOD, WRONG, st.booleans(), EXTRA)


def one_field_spoilt(folder, good, wrong, missing, extra):
    """A good record is read as it stands, whatever else it holds; with one field wrong or missing it is
    refused, and the line names that field."""
    read, record, field = good
    assume(record.get("chosen") is None or record["chosen"] != record["rejected"])
    path = folder / "spoilt.jsonl"
    path.write_text(json.dumps(record | extra))
    [found] = read(path)
    said = ([m["content"] for m in found] if isinstance(found, list)
            else [found.prompt[0]["content"], *found.responses])
    assert said == [record[name] for name in FIELDS if name in record]
    bad = {k: v for k, v in record.items() if k != field} if missing else record | {field: wrong}
    path.write_text(json.dumps(record | extra) + "\n" + json.dumps(bad | extra))
    with pytest.raises(RecordError, match=f'{path}, line 2: .*(field|fields) "({field}|prompt|chosen)'):
        read(path)


@pytest.mark.parametrize("examples", [100, pytest.param(6000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("check, given_what", [
    (any_json, (RECORD, st.sampled_from([demonstrations, preferences, prompts]))),
    (any_bytes, (st.binary(max_size=60), st.sampled_from(["fuzz.json", "fuzz.jsonl", "fuzz.jsonl.gz"]),
                 st.integers(0, 60))),
    (one_field_spoilt, SPOILT)], ids=lambda v: getattr(v, "__name__", ""))
def test_whatever_a_file_holds_it_is_read_rightly_or_refused_in_one_line(folder, check, given_what, examples):
    how = settings(deadline=None, max_examples=examples, suppress_health_check=list(HealthCheck))
    given(st.tuples(*given_what))(how(lambda values: check(folder, *values)))()


def test_a_line_of_a_million_characters_is_a_record_like_any_other(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "word " * 200_000}))
    assert len(prompts(tmp_path / "a.jsonl")[0][0]["content"]) == 1_000_000
    (tmp_path / "a.jsonl").write_text('{"prompt": "' + "x" * 1_000_000)
    with pytest.raises(RecordError, match="line 1: not JSON") as e:
        prompts(tmp_path / "a.jsonl")
    assert len(str(e.value)) < 300


def test_a_tie_is_read_as_one(folder):
    path = folder / "tie.jsonl"
    path.write_text(json.dumps({**RANKED, "ranks": [1, 1]}) + "\n")
    assert preferences(path)[0].ranks == [1, 1]


# ------------------------------------------------------------------------------- bad rows of real files

def lines(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(r + "\n" if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def test_malformed_records_are_all_counted_and_the_first_few_named(folder, capsys):
    path = lines(folder, PAIR, "{", {"prompt": 1, "chosen": "a", "rejected": "b"}, {"prompt": "a"}, [],
                 {**PAIR, "chosen": ""})
    with pytest.raises(RecordError, match=r"rows.jsonl, line 2: not JSON: .*; line 3: field \"prompt\": .*; "
                                          r"line 4: .*; \.\.\. \(4 of 6 records are malformed\)$") as e:
        preferences(path, 1.0)
    assert "\n" not in str(e.value) and capsys.readouterr().out == ""


@pytest.mark.parametrize("useless, said", [
    ({**PAIR, "chosen": " "}, '"chosen" is empty'), ({**PAIR, "chosen": PAIR["rejected"]}, "are the same"),
    ({"chosen": HH + "x", "rejected": HH + "x "}, "are the same"),
    ({"chosen": HH, "rejected": HH + "x"}, "a turn is empty"),
    ({"chosen": HH + "x", "rejected": "y" + HH + "x"}, None),
    ({"chosen": HH + "x", "rejected": HH.replace("Human: ", "Human: y") + "x"}, "share all but the last"),
    ({"chosen": [USER], "rejected": [USER, NO]}, "must be the assistant's")])
def test_records_of_no_use_are_left_out_up_to_a_share(folder, capsys, useless, said):
    path = lines(folder, *[PAIR] * 99, useless)
    if said is None:
        with pytest.raises(RecordError, match="line 100: "):
            preferences(path, 1.0)
        return
    found = preferences(path, 0.01)
    assert len(found) == 100 and found[99] is None and None not in found[:99]
    printed = capsys.readouterr().out
    assert "1 of 100 records of no use are left out: line 100: " in printed and said in printed
    with pytest.raises(RecordError, match=r"line 100: .*\(1 of 100 records of no use, --max_dropped is 0"):
        preferences(path, 0.0)
    assert preferences(lines(folder, *[PAIR] * 5, useless), 0.01)[5] is None    # one may go in any file
    with pytest.raises(RecordError, match="2 of 7 records of no use"):
        preferences(lines(folder, *[PAIR] * 5, useless, useless), 0.01)


def test_preferences_as_demonstrations_are_said_in_one_line(folder, capsys):
    path = lines(folder, PAIR, {"prompt": "Hi", "response": "a"}, PAIR)
    assert records.read("demonstrations", path)[0][1]["content"] == "a"
    said = "2 of 3 records are preferences: their chosen answers are imitated\n"
    assert capsys.readouterr().out == f"{path}: {said}"
    preferences(lines(folder, PAIR))
    assert capsys.readouterr().out == ""


def test_no_more_than_a_few_records_of_no_use_are_named(folder, capsys):
    preferences(lines(folder, *[PAIR] * 5, *[{**PAIR, "chosen": ""}] * 5), 0.5)
    printed = capsys.readouterr().out
    assert "5 of 10" in printed and "line 8: " in printed and "line 9: " not in printed and "; ..." in printed
