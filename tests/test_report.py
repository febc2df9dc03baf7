"""The report's tables, and its page: what is shown, and that hostile text stays text."""
import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from data import report

HOSTILE = "</script><script>document.title = 'broken'</script><img src=x onerror=alert(1)> \" ' & $facts ${"
SFT = {"judge": 0.42, "reward": None, "win_rate": 0.5, "win_rate_interval": [0.5, 0.5], "kl": 0.0,
       "length": 12.44, "ended": 0.996, "distinct2": 0.21, "sft_loss": 0.4}
WORLD = {"helpful": 0.7, "honest": 0.9, "harmless": 0.85, "manner": 0.4,
         "families": {"sum": 0.3, "list": 0.5}}


def rollout(step, tokens=("It", "'s", " Rome"), **more):
    n = len(tokens)
    return {"step": step, "prompt": [{"role": "user", "content": "What is the capital of Italy?"}],
            "score": 0.3, "tokens": list(tokens), "old_logprobs": [-0.5] * n, "ref_logprobs": [-0.75] * n,
            "rewards": [0.025] * n, "advantages": [(-1.0) ** i * (i + 1) for i in range(n)],
            "old_values": [0.125] * n, "returns": [1.5] * n} | more


def written(folder, first, last=()):
    """A folder with these answers of a first and a last rollout."""
    for which, answers in (("first", first), ("last", last)):
        (folder / f"rollout_{which}.json").write_text(json.dumps(answers))
    return str(folder)


# --------------------------------------------------------------------------------------------------- tables

def test_a_number_comes_with_its_interval():
    assert report.cell({"a": 0.314, "a_interval": [0.237, 0.402]}, "a", ".0%") == "31% (24% to 40%)"
    assert report.cell({"a": 3}, "a", ".1f") == "3.0"
    assert report.cell({"a": None}, "a", ".1f") == report.cell({}, "a", ".1f") == "–"


def test_the_tables_show_what_was_measured_of_each_model_and_no_more():
    shown = dict(report.tables({"sft": SFT | WORLD, "best_of_n": SFT | {"manner": 0.9}}))
    assert shown["Side by side"][1] == ["sft", "0.42", "50.0% (50.0% to 50.0%)", "–", "0.0", "12.4", "100%",
                                        "0.21", "0.40"]
    assert shown["What the judge sees"][1:] == [["sft", "0.70", "0.90", "0.85", "0.40"],
                                                ["best_of_n", "–", "–", "–", "0.90"]]
    assert shown["The judge's score by kind of question"] == [["", "sft"], ["sum", "0.30"], ["list", "0.50"]]
    assert [title for title, _ in report.tables({"sft": SFT})] == ["Side by side"]


def test_lessons_say_who_answers_best_and_who_exploits_the_reward_model():
    models = {"sft": (0.42, -0.03, 0.0), "best_of_n": (0.95, 1.0, 1.8), "ppo": (0.87, 1.25, 3.4),
              "free": (0.28, 1.81, 90.66)}
    models = {name: dict(zip(("judge", "reward", "kl"), numbers)) for name, numbers in models.items()}
    best, hacked, kl = report.lessons(models)
    assert best == "The judge's score is 0.42 for sft; among the others ppo has the highest, 0.87."
    assert "free earns the highest reward, 1.81, but the judge gives it 0.28" in hacked
    assert "KL from sft is 90.7 nats, that of ppo is 3.4" in kl
    models["free"]["kl"] = 1.0                              # then distance does not explain it
    assert report.lessons(models) == [best, hacked]
    models["free"]["judge"] = 0.86                          # hardly worse: nothing is hacked
    assert report.lessons(models) == [best]
    assert report.lessons({"sft": SFT, "ppo": SFT}) == []                   # without a reward model


def test_a_terminal_shows_aligned_columns():
    rows = [["model", "judge"], ["a_long_name", "0.42"]]
    assert report.in_terminal([("title", rows)], []) == ["model        judge", "a_long_name   0.42", ""]


def test_facts_name_the_judge_the_reward_model_and_the_seconds():
    measured = {"prompts": 4, "answers_each": 2, "judge": "world", "seconds": {"sft": 60.4, "total": 99.5},
                "reward_model": {"accuracy": 0.745, "pairs": 3000, "ceiling": 0.775}}
    assert report.facts(measured) == [
        "4 held-out prompts, 2 answers each, judged by world.",
        "Reward model: 74.5% of 3000 held-out pairs; the best any scorer could reach is 77.5%.",
        "Seconds: sft 60, total 100."]
    del measured["reward_model"]["ceiling"]
    assert report.facts(measured)[1] == "Reward model: 74.5% of 3000 held-out pairs."


def test_tables_in_markdown_have_as_many_cells_in_each_line():
    lines = report.markdown([("One", [["a", "b"], ["1", "|2|"]]), ("Two", [["c"], ["3"]])])
    assert lines == ["**One**", "", "| a | b |", "| --- | --- |", r"| 1 | \|2\| |", "", "**Two**", "",
                     "| c |", "| --- |", "| 3 |"]


@pytest.mark.parametrize("text, shown", [
    ("plain text, as it is: 2 + 2 = 4 (or so).", "plain text, as it is: 2 + 2 = 4 (or so)."),
    ("a *b* **c** `d` ~~e~~", r"a \*b\* \*\*c\*\* \`d\` \~\~e\~\~"),
    ("<b>&amp;</b> | $x$", r"\<b\>\&amp;\</b\> \| \$x\$"),
    ("[link](url) # no head", r"\[link\](url) \# no head"),
    ("_emphasis_ in ppo_no_kl", r"\_emphasis\_ in ppo_no_kl"), ("a \\* b", r"a \\\* b"),
    (" one\n\n# two\r\n- three\t", r"one \# two - three")])
def test_markup_in_a_text_is_shown_and_not_interpreted(text, shown):
    assert report.literal(text) == shown


def test_hostile_text_stays_within_its_line_of_markdown():
    hostile = "a | b\n\n# head\n<script>alert(1)</script> *x*"
    [_, question, _, answer] = report.side_by_side([(hostile, [(hostile, "judge 0.50", hostile)])])
    literal = report.literal(hostile)
    assert question == f"**{literal}**" and answer == f"- {literal} (judge 0.50): {literal}"
    assert "\n" not in literal and not re.search(r"(?<!\\)[|#<>*]", literal)
    [_, answer, _] = report.in_terminal([], [("?", [("sft", "judge 0.50", hostile)])])
    assert answer.endswith(":  a | b # head <script>alert(1)</script> *x*")     # one line, and no markup


def test_examples_are_spread_over_the_prompts_each_with_its_own_scores():
    prompts = [[{"role": "user", "content": f"Q{i}"}] for i in range(6)]
    prompts[3] = [{"role": "user", "content": "Q3"}, {"role": "assistant", "content": "A"},
                  {"role": "user", "content": "and?"}]
    numbers = [i / 10 for i in range(12)]
    one = SimpleNamespace(name="one", texts=[f"t{i}" for i in range(12)], judge=numbers,
                          reward=[1 - x for x in numbers])
    two = SimpleNamespace(name="two", texts=["u"] * 12, judge=numbers, reward=[])
    found = report.examples([one, two], prompts, 2, 2)
    assert found == [("Q0", [("one", "judge 0.00, reward 1.00", "t0"), ("two", "judge 0.00", "u")]),
                     ("Q3 / and?", [("one", "judge 0.60, reward 0.40", "t6"), ("two", "judge 0.60", "u")])]
    assert report.side_by_side(found)[4:8] == ["- two (judge 0.00): u", "", "**Q3 / and?**", ""]
    assert report.examples([one], prompts, 2, 0) == []


# ------------------------------------------------------------------------------------------------- rollouts

def test_rollouts_are_those_of_the_first_step_and_the_last(tmp_path, recwarn):
    assert report.read_rollouts(str(tmp_path)) == []
    first, last = ([rollout(step, score=i / 8) for i in range(5)] for step in (1, 54))
    found = report.read_rollouts(written(tmp_path, first, last))
    assert [r["about"] for r in found] == [f"step {step}, score {score}" for step in (1, 54)
                                           for score in ("0.00", "0.12", "0.25")]
    assert found[0]["question"] == "What is the capital of Italy?"
    assert not recwarn.list


def without(name):
    return {key: value for key, value in rollout(1).items() if key != name}


@pytest.mark.parametrize("bad, said", [
    (without("advantages"), "'advantages'"), (without("score"), "'score'"),
    (rollout(1, old_values=[1.0]), "1 old_values for 3 tokens"), (rollout(1, tokens=[1, 2, 3]), "TypeError"),
    (rollout(1, rewards=["x"] * 3), "ValueError"), (rollout(1, tokens=[]), "for 0 tokens"),
    (rollout(1, prompt="Why?"), "TypeError"), (rollout("one"), "ValueError"), ([], "'list'"), (7, "'int'")],
    ids=str)
def test_a_file_with_an_answer_that_is_none_is_named_and_the_other_is_shown(tmp_path, bad, said):
    folder = written(tmp_path, [rollout(1), bad], [rollout(2)])
    with pytest.warns(UserWarning) as warned:
        assert [r["step"] for r in report.read_rollouts(folder)] == [2]
    [text] = [str(w.message) for w in warned]
    assert text.startswith(f"{folder}/rollout_first.json: no answers of a rollout") and said in text
    (tmp_path / "rollout_first.json").write_text("[{")
    with pytest.warns(UserWarning, match="JSONDecodeError"):
        assert len(report.read_rollouts(folder)) == 1


def tokens_of(html):
    """[(class, strength, numbers, text), ...] of each token on the page."""
    pattern = r'<span class="(\w+)" style="--s:([\d.]+)" tabindex=0 data-numbers="([^"]*)">([^<]*)</span>'
    found = re.findall(pattern, html)
    return [(kind, float(strength), numbers.split("|"), text) for kind, strength, numbers, text in found]


def test_a_token_is_coloured_by_its_advantage_and_has_its_numbers(tmp_path):
    some = report.read_rollouts(written(tmp_path, [rollout(1, advantages=[2.0, -4.0, 0.5])]))
    html = report.token_cards(some)
    first, second, third = tokens_of(html)
    assert [t[0] for t in (first, second, third)] == ["more", "less", "more"]       # on a scale of ±2, which
    assert [t[1] for t in (first, second, third)] == [1.0, 1.0, 0.25]               # -4 does not stay within
    assert first[2] == ["log π -0.500", "log π_ref -0.750", "KL reward 0.025", "value 0.125", "return 1.500",
                        "advantage 2.000"] and first[3] == "It"
    assert third[2][2] == "KL reward + score 0.025" and second[2][5] == "advantage -4.000"
    assert "−2.00" in html and "+2.00" in html                                      # the legend


def test_without_a_critic_there_is_no_value_and_no_return(tmp_path):
    r = {key: value for key, value in rollout(1).items() if key not in ("old_values", "returns")}
    html = report.token_cards(report.read_rollouts(written(tmp_path, [r])))
    assert [x.split()[0] for x in tokens_of(html)[0][2]] == ["log", "log", "KL", "advantage"]
    assert "return" not in html
    r["advantages"] = [0.0] * 3
    html = report.token_cards(report.read_rollouts(written(tmp_path, [r])))
    assert all(strength == 0 for _, strength, _, _ in tokens_of(html))


# ------------------------------------------------------------------------------------------------- the page

@pytest.fixture
def page(tmp_path):
    """A page on which all that can be is hostile."""
    def make(text, image=None):
        contestant = SimpleNamespace(name=text, texts=[text], judge=[0.5], reward=[])
        examples = report.examples([contestant], [[{"role": "user", "content": text}]], 1, 1)
        hostile = rollout(1, tokens=[text, "\ud800", "\x00"], prompt=[{"role": "user", "content": text}])
        some = report.read_rollouts(written(tmp_path, [hostile]))
        tables = report.tables({text: SFT | WORLD | {"families": {text: 0.5}}})
        return report.page(tables, [text], examples, {text: some}, image)
    return make


class Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found, self.shown = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.shown += data


def test_hostile_text_stays_text(page):
    plain, hostile = Elements(page("plain")), Elements(page(HOSTILE))
    assert [tag for tag, _ in plain.found] == [tag for tag, _ in hostile.found]
    assert [sorted(a) for _, a in plain.found] == [sorted(a) for _, a in hostile.found]
    assert hostile.shown.count(HOSTILE) == plain.shown.count("plain") > 8


def test_the_page_needs_no_network_and_holds_its_figure(page, tmp_path):
    image = tmp_path / "figure.png"
    image.write_bytes(b"\x89PNG figure")
    elements = Elements(page("plain", str(image))).found
    assert [a["src"] for _, a in elements if "src" in a] == ["data:image/png;base64,"
                                                            + base64.b64encode(b"\x89PNG figure").decode()]
    assert not [a for _, a in elements if "href" in a]
    [policy] = [a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "http" not in page("plain").replace("http-equiv", "")
    assert not [tag for tag, _ in Elements(page("plain")).found if tag == "img"]


def test_each_column_is_explained(page):
    text = Elements(page("plain")).shown
    for column in ("judge", "wins against the first", "helpful", "manner"):
        assert f"{column}: " in text
    assert report.page([("Side by side", [["model"], ["a"]])], [], [], {}).count("<article>") == 0


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser_a_token_shows_its_numbers_and_the_page_fits(page, tmp_path, width):
    """By hand, keyboard and touch: the events that these send. Nothing hostile runs."""
    act = """<script>
    const said = [], [first, second, third] = document.querySelectorAll("[data-numbers]")
    const read = () => said.push(document.querySelector("output").textContent)
    first.dispatchEvent(new PointerEvent("pointerover", {bubbles: true})); read()
    second.dispatchEvent(new FocusEvent("focusin", {bubbles: true})); read()
    third.click(); read()
    said.push(document.querySelectorAll(".on").length, document.documentElement.scrollWidth <= innerWidth)
    document.body.dataset.said = JSON.stringify(said)
    </script>"""
    file = tmp_path / "page.html"
    file.write_text(page(HOSTILE) + act, encoding="utf-8", errors="replace")
    command = ["chromium", "--headless", "--no-sandbox", f"--window-size={width},800",
               f"--user-data-dir={tmp_path}/browser", "--dump-dom", f"file://{file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = re.search(r'data-said="([^"]*)"', done.stdout)
    first, second, third, chosen, fits = json.loads(said[1].replace("&quot;", '"'))
    assert "advantage 1.000" in first and "advantage -2.000" in second and "KL reward + score" in third
    assert chosen == 1 and fits and "<title>How the models answer</title>" in done.stdout
