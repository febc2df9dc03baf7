"""Ranking answers on a page: the file of choices through whatever happens, and a sitting in a browser."""
import json
import os
import re
import shutil
import signal
import stat
import sys
import time

import pytest
from helpers.start import ROOT, Started

from data import loading, records
from feedback import choices

try:
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
except ImportError:
    webdriver = None
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def user(text):
    return [{"role": "user", "content": text}]


def tasks(n=6):
    """n items of three answers; a has place 0 in the record, b 1, c 2."""
    return [{"prompt": user(f"Question {i}?"), "responses": [f"a{i}", f"b{i}", f"c{i}"]} for i in range(n)]


@pytest.fixture
def start(tmp_path):
    """A function that begins a run, as after any earlier one: Choices. They write to tmp_path/ann.jsonl."""
    def begin(name="ann", items=None):
        records.write(tmp_path / "tasks.jsonl", items or tasks())
        read = records.read("tasks", tmp_path / "tasks.jsonl")
        return choices.Choices(name, str(tmp_path / "ann.jsonl"), read)
    return begin


def lines(tmp_path):
    path = tmp_path / "ann.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")] if path.exists() else []


def rank(labels, state, best_to_worst="cab"):
    """What a page sends that ranks an item's answers by their first letters."""
    ranks = [1 + best_to_worst.index(answer[0]) for answer in state["answers"]]
    return labels.talk({"item": state["item"], "ranks": ranks})


def finish(labels, **how):
    state = labels.talk({})
    while state["item"]:
        state = rank(labels, state, **how)
    return state


def test_choices_are_a_preference_file_that_every_stage_reads(start, tmp_path, capsys):
    labels = start(items=tasks(20))
    state = labels.talk({})
    state = labels.talk({"item": state["item"], "cannot_judge": True})
    k = [a[0] for a in state["answers"]]
    labels.talk({"item": state["item"], "ranks": [1 if a == "b" else 2 for a in k]})        # a and c tie
    state = finish(labels)
    assert state["item"] is None and state["done"] == state["total"] == 20 and "20 are ranked" in state["end"]
    read = records.read("preferences", tmp_path / "ann.jsonl")
    assert [p.ranks for p in read] == [[1, 1, 1], [2, 1, 2]] + [[2, 3, 1]] * 18
    assert [(p.prompt, p.responses) for p in read] == [(t["prompt"], t["responses"]) for t in tasks(20)]
    assert [record["cannot_judge"] for record in lines(tmp_path)] == [True] + [False] * 19
    train, held_out = loading.load("preferences", str(tmp_path / "ann.jsonl"))
    assert len(train) + len(held_out) == 19 and "1 of 18 comparisons are ties" in capsys.readouterr().out
    for record in lines(tmp_path):
        assert record["by"] == "ann" and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["at"])
        assert sorted(record["order"]) == [0, 1, 2]


def test_answers_stand_in_an_order_of_each_persons_own_that_stays(start, tmp_path):
    labels, seen = start(), []
    state = labels.talk({})
    while state["item"]:
        assert labels.talk({}) == state                         # the page is loaded again
        seen.append(state["answers"])
        state = rank(labels, state)
    assert [[r["responses"][i] for i in r["order"]] for r in lines(tmp_path)] == seen
    assert len({tuple(r["order"]) for r in lines(tmp_path)}) > 1
    ann, bob = start("ann"), start("bob")
    assert [ann.order(k) for k in ann.items] == [r["order"] for r in lines(tmp_path)]
    assert [ann.order(k) for k in ann.items] != [bob.order(k) for k in bob.items]


def test_every_place_on_the_page_comes_up_as_often(start):
    labels = start(items=tasks(600))
    first = [labels.order(k)[0] for k in labels.items]
    assert all(abs(first.count(i) - 200) < 50 for i in range(3))        # 4 standard errors


def test_a_double_click_and_a_second_tab_write_nothing_twice(start, tmp_path):
    labels = start()
    one = two = labels.talk({})
    after = rank(labels, one, "cab")
    assert rank(labels, one, "cab") == after and after["done"] == 1
    assert rank(labels, two, "abc") == after                            # the other tab is too late
    assert [r["ranks"] for r in lines(tmp_path)] == [[2, 3, 1]]
    assert labels.talk({"item": one["item"], "cannot_judge": True}) == after
    finish(labels)
    assert len(lines(tmp_path)) == 6


def test_undo_takes_back_the_last_of_this_run_once(start, tmp_path):
    labels = start()
    first = labels.talk({})
    second = rank(labels, first)
    third = rank(labels, second)
    assert third["last"] == second["item"]
    assert labels.talk({"item": first["item"], "undo": True}) == third          # not the last one
    back = labels.talk({"item": second["item"], "undo": True})
    assert back == second and len(lines(tmp_path)) == 1
    assert labels.talk({"item": second["item"], "undo": True}) == second        # clicked twice
    rank(labels, back, "abc")
    assert [r["ranks"] for r in lines(tmp_path)] == [[2, 3, 1], [1, 2, 3]]
    again = start()
    state = again.talk({})
    assert state["last"] is None and state == {**third, "last": None}
    assert again.talk({"item": second["item"], "undo": True}) == state and len(lines(tmp_path)) == 2
    end = finish(again)
    back = again.talk({"item": end["last"], "undo": True})                      # from the end, too
    assert back["item"] == end["last"] and back["done"] == 5


def test_a_run_keeps_every_choice_that_the_file_holds_with_whatever_stands_beside_it(start, tmp_path):
    """Even of items that are no tasks any more. A line that is there twice counts once."""
    finish(start(items=tasks(2)))
    found = lines(tmp_path)
    other = {"prompt": "Another?", "responses": ["x\u2028", "y"], "ranks": [1, 2], "note": "é"}
    texts = [json.dumps(r, ensure_ascii=False) for r in (found[0], other, found[0])]
    (tmp_path / "ann.jsonl").write_text(texts[0] + "\n\n" + texts[1] + "\n" + texts[2], "utf-8")
    labels = start(items=tasks(2))
    assert labels.talk({})["done"] == 1
    finish(labels, best_to_worst="abc")
    again = lines(tmp_path)
    assert again[:2] == [found[0], other] and again[2]["prompt"] == found[1]["prompt"] and len(again) == 3


def test_a_choice_that_was_undone_leaves_a_file_that_the_next_run_reads(start, tmp_path):
    labels = start()
    state = rank(labels, labels.talk({}))
    labels.talk({"item": state["last"], "undo": True})
    assert lines(tmp_path) == []
    assert rank(start(), start().talk({}))["done"] == 1


def is_folder(descriptor):
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


class PowerCut(BaseException):
    """Nothing more is done after it: no handler, no second try."""


STEPS = ["open", "write", "fsync", "replace", "fsync of the folder"]


@pytest.fixture
def fail(monkeypatch):
    """A function that lets the saving of a choice end with this error before, or in the midst of, a step."""
    def at(step, error):
        real = open

        def stop(*args, **how):
            raise error

        class Half:
            def __init__(self, *args, **how):
                self.file = real(*args, **how)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def writelines(self, texts):
                self.file.write("".join(texts)[:-20])
                raise error

        def fsync(file):
            if is_folder(file) == (step == "fsync of the folder"):
                raise error
        places = {"open": (choices, "open", stop), "write": (choices, "open", Half),
                  "replace": (choices.os, "replace", stop)}
        monkeypatch.setattr(*places.get(step, (choices.os, "fsync", fsync)), raising=False)
    return at


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("undo", [False, True])
def test_a_power_cut_at_any_moment_loses_at_most_the_change_that_is_not_shown_as_saved(
        start, tmp_path, fail, monkeypatch, step, undo):
    labels = start()
    state = rank(labels, labels.talk({}))
    before, last = (tmp_path / "ann.jsonl").read_bytes(), state["last"]
    fail(step, PowerCut())
    with pytest.raises(PowerCut):
        if undo:
            labels.talk({"item": last, "undo": True})
        else:
            rank(labels, state)
    monkeypatch.undo()
    content, done = (tmp_path / "ann.jsonl").read_bytes(), 2 - 2 * undo
    if step == "fsync of the folder":                           # the new file may be there, but it is whole
        assert len(lines(tmp_path)) == done
    else:
        assert content == before
    again = start()
    finish(again)
    assert len(lines(tmp_path)) == 6 and len({r["prompt"][0]["content"] for r in lines(tmp_path)}) == 6


@pytest.mark.parametrize("step", STEPS)
def test_a_choice_that_is_not_on_the_disk_is_not_made(start, tmp_path, monkeypatch, fail, step):
    labels = start()
    first = labels.talk({})
    state = rank(labels, first)
    fail(step, OSError(28, "No space left"))
    with pytest.raises(OSError):
        rank(labels, state)
    with pytest.raises(OSError):
        labels.talk({"item": first["item"], "undo": True})
    monkeypatch.undo()
    assert labels.talk({}) == state
    assert rank(labels, state)["done"] == 2 and len(lines(tmp_path)) == 2


def test_a_saved_choice_is_on_the_disk_under_its_name(start, tmp_path, monkeypatch):
    """The file before it gets its name, and its folder after that."""
    labels, done = start(), []
    monkeypatch.setattr(choices.os, "fsync", lambda f: done.append("folder" if is_folder(f) else "file"))
    replace_ = os.replace
    monkeypatch.setattr(choices.os, "replace", lambda a, b: done.append("replace") or replace_(a, b))
    rank(labels, labels.talk({}))
    assert done == ["file", "replace", "folder"]


def test_files_that_are_something_else_are_refused_and_stay(start, tmp_path):
    for content in (b'{"a": 1}\n', b"a picture", b'[{"prompt": "a"}]'):
        (tmp_path / "ann.jsonl").write_bytes(content)
        with pytest.raises(ValueError):
            start()
        assert (tmp_path / "ann.jsonl").read_bytes() == content


@pytest.mark.parametrize("change", [
    None, [], "item", 3, {"item": 3}, {"item": []}, {"item": "unknown"}, {"ranks": [1]},
    {"undo": True, "item": {}}])
def test_what_names_no_item_changes_nothing(start, tmp_path, change):
    labels = start()
    before = labels.talk({})
    if change == {"ranks": [1]}:                                # asks for the state
        assert labels.talk(change) == before
    else:
        with pytest.raises(ValueError, match="no such item"):
            labels.talk(change)
    assert labels.talk({}) == before and lines(tmp_path) == []


@pytest.mark.parametrize("ranks", [
    None, [], [1, 2], [1, 2, 3, 3], [1, 2, 4], [0, 1, 2], [1, 2, "3"], [1, 2, True], [1, 2, 2.0],
    [1, 2, None], [[1], 2, 3], {"0": 1}, "123", 123])
def test_ranks_that_are_none_are_refused(start, tmp_path, ranks):
    labels = start()
    state = labels.talk({})
    with pytest.raises(ValueError, match="rank for each"):
        labels.talk({"item": state["item"], "ranks": ranks})
    assert labels.talk({}) == state and lines(tmp_path) == []


# ------------------------------------------------------------------------------------- the program

class Program:
    """python -m feedback.label at work in a folder: its address, and what it says after that."""

    def __init__(self, folder, flags=""):
        command = [sys.executable, "-u", "-m", "feedback.label", "--port", "0", "--name", "ann",
                   *flags.split()]
        self.process = Started(command, {**os.environ, "PYTHONPATH": ROOT}, folder)
        self.said, self.address = "", ""
        while not self.address and (line := self.process.stdout.readline()):
            self.said += line
            self.address = line.strip() if "http://" in line else ""

    def end(self, how):
        """(status, output) after a signal, or on its own accord."""
        if how:
            self.process.send_signal(how)
        out, err = self.process.communicate()
        return self.process.returncode, out + err


@pytest.fixture
def program():
    running = []

    def begin(folder, flags=""):
        running.append(Program(folder, flags))
        return running[-1]
    yield begin
    for p in running:
        p.process.kill()
        p.process.communicate()


def ask(program, change):
    from urllib.request import Request, urlopen
    with urlopen(Request(program.address, json.dumps(change).encode()), timeout=20) as reply:
        return json.loads(reply.read())


def chosen(folder):
    return [json.loads(line) for line in (folder / "out/feedback/ann.jsonl").open(encoding="utf-8")]


def test_a_killed_program_goes_on_where_it_stopped(tmp_path, program):
    os.makedirs(tmp_path / "out/feedback")
    records.write(tmp_path / "out/feedback/tasks.jsonl", tasks())
    content = (tmp_path / "out/feedback/tasks.jsonl").read_bytes()
    running = program(tmp_path)
    assert "Ctrl-C" in running.process.stdout.readline() + running.process.stdout.readline()
    state = ask(running, {})
    for _ in range(3):
        state = ask(running, {"item": state["item"], "ranks": [1, 2, 3]})
    assert running.end(signal.SIGKILL)[0] == -signal.SIGKILL and len(chosen(tmp_path)) == 3
    running = program(tmp_path)
    again = ask(running, {})
    assert again == {**state, "last": None}
    second = program(tmp_path)
    code, said = second.end(None)
    assert code == 1 and "another run is at work" in said and said.count("\n") == 1
    other = program(tmp_path, "--out out/feedback/bob.jsonl")                # the same items, another file
    assert ask(other, {})["done"] == 0
    code, said = other.end(signal.SIGINT)
    assert code == 130 and "0 of 6 are ranked, in out/feedback/bob.jsonl" in said and "Traceback" not in said
    while again["item"]:
        again = ask(running, {"item": again["item"], "ranks": [1, 2, 3]})
    code, said = running.end(signal.SIGINT)
    assert code == 0 and "6 are ranked, in out/feedback/ann.jsonl" in said and "Traceback" not in said
    assert len({json.dumps(r["prompt"]) for r in chosen(tmp_path)}) == len(chosen(tmp_path)) == 6
    assert (tmp_path / "out/feedback/tasks.jsonl").read_bytes() == content
    running = program(tmp_path)                                          # nothing is left: it ends by itself
    assert running.end(None)[0] == 0 and "6 of 6 are ranked" in running.said and not running.address


def test_a_missing_file_of_answers_is_one_line(tmp_path, program):
    os.makedirs(tmp_path / "out/feedback")
    code, text = program(tmp_path).end(None)
    assert code == 1 and text.count("\n") == 1
    assert "run `python -m feedback.collect --by person` first" in text


# --------------------------------------------------------------------------------------- a browser

HOSTILE = ["<script>document.title = 'run'</script>", "<img src=x onerror=\"document.title = 'run'\">",
           "</div></script><h1>Big</h1>", "\u202eright to left\u202c שלום עולם", "x" * 10000,
           "long words " * 1000, "&lt;b&gt; ${1} \0\x07 \u2028 {{7*7}}",
           "<style>body{display:none}</style>", "javascript:alert(1)"]


@pytest.fixture
def browser():
    if not (webdriver and CHROMIUM and DRIVER):
        pytest.skip("needs selenium, chromium and chromedriver")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Screen:
    """The page as a person has it before them."""

    def __init__(self, driver, address, width=1200, height=900, touch=False):
        self.driver = driver
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch})
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
        driver.get(address)
        self.wait(lambda: self.count() != "")

    def wait(self, condition):
        for _ in range(100):
            if condition():
                return
            time.sleep(0.05)
        raise AssertionError(f"waited in vain, at {self.count()}: {self.text('#message')}")

    def text(self, selector):
        return self.driver.execute_script("return document.querySelector(arguments[0]).textContent", selector)

    def count(self):
        return self.text("#count")

    def cards(self):
        """(text, place) of the answers from the top, as they are seen."""
        return [tuple(x) for x in self.driver.execute_script(
            "return [...document.querySelectorAll('.card')].sort((a, b) => a.style.order - b.style.order)"
            ".map(c => [c.children[1].textContent, c.lastChild.textContent])")]

    def element(self, answer, part=""):
        return self.driver.execute_script(
            "const c = [...document.querySelectorAll('.card')].find(c => c.children[1].textContent === "
            "arguments[0]); return arguments[1] ? c.querySelector(arguments[1]) : c", answer, part)

    def press(self, *keys):
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def drag(self, answer, above):
        """An answer, by the mouse, to just above the middle of another."""
        there, part = self.element(above), self.element(answer, ".text")
        ActionChains(self.driver, 50).move_to_element(part).click_and_hold().move_to_element_with_offset(
            there, 0, -8).move_by_offset(0, -2).release().perform()

    def saved(self, press, done):
        press()
        self.wait(lambda: self.count().startswith(f"{done} of"))


def test_a_sitting_by_keys_and_mouse_outlives_a_kill(tmp_path, program, browser):
    os.makedirs(tmp_path / "out/feedback")
    records.write(tmp_path / "out/feedback/tasks.jsonl", tasks(8))
    running = program(tmp_path)
    screen = Screen(browser, running.address)
    done, expected = 0, []

    def save(places):
        """Press Enter, and remember what the file must say: {first letter: place}."""
        nonlocal done
        answers, done = [text for text, _ in screen.cards()], done + 1
        screen.saved(lambda: screen.press(Keys.ENTER), done)
        expected.append({text: places[text[0]] for text in answers})

    def letters():
        return {text[0]: text for text, _ in screen.cards()}

    numbered = [text[0] for text, _ in screen.cards()]                  # by keys, in the order 3, 1 = 2
    screen.press("3", "1", "1", "=", "2")
    assert [(text[0], place) for text, place in screen.cards()] == [
        (numbered[2], "1"), (numbered[0], "2"), (numbered[1], "2")]
    save({numbered[2]: 1, numbered[0]: 2, numbered[1]: 2})
    numbered = [text[0] for text, _ in screen.cards()]
    screen.press("2", "1", Keys.ENTER)                                  # one has no place: this saves nothing
    screen.press(Keys.BACKSPACE, "3", "=", "=", "1")                    # another thought
    save({numbered[1]: 1, numbered[2]: 2, numbered[0]: 3})
    numbered = [text for text, _ in screen.cards()]                     # by dragging: the last to the top
    screen.drag(numbered[2], numbered[0])
    assert screen.cards() == [(numbered[2], "1"), (numbered[0], "2"), (numbered[1], "3")]
    screen.element(numbered[1], ".place").click()                       # which ties the last two
    assert screen.cards() == [(numbered[2], "1"), (numbered[0], "2"), (numbered[1], "2")]
    screen.drag(numbered[1], numbered[2])                               # and parts them again
    assert screen.cards() == [(numbered[1], "1"), (numbered[2], "2"), (numbered[0], "3")]
    save({numbered[1][0]: 1, numbered[2][0]: 2, numbered[0][0]: 3})
    for letter in "bca":                                                # by clicks, all but the last by mouse
        screen.element(letters()[letter], ".text").click()
    save({"b": 1, "c": 2, "a": 3})
    before = screen.cards()
    browser.execute_script("dispatchEvent(new KeyboardEvent('keydown', {key: '0', repeat: true}))")
    assert screen.cards() == before                                     # a key that is held counts once,
    expected.append(dict.fromkeys([text for text, _ in before], 1))
    done += 1
    screen.saved(lambda: browser.execute_script(                        # and so does a second one at once
        "for (let i = 0; i < 3; i++) dispatchEvent(new KeyboardEvent('keydown', {key: '0'}))"), done)

    screen.press("1", "2", "3")
    running.end(signal.SIGKILL)
    screen.press(Keys.ENTER)                                            # nobody is there to save it
    screen.wait(lambda: "Not saved" in screen.text("#message"))
    assert screen.count().startswith(f"{done} of 8") and len(chosen(tmp_path)) == done
    running = program(tmp_path)
    screen = Screen(browser, running.address)
    assert screen.count() == f"{done} of 8"
    screen.press("u")                                                   # what an earlier run saved stays
    first = screen.cards()
    screen.press("3", "2", "1")
    screen.saved(lambda: screen.press(Keys.ENTER), done + 1)
    screen.saved(lambda: screen.press("u"), done)                       # undone, and shown as it was ranked
    assert screen.cards() == [(text, str(i)) for i, (text, _) in enumerate(reversed(first), 1)]
    screen.press(Keys.BACKSPACE, Keys.BACKSPACE, "=", "1", "2")
    save({first[2][0][0]: 1, first[0][0][0]: 1, first[1][0][0]: 2})
    assert len(chosen(tmp_path)) == done
    while done < 8:
        expected.append(dict.fromkeys([text for text, _ in screen.cards()], 1))
        done += 1
        screen.saved(lambda: screen.press("1", "=", "0"), done)         # what was begun does not count
    screen.wait(lambda: "All 8 are ranked" in screen.text("#prompt"))
    assert screen.cards() == []
    code, said = running.end(signal.SIGINT)
    assert code == 0 and "8 are ranked" in said
    assert [dict(zip(r["responses"], r["ranks"])) for r in chosen(tmp_path)] == expected
    assert len({json.dumps(r["prompt"]) for r in chosen(tmp_path)}) == 8
    assert sum(r.get("cannot_judge", False) for r in chosen(tmp_path)) == 3
    assert [e for e in browser.get_log("browser") if "ERR_CONNECTION" not in e["message"]] == []


@pytest.mark.parametrize("width, height, touch", [(1200, 900, False), (360, 740, True)])
def test_hostile_answers_are_text_that_fits_the_page(tmp_path, program, browser, width, height, touch):
    os.makedirs(tmp_path / "out/feedback")
    items = [{"prompt": user(HOSTILE[0] + HOSTILE[4]), "responses": HOSTILE}, *tasks(1)]
    records.write(tmp_path / "out/feedback/tasks.jsonl", items)
    running = program(tmp_path)
    screen = Screen(browser, running.address, width, height, touch)
    assert sorted(text for text, _ in screen.cards()) == sorted(HOSTILE)
    assert browser.title == "Rank answers" and screen.text("#prompt .text") == HOSTILE[0] + HOSTILE[4]
    tags = browser.execute_script("return [...document.querySelectorAll('main *')].map(e => e.tagName)")
    assert set(tags) == {"SECTION", "ASIDE", "DIV", "BUTTON", "DETAILS", "SUMMARY"}
    assert browser.execute_script("return Math.max(...[...document.querySelectorAll('*')]"
                                  ".map(e => e.getBoundingClientRect().right))") <= width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.find_element("id", "save").is_displayed()
    before = screen.cards()
    if not touch:                                               # the bar beside a long answer only scrolls it
        bar = screen.element("x" * 10000, ".text")
        ActionChains(browser).move_to_element_with_offset(bar, bar.rect["width"] // 2 - 4, -20) \
            .click_and_hold().move_by_offset(0, 60).release().perform()
        assert browser.execute_script("return arguments[0].scrollTop", bar) > 0
    assert screen.cards() == before
    screen.press(*"987654321")
    screen.saved(lambda: screen.press(Keys.ENTER), 1)
    assert sorted(chosen(tmp_path)[0]["ranks"]) == list(range(1, 10))
    assert chosen(tmp_path)[0]["responses"] == HOSTILE and browser.title == "Rank answers"


def test_fingers_rank_by_taps_and_by_the_grip(tmp_path, program, browser):
    os.makedirs(tmp_path / "out/feedback")
    records.write(tmp_path / "out/feedback/tasks.jsonl", tasks(2))
    screen = Screen(browser, program(tmp_path).address, 360, 740, touch=True)

    def touch(*points):
        for kind, at in zip(["touchStart"] + ["touchMove"] * (len(points) - 1), points):
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [at]})
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def middle(answer, part, down=0):
        box = browser.execute_script("return arguments[0].getBoundingClientRect()",
                                     screen.element(answer, part))
        return {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2 + down}

    texts = [text for text, _ in screen.cards()]
    touch(middle(texts[1], ".text"))
    assert screen.cards()[0] == (texts[1], "1")
    touch(middle(texts[2], ".text"), middle(texts[1], ".text", -20))            # not the grip: this scrolls
    assert [place for _, place in screen.cards()] == ["1", "–", "–"]
    start, end = middle(texts[2], ".grip"), middle(texts[1], ".grip", -10)
    touch(start, {**start, "y": start["y"] - 20}, end)
    assert screen.cards() == [(texts[2], "1"), (texts[1], "2"), (texts[0], "3")]
    ActionChains(browser).click(browser.find_element("id", "save")).perform()
    screen.wait(lambda: screen.count() == "1 of 2")
    assert dict(zip(chosen(tmp_path)[0]["responses"], chosen(tmp_path)[0]["ranks"])) == {
        texts[2]: 1, texts[1]: 2, texts[0]: 3}
