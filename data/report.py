"""What evaluate.py measured, for people: Markdown, and one HTML page that needs no network and shows rollouts
token by token. Text from a model or a file is escaped, so that it is shown and never interpreted."""
import json
import re
import warnings
from base64 import b64encode
from html import escape
from pathlib import Path
from string import Template
from textwrap import wrap

# {title of a table: {head of a column: (key in report.json, format, what it means)}}
COLUMNS = json.loads(Path(__file__).with_name("columns.json").read_text("utf-8"))
KINDS = {"The judge's score by kind of question": ("families", ".2f")}      # {title: (key, format)}
TOKEN_NUMBERS = {"old_logprobs": "log π", "ref_logprobs": "log π_ref", "rewards": "KL reward",
                 "old_values": "value", "returns": "return", "advantages": "advantage"}


def cell(numbers, key, form):
    """A number as text, with its interval in brackets if there is one."""
    if numbers.get(key) is None:
        return "–"
    low_high = " to ".join(format(x, form) for x in numbers.get(f"{key}_interval", ()))
    return format(numbers[key], form) + (f" ({low_high})" if low_high else "")


def tables(models, columns=COLUMNS, kinds=KINDS):
    """The numbers of {model: numbers} as [(title, rows of texts, the heads first), ...]: tables of `columns`
    with a row per model, tables of `kinds` with a column per model. What was not measured is left out."""
    found = []
    for title, heads in columns.items():
        rows = [[name, *(cell(numbers, key, form) for key, form, *_ in heads.values())]
                for name, numbers in models.items() if any(key in numbers for key, *_ in heads.values())]
        found.append((title, [["model", *heads], *rows]))
    for title, (key, form) in kinds.items():
        measured = {name: numbers[key] for name, numbers in models.items() if key in numbers}
        names = dict.fromkeys(kind for numbers in measured.values() for kind in numbers)
        rows = [[kind, *(cell(numbers, kind, form) for numbers in measured.values())] for kind in names]
        found.append((title, [["", *measured], *rows]))
    return [(title, rows) for title, rows in found if len(rows) > 1]


def facts(report):
    """What the tables do not say, as sentences."""
    lines = [f"{report['prompts']} held-out prompts, {report['answers_each']} answers each, "
             f"judged by {report['judge']}."]
    if rm := report.get("reward_model"):
        best = f"; the best any scorer could reach is {rm['ceiling']:.1%}" if "ceiling" in rm else ""
        lines.append(f"Reward model: {rm['accuracy']:.1%} of {rm['pairs']} held-out pairs{best}.")
    taken = ", ".join(f"{name} {s:.0f}" for name, s in report["seconds"].items())
    return [*lines, f"Seconds: {taken}."]


def lessons(models):
    """What the numbers of {model: numbers} show about learned rewards, as sentences."""
    first, *others = [name for name in models if name != "best_of_n"]
    if not others or models[first]["reward"] is None:
        return []
    best, paid = (max(others, key=lambda name: models[name][key]) for key in ("judge", "reward"))
    a, b = models[best], models[paid]
    found = [f"The judge's score is {models[first]['judge']:.2f} for {first}; among the others {best} has "
             f"the highest, {a['judge']:.2f}."]
    if b["judge"] < a["judge"] - 0.05:
        found.append(f"{paid} earns the highest reward, {b['reward']:.2f}, but the judge gives it "
                     f"{b['judge']:.2f}: it exploits the reward model's errors (reward hacking).")
        if b["kl"] > a["kl"]:
            found.append(f"Its KL from {first} is {b['kl']:.1f} nats, that of {best} is {a['kl']:.1f}: near "
                         f"{first} the learned reward can be trusted.")
    return found


def examples(contestants, prompts, n, count):
    """The first of each contestant's n answers to `count` prompts spread over all: [(question, [(name,
    scores, text), ...]), ...]. Answers that the reward model likes and the judge does not show hacking."""
    found, every = [], max(1, len(prompts) // max(1, count))
    for i in range(0, len(prompts), every)[:count]:
        answers = []
        for c in contestants:
            reward = f", reward {c.reward[i * n]:.2f}" if c.reward else ""
            answers.append((c.name, f"judge {c.judge[i * n]:.2f}{reward}", c.texts[i * n]))
        found.append((" / ".join(m["content"] for m in prompts[i] if m["role"] == "user"), answers))
    return found


# ----------------------------------------------------------------------------------------- Markdown

def literal(text):
    """Any text as one line of Markdown that shows it unchanged (an underscore within a word is no markup)."""
    return re.sub(r"[\\`*\[\]<>&|~$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", " ".join(text.split()))


def in_terminal(tables, examples):
    """Tables and examples as lines for a terminal."""
    lines = []
    for question, answers in examples:
        width = max(len(name) for name, *_ in answers)
        lines.append(question)
        for name, scores, text in answers:
            lines += wrap(f"    {name:{width}}  {scores}:  {' '.join(text.split())}", 100,
                          subsequent_indent=" " * 8)
        lines.append("")
    for _, rows in tables:
        first, *rest = [max(map(len, column)) for column in zip(*rows)]
        lines += ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], rest)]) for row in rows] + [""]
    return lines


def markdown(tables):
    """Tables as lines of Markdown."""
    lines = []
    for title, (heads, *rows) in tables:
        rows = [map(literal, heads), ["---"] * len(heads), *(map(literal, row) for row in rows)]
        lines += ["", f"**{title}**", "", *(f"| {' | '.join(row)} |" for row in rows)]
    return lines[1:]


def side_by_side(examples):
    """Examples as lines of Markdown."""
    lines = []
    for question, answers in examples:
        lines += ["", f"**{literal(question)}**", ""]
        lines += [f"- {literal(name)} ({scores}): {literal(text)}" for name, scores, text in answers]
    return lines


def document(tables, facts, examples, image=""):
    """The text of report.md. image: the path of a figure beside it."""
    figure = ["", f"![learned reward and judge's score against √KL]({Path(image).name})"] if image else []
    return "\n".join(["# Report", "", *markdown(tables), "", *map(literal, facts), *figure, "",
                      "## Side by side", *side_by_side(examples), ""])


# ----------------------------------------------------------------------------------------- rollouts

def read_rollouts(folder):
    """Three answers of a run's first rollout and of its last, if it wrote them (rollout_first.json,
    rollout_last.json). Warns of a file that cannot be used, and leaves it out."""
    found = []
    for path in sorted(Path(folder).glob("rollout_*.json")):
        try:
            found += [read_answer(answer) for answer in json.loads(path.read_text("utf-8"))[:3]]
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            warnings.warn(f"{path}: no answers of a rollout ({type(e).__name__}: {e})")
    return found


def read_answer(r):
    """An answer with its "question" and "about", a line on it; raises one of the errors above if a part is
    missing or wrong. Without a critic there are no old_values and no returns."""
    for name in TOKEN_NUMBERS.keys() - ({"old_values", "returns"} - r.keys()):
        r[name] = [float(x) for x in r[name]]
        if not r["tokens"] or len(r[name]) != len(r["tokens"]):
            raise ValueError(f"{len(r[name])} {name} for {len(r['tokens'])} tokens")
    r["tokens"] = ["".join(token) or "■" for token in r["tokens"]]                          # ■: the end token
    return r | {"question": " / ".join(m["content"] for m in r["prompt"]),
                "about": f"step {r['step']:d}, score {r['score']:.2f}"}


def token_cards(rollouts):
    """HTML of answers from read_rollouts, tokens coloured by advantage. The scale ends where 95 % of the
    advantages lie below, so that a few large ones do not make all others pale."""
    sizes = sorted(abs(a) for r in rollouts for a in r["advantages"])
    scale, cards = sizes[int(0.95 * (len(sizes) - 1))] or 1.0, ""
    for r in rollouts:
        spans, labels = "", dict(TOKEN_NUMBERS)
        for t, (token, advantage) in enumerate(zip(r["tokens"], r["advantages"])):
            if t + 1 == len(r["tokens"]):
                labels["rewards"] = "KL reward + score"
            numbers = "|".join(f"{label} {r[name][t]:.3f}" for name, label in labels.items() if name in r)
            kind, strength = "less" if advantage < 0 else "more", min(1.0, abs(advantage) / scale)
            spans += (f'<span class="{kind}" style="--s:{strength:.2f}" tabindex=0 data-numbers="{numbers}">'
                      f"{escape(token)}</span>")
        cards += (f'<article><h3>{escape(r["question"])}</h3><small>{r["about"]}</small>'
                  f'<p class="tokens">{spans}</p><output></output></article>')
    return f"<p>worse than expected, −{scale:.2f} <i></i> +{scale:.2f}, better{cards}"


# ----------------------------------------------------------------------------------------- the page

def page(tables, facts, examples, rollouts, image=""):
    """The text of report.html, out of the template beside this file. rollouts: {model: answers from
    read_rollouts}; image: path of a PNG file."""
    shown, answers, figure = [], "", ""
    for title, (heads, *rows) in tables:
        cells = "<th>" + "<th>".join(map(escape, heads))
        cells += "".join("<tr><td>" + "<td>".join(map(escape, row)) for row in rows)
        meanings = "".join(f"<li><b>{escape(head)}</b>: {escape(meaning)}"
                           for head, (_, _, meaning) in COLUMNS.get(title, {}).items())
        shown.append(f"<h2>{escape(title)}</h2><div tabindex=0><table>{cells}</table></div>"
                     f"<ul>{meanings}</ul>")
    for question, several in examples:
        said = "".join(f"<dt>{escape(name)} <small>{escape(scores)}</small><dd>{escape(text)}"
                       for name, scores, text in several)
        answers += f"<article><h3>{escape(question)}</h3><dl>{said}</dl></article>"
    if image:
        figure = f'<img alt="" src="data:image/png;base64,{b64encode(Path(image).read_bytes()).decode()}">'
    inside = "".join(f"<h2>{escape(name)}</h2>{token_cards(r)}" for name, r in rollouts.items() if r)
    template = Template(Path(__file__).with_suffix(".html").read_text("utf-8"))
    return template.substitute(facts=escape(" ".join(facts)), first=shown[0], figure=figure,
                               tables="".join(shown[1:]), answers=answers, inside=inside)
