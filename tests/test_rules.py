"""The rules that a program can check, and what lab/follow.py and lab/ifeval.py make of them."""
import json
import random
import re
import subprocess

import pytest
from helpers.start import ROOT

from data import records
from lab import follow, ifeval, rules

AT_LEAST, LESS = rules.AT_LEAST, rules.LESS
REQUEST = "How do bees find their way, and why does it matter?"
PLAIN = ("Bees use the sun as a compass. They also learn landmarks, such as trees and houses. Some bees "
         "dance to tell others where flowers are. It takes 2 or 3 flights to learn a place. This is good.")
OTHER = "By the sun, and by smell."
# {rule: (answers that keep it, answers that break it)}
CASES = [
    (rules.Words(AT_LEAST, 5), ["One two three four five.", "A b c d-e, f"], ["One two three four.", ""]),
    (rules.Words(LESS, 3), ["One two."], ["One two three."]),
    (rules.Sentences(AT_LEAST, 3), ["A dog. Two cats! Why? ", "it is. it was. it will be."],
     ["One. Two.", "Dr. Who and Mr. X met at 5. street, e.g. today."]),
    (rules.Sentences(LESS, 3), ["One. Two.", "1. First point. 2. The U.S. is large."], ["One. Two! Three?"]),
    (rules.CapitalWords(AT_LEAST, 2), ["I am HERE", "NASA and ESA"], ["Nasa and ESA", "none"]),
    (rules.CapitalWords(LESS, 2), ["Nasa and ESA", "none"], ["NASA and ESA"]),
    (rules.Keywords(["sun", "trees"]), ["Sunny Trees"], ["The sun.", "trees"]),
    (rules.Frequency("sun", AT_LEAST, 2), ["sun SUN", "Sunday sun"], ["sun", "son"]),
    (rules.Frequency("sun", LESS, 2), ["sun", "none"], ["sun and sun"]),
    (rules.Forbidden(["sun", "tree"]), ["sunny trees"], ["the sun", "A Tree!"]),
    (rules.Letters("e", AT_LEAST, 3), ["Eee", "bee and tree"], ["bee"]),
    (rules.Letters("!", LESS, 2), ["Oh!", "Oh"], ["Oh!!"]),
    (rules.NoDigits(), ["two"], ["2"]),
    (rules.Paragraphs(2), ["a\n***\nb", "a *** b", "***\na\n***\nb"],
     ["a", "a\n***\nb\n***\nc", "a\n***\n***\nb"]),
    (rules.Bullets(2), ["* a\n* b", "- a\ntext\n  - b"], ["* a", "* a\n* b\n* c", "**a**\n**b**"]),
    (rules.Numbered(2), ["1. a\n2. b", "1) a\n2) b"], ["1. a", "1. a\n3. b", "1. a\n2. b\n3. c"]),
    (rules.Sections("Part", 2), ["Part 1\na\nPart 2\nb"], ["Part 1\na", "Section 1\nSection 2"]),
    (rules.FirstWord(2, 2, "bees"), ["First.\n\nBees fly.", 'One.\n\n"bees," he said.'],
     ["Bees fly.", "One.\n\nThe bees.", "One.\n\nBees.\n\nThree.", "One.\n\nBeesting."]),
    (rules.TwoAnswers(), ["a\n******\nb", "a******b"], ["a", "a\n******\na", "a******b******c"]),
    (rules.Json(), ['{"a": 1}', '```json\n{"a": [1]}\n```', "[1]"], ["{a: 1}", 'Here: {"a": 1}']),
    (rules.Highlights(2), ["*a* and *b c*", "**a** *b*"], ["*a*", "**a**", "* a\n* b", "a"]),
    (rules.Placeholders(2), ["[name] of [place]"], ["[name]", "(name) [place]"]),
    (rules.Choice(["Yes.", "No."]), ["Yes. Because.", "No."], ["yes", "Maybe."]),
    (rules.Title(), ["<<Bees>>\nThey fly."], ["<<>>", "<Bees>", "# Bees"]),
    (rules.Start("Let me see."), ["let me see. Well", " Let me see. "], ["Well. Let me see."]),
    (rules.Postscript("P.S."), ["Bye.\nP.S. Hi", "p. s. hi"], ["PS hi", "Bye."]),
    (rules.Postscript("P.P.S"), ["Bye.\nP.P.S hi"], ["P.S. hi"]),
    (rules.End("DONE"), ["All is done", '"All DONE"'], ["DONE.", "DONE and more"]),
    (rules.Question(), ["Why?", "So. Why? "], ["Why? So."]),
    (rules.Parentheses(1), ["a (b)"], ["a ()", "a [b]"]),
    (rules.Upper(), ["BEES 2!"], ["BEEs", "2!"]),
    (rules.Lower(), ["bees 2!"], ["Bees", "2!"]),
    (rules.NoComma(), ["a; b"], ["a, b"]),
    (rules.Quoted(), ['"a"', ' "a, b" '], ['"a', '"', "'a'"]),
    (rules.Repeat("Say it."), ["Say it.\n\nIt.", "say it. It"], ["It.", "I Say it."]),
]


@pytest.mark.parametrize("rule, keep, broken", CASES, ids=[repr(rule) for rule, _, _ in CASES])
def test_a_check_accepts_what_keeps_the_rule_and_nothing_else(rule, keep, broken):
    assert [rule.check(answer) for answer in keep] == [True] * len(keep)
    assert [rule.check(answer) for answer in broken] == [False] * len(broken)


def test_every_kind_has_answers_that_keep_it_and_answers_that_break_it():
    assert {type(rule).__name__ for rule, _, _ in CASES} == rules.KINDS.keys() and len(rules.KINDS) > 25


@pytest.mark.parametrize("kind", rules.KINDS.values(), ids=rules.KINDS.keys())
def test_an_answer_is_changed_so_that_it_keeps_the_rule(kind):
    rng, changed = random.Random(0), 0
    assert len(set(kind.wordings)) >= 3
    for _ in range(60):
        rule = kind.draw(rng, REQUEST, PLAIN)
        assert all(str(value) in rule.text(rng) for name, value in vars(rule).items()
                   if not isinstance(value, list) and name != "request") and "{" not in rule.text(rng)
        assert rules.from_dict(json.loads(json.dumps(rules.as_dict(rule)))) == rule
        answer = rule.repair(PLAIN, OTHER, rng)
        assert rule.check(answer), (rule, answer)
        changed += answer != PLAIN
    assert changed or kind in (rules.Keywords, rules.Letters)       # whose words and letters the answer has


def test_rules_that_go_together_are_all_kept():
    rng, kinds, before = random.Random(1), dict.fromkeys(rules.KINDS, 0), 0
    for _ in range(300):
        record, answers = follow.with_rules(REQUEST, [PLAIN, OTHER + " " + PLAIN], OTHER, kinds, rng)
        assert record["prompt"].startswith(REQUEST) or record["prompt"].endswith(REQUEST)
        assert record["words"] == len(answers[0].split())
        before += record["prompt"].endswith(REQUEST)
        assert sum(rules.from_dict(rule).is_shape for rule in record["rules"]) <= 1
        assert before < 100 and not (record["prompt"].endswith(REQUEST) and "Repeat" in str(record["rules"]))
        assert 1 <= len(record["rules"]) <= 3
        assert all(rules.from_dict(rule).check(answer) for rule in record["rules"] for answer in answers)
    assert before > 30 and max(kinds.values()) <= min(kinds.values()) + 12          # the kinds take turns


def test_the_reward_is_the_share_of_rules_kept_less_what_is_missing_of_the_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "FOLDER", str(tmp_path))
    follow.known_prompts.cache_clear()
    some = [{"kind": "NoComma"}, {"kind": "Words", "relation": AT_LEAST, "number": 5}]
    record = {"prompt": "Say it.", "rules": some, "words": 10}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(record) + "\n")
    asked = [{"role": "user", "content": "Say it."}]
    assert follow.kept(asked, "One two three four five six.") == 1.0        # 6 of 10 words are enough
    assert follow.kept(asked, "One, two three four five six.") == 0.5
    assert follow.kept(asked, "One two three.") == pytest.approx(0.5 - 0.25)
    assert follow.kept(asked, "") == -0.5
    follow.known_prompts.cache_clear()


def test_without_a_second_answer_there_are_not_two():
    assert not rules.TwoAnswers().check(rules.TwoAnswers().repair(PLAIN, "", random.Random(0)))


def test_a_second_answer_does_not_begin_like_the_first():
    x, seen = follow.Answered(REQUEST, PLAIN, "", ""), 0
    for seed in range(20):
        first, rest = follow.divided(PLAIN, random.Random(seed))
        assert first and f"{first} {rest}".split() == PLAIN.split()
        kinds = {"TwoAnswers": 0, "NoComma": 0, "Title": 0}
        for row in follow.demonstrations_of([x], kinds, random.Random(seed)):
            if "******" in row["response"]:
                one, two = row["response"].split("\n\n******\n\n")
                seen += 1
                assert not one.startswith(two) and not two.startswith(one)
    assert seen > 5


def test_hard_kinds_are_drawn_more_often_however_few_records_there_are():
    for n in (40, 400):
        kinds, rng = follow.counts(n), random.Random(0)
        for _ in range(n):
            assert follow.with_rules(REQUEST, [PLAIN], OTHER, kinds, rng)
        assert min(kinds[name] for name in follow.KNOWN if name not in follow.HARD) > 0
        hard = [kinds[name] + n // 20 for name in follow.HARD]
        assert min(hard) > max(kinds[name] for name in follow.KNOWN if name not in follow.HARD) - 4


def test_an_answer_that_was_cut_off_ends_with_its_last_whole_sentence():
    assert follow.whole("One. Two is", False) == "One." and follow.whole("One. Two is", True) == "One. Two is"
    assert follow.whole("One", False) == follow.whole("", False) == ""


def test_held_out_instructions_and_kinds_are_in_no_training_file(tmp_path, monkeypatch):
    asked = [f"How do bees number {i} find their way?" for i in range(40)]
    records.write(tmp_path / "data.jsonl",
                  [{"prompt": x, "chosen": f"{PLAIN} {x}", "rejected": PLAIN} for x in asked])
    monkeypatch.setattr(follow, "answer_all", lambda cfg, requests: [
        follow.Answered(request, PLAIN, better, worse) for request, better, worse in requests])
    monkeypatch.setattr(follow, "FOLDER", str(tmp_path / "out"))
    cfg = follow.Config(data=str(tmp_path / "data.jsonl"), model="a model")
    follow.make(cfg)
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()]
            for path in (tmp_path / "out").glob("*.jsonl")}
    assert {name: len(some) for name, some in rows.items()} == {
        "demonstrations": 54 * 2 + 27 + 7, "demonstrations_heldout": 6 * 2 + 3 + 1, "prompts": 54 * 2,
        "preferences": 12, "prompts_heldout": 6, "prompts_new_kinds": 6}            # with 18 and 2 long texts
    topics = {topic for topic in follow.TOPICS
              if any(f" about {topic}" in row["prompt"] for row in rows["prompts"])}
    assert topics and not topics & set(follow.NEW_TOPICS)
    assert sum(f" about {topic}" in row["prompt"] for row in rows["prompts_heldout"]
               for topic in follow.NEW_TOPICS) == 2
    held_out = {x for x in asked if any(x in row["prompt"] for row in rows["prompts_heldout"])}
    assert len(held_out) == 4 and held_out == {
        x for x in asked if any(x in row["prompt"] for row in rows["prompts_new_kinds"])}
    for name in ("demonstrations", "prompts", "preferences"):
        assert not any(x in row["prompt"] for x in held_out for row in rows[name])
    kinds = {name: {rule["kind"] for row in rows[name] for rule in row["rules"]}
             for name in rows if "prompts" in name}
    assert kinds["prompts_new_kinds"] <= set(follow.NEW_KINDS) and len(kinds["prompts"]) > 15
    assert not (kinds["prompts"] | kinds["prompts_heldout"]) & set(follow.NEW_KINDS)
    texts = [text for name in follow.NEW_KINDS for text in rules.KINDS[name].wordings if "{" not in text]
    asked = [row["prompt"] for name in ("demonstrations", "preferences") for row in rows[name]]
    assert texts and not any(text in prompt for text in texts for prompt in asked)
    assert all(p.pairs for p in records.read("preferences", tmp_path / "out/preferences.jsonl"))
    before = (tmp_path / "out/prompts.jsonl").stat().st_mtime_ns
    follow.make(cfg)                                                                # is there already
    assert (tmp_path / "out/prompts.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was made with other settings"):
        follow.make(follow.Config(data=cfg.data, model="another"))
    records.write(tmp_path / "data.jsonl", [{"prompt": "x", "chosen": PLAIN, "rejected": "y"}] * 20)
    with pytest.raises(ValueError, match="no held-out instruction"):
        follow.make(follow.Config(data=cfg.data, model="a model", overwrite=True))
    assert (tmp_path / "out/about.json").exists()


# ------------------------------------------------------------------------------------------------- IFEval

@pytest.mark.parametrize("code, text", [
    ("en", "The bees are in the garden"), ("de", "Die Bienen sind nicht in der Stadt"),
    ("fr", "Les abeilles et le miel"), ("it", "Un sogno che naviga sul mare"),
    ("pt", "Não é uma casa, e os gatos"), ("fi", "Se on hyvä, ja hän tuli"),
    ("sw", "Nyumba ya mtu na watoto"),
    ("vi", "Đây là một ngôi nhà và không có"), ("ru", "Это не дом и на улице"),
    ("bg", "Това е дом и не се вижда"), ("hi", "यह घर में है और अच्छा है"),
    ("mr", "हे घर आहे आणि वेळ"),
    ("ar", "هذا في البيت من"),
    ("fa", "این خانه را به او"), ("ur", "یہ گھر میں ہے اور"), ("ko", "집에 있어요"),
    ("th", "บ้าน"), ("kn", "ಮನೆ"), ("ta", "வீடு"), ("", "Etchings"), ("", "42")])
def test_languages_are_told_apart(code, text):
    assert ifeval.language_of(text) == code


def test_the_loose_measure_forgives_a_line_before_and_after_and_asterisks():
    rule = rules.Quoted()
    for answer in ('Sure:\n"a"', '"a"\nBye', 'Sure:\n"a"\nBye', '*"a"*', 'Sure:\n**"a"**'):
        assert not ifeval.keeps(rule, [answer]) and ifeval.keeps(rule, ifeval.variants_of(answer)), answer
    assert not ifeval.keeps(rule, ifeval.variants_of('Sure: "a"'))
    assert not ifeval.keeps(rules.NoComma(), ifeval.variants_of(" \n"))     # an empty answer keeps no rule


def test_the_measures_are_shares_of_prompts_and_of_instructions(tmp_path, capsys):
    rows = [{"prompt": "a", "kwargs": [{}, {}],
             "instruction_id_list": ["punctuation:no_comma", "startend:quotation"]},
            {"prompt": "b", "instruction_id_list": ["detectable_format:title"], "kwargs": [{}]},
            {"prompt": "c", "rules": [{"kind": "Upper"}]}, {"prompt": "d", "rules": [{"kind": "Lower"}]}]
    answers = ["a b", "<<Title>>", "Sure:\nYES", "yes"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "said.jsonl").write_text("".join(json.dumps({"response": a}) + "\n" for a in answers))
    cfg = ifeval.Config(data=str(tmp_path / "data.jsonl"), responses=str(tmp_path / "said.jsonl"),
                        out=str(tmp_path))
    found = ifeval.measure(cfg)["said.jsonl"]
    assert found == [([True, False], [True, False]), ([True], [True]), ([False], [True]), ([True], [True])]
    report = json.loads((tmp_path / "ifeval.json").read_text())["said.jsonl"]
    assert list(report["shares"].values()) == pytest.approx([2 / 4, 3 / 5, 3 / 4, 4 / 5])
    assert report["answers"] == answers
    printed = capsys.readouterr().out
    cfg = ifeval.Config(models=(str(tmp_path / "ifeval.json"),), data=cfg.data, out=str(tmp_path / "again"))
    assert ifeval.measure(cfg) == {f"{tmp_path}: said.jsonl": found}
    with pytest.raises(ValueError, match="ifeval.json: not an evaluation of lab.ifeval: 4 answers to 2"):
        ifeval.measure(ifeval.Config(models=cfg.models, data=cfg.data, every=2, out=cfg.out))
    with pytest.raises(ValueError, match="not both"):
        ifeval.Config(models=("out/sft", "a.json"))
    cfg = ifeval.Config(data=cfg.data, responses=str(tmp_path / "said.jsonl"), out=str(tmp_path))
    for wrong, said in (("nope", "line 2: not as expected"),
                        ('{"prompt": "e"}', "line 2: .*instruction_id_list"),
                        (json.dumps(rows[2]), "4 answers to 2 prompts")):
        (tmp_path / "data.jsonl").write_text(json.dumps(rows[0]) + "\n" + wrong + "\n")
        with pytest.raises(ValueError, match=said):
            ifeval.measure(cfg)
    assert "| Upper | 1 | 0% |" in printed and "50.0% (" in printed
    assert "PROMPT 3: c\nRULES: Upper\n--- said.jsonl keeps 0 of 1:\nSure:\nYES" in printed


def test_the_length_is_that_of_answers_to_prompts_without_a_rule_about_length():
    names = [["Upper"], ["Title", "Words"], ["length_constraints:number_words"], ["startend:quotation"]]
    records = [("", some, []) for some in names]
    assert ifeval.mean_words(records, ["one two", "one", "one", "one two three four"]) == 3


def test_differences_are_from_the_first_model_and_from_the_one_before():
    records = [("", ["Upper"], [rules.Upper()])] * 4
    answers = {"a": ["a"] * 4, "b": ["A", "a", "a", "a"], "c": ["A"] * 3 + ["a"]}
    found = {name: ifeval.verdicts(records, texts) for name, texts in answers.items()}
    [*_, (title, rows)] = ifeval.tables(records, found, answers)
    assert "Differences" in title
    assert [(row[0], row[1].split()[0]) for row in rows[1:]] == [
        ("b − a", "25.0%"), ("c − a", "75.0%"), ("c − b", "50.0%")]


def test_the_answers_that_are_shown_are_evenly_spaced():
    records = [(f"<{i}>", ["Upper"], [rules.Upper()]) for i in range(23)]
    answers = {"a": ["A"] * 23, "b": ["b"] * 23}
    found = {name: ifeval.verdicts(records, texts) for name, texts in answers.items()}
    lines = ifeval.side_by_side(records, found, answers, 5)
    assert [line[1:] for line in lines if "PROMPT" in line] == [
        f"PROMPT {i + 1}: <{i}>" for i in (0, 4, 8, 12, 16)]
    assert lines[2:6] == ["--- a keeps 1 of 1:", "A", "--- b keeps 0 of 1:", "b"]
    assert ifeval.side_by_side(records, found, answers, 0) == []


@pytest.mark.parametrize("vendor, flags, precision", [
    ("GenuineIntel", "avx512_bf16", "auto"), ("GenuineIntel", "avx512_bf16 amx_bf16", "bfloat16"),
    ("AuthenticAMD", "avx512_bf16", "bfloat16"), ("AuthenticAMD", "avx2", "auto"), ("", "", "auto")])
def test_make_follow_computes_in_bfloat16_where_that_is_fast(tmp_path, vendor, flags, precision):
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {vendor}\nflags : fpu {flags} sse\n" if vendor else "")
    done = subprocess.run(["make", "-n", "follow", f"CPUINFO={tmp_path}/cpuinfo", "MODEL=m", "DATA=d",
                           "IFEVAL=Makefile"], cwd=ROOT, capture_output=True, text=True)
    assert set(re.findall(r"--precision (\w+)", done.stdout)) == {precision}, done.stderr
