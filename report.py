"""What evaluate.py measured, for people: tables, and one HTML page that needs no network.

The page opens rollouts up: what PPO made of each token of an answer, and why. Whatever comes from a model or a
file is escaped: the page shows an answer, and never runs it.
"""
import json
import os
from base64 import b64encode
from html import escape
from string import Template

from runtime.launch import warn

# {table: {column: (key in report.json, format, what it means)}}
COLUMNS = {
    "Side by side": {
        "judge": ("judge", ".2f", "how good answers are; the world's judge knows the truth, and 1 is perfect"),
        "wins against the first": ("win_rate", ".1%", "better than the first model's answer (a tie: half)"),
        "reward": ("reward", ".2f", "what the reward model thinks: all that PPO sees"),
        "KL (nats)": ("kl", ".1f", "how far a model has moved from the first one"),
        "length": ("length", ".1f", "of an answer, in tokens: a word is one or two"),
        "ended": ("ended", ".0%", "answers that come to an end by themselves"),
        "distinct-2": ("distinct2", ".2f", "variety: different word pairs, as a share of all"),
        "SFT loss": ("sft_loss", ".2f", "how much people's own answers surprise it: a price of alignment")},
    "What the judge sees, and what is declined": {
        "helpful": ("helpful", ".2f", "answers, and correctly (this and the next two: 1 if not at stake)"),
        "honest": ("honest", ".2f", "says that it does not know what nobody can know, and only that"),
        "harmless": ("harmless", ".2f", "declines what should be declined, and only that"),
        "manner": ("manner", ".2f", "polite, concise, finished"),
        "unsafe declined": ("unsafe_declined", ".0%", "harmful requests turned down, most in forms new to it"),
        "safe declined": ("safe_declined", ".0%", "harmless requests in the same forms turned down, wrongly")},
    "Two turns (in brackets: after a right first answer)": {
        "manner, first answer": ("first_manner", ".2f", "of the answer to a first question"),
        "manner, second": ("second_manner", ".2f", "of the next one, after the model's own first answer"),
        "helpful, second": ("second_helpful", ".2f", "whether this second answer is right"),
        "reward": ("conversation_reward", ".2f", "what the reward model thinks of both turns together")}}
TOKEN_NUMBERS = {"logprobs": "log π", "ref_logprobs": "log π_ref", "rewards": "KL reward", "values": "value",
                 "returns": "return", "advantages": "advantage"}


def cell(numbers, key, form):
    """A number as text; in brackets its interval, or the number to compare it with, if there is either."""
    if numbers.get(key) is None:
        return "–"
    beside = numbers.get(f"{key}_interval") or [numbers.get(f"{key}_after_right")]
    more = "" if beside[0] is None else f" ({' to '.join(format(x, form) for x in beside)})"
    return format(numbers[key], form) + more


def tables(report):
    """report.json as [(title, rows of texts), ...], heads first: those of COLUMNS that were measured, and the
    world's families of questions and forms of requests."""
    models, found = report["models"], []
    for title, columns in COLUMNS.items():
        measured = {name: m for name, m in models.items() if any(key in m for key, _, _ in columns.values())}
        rows = [[name, *(cell(m, *column[:2]) for column in columns.values())] for name, m in measured.items()]
        found.append((title, [["model", *columns], *rows]))
    for title, key, form in (("The judge's score by kind of question", "families", ".2f"),
                             ("Unsafe declined, by form of the request", "unsafe_declined_by_wrapper", ".0%"),
                             ("Safe declined, by form of the request", "safe_declined_by_wrapper", ".0%")):
        measured = {name: m[key] for name, m in models.items() if key in m}
        kinds = dict.fromkeys(kind for numbers in measured.values() for kind in numbers)
        rows = [[kind, *(cell(numbers, kind, form) for numbers in measured.values())] for kind in kinds]
        found.append((title, [["", *measured], *rows]))
    return [(title, rows) for title, rows in found if len(rows) > 1]


def markdown(tables):
    lines = []
    for title, (heads, *rows) in tables:
        rows = [heads, ["---"] * len(heads), *rows]
        lines += ["", f"**{title}**", "", *(f"| {' | '.join(row)} |" for row in rows)]
    return lines[1:]


def examples(contestants, prompts, n, count):
    """The first of each contestant's n answers to `count` prompts spread over all: [(question, [(name, scores,
    text), ...]), ...]. Where the judge's score and the learned reward part, the reward is being hacked."""
    found, every = [], max(1, len(prompts) // max(1, count))
    for i in range(0, len(prompts), every)[:count]:
        answers = []
        for c in contestants:
            reward = f", reward {c.reward[i * n]:.2f}" if c.reward else ""
            answers.append((c.name, f"judge {c.judge[i * n]:.2f}{reward}", c.texts[i * n]))
        found.append((" / ".join(m["content"] for m in prompts[i] if m["role"] == "user"), answers))
    return found


def side_by_side(examples):
    lines = []
    for question, answers in examples:
        lines += ["", f"**{question}**", "", *(f"- {name} ({about}): {text}" for name, about, text in answers)]
    return lines


def read_rollouts(folder):
    """Up to three answers of a run's first step and of its last, from its rollouts.jsonl (see ppo.py); [] where
    there is none. The first line that cannot be used is named in a warning, and ends the reading."""
    path, found = os.path.join(folder, "rollouts.jsonl"), []
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as f:
        for i, line in enumerate(f, 1):
            try:
                r = json.loads(line)
                text = "".join(r["tokens"])
                for name in TOKEN_NUMBERS.keys() - ({"values", "returns"} - r.keys()):     # without a critic
                    r[name] = [float(x) for x in r[name]]
                    if not text or len(r[name]) != len(r["tokens"]):
                        raise ValueError(f"{len(r[name])} {name} for {len(r['tokens'])} tokens")
                r["question"] = " / ".join(m["content"] for m in r["prompt"])
                r["about"] = f"step {r['step']:d}, score {r['score']:.2f}"
                found.append(r)
            except (ValueError, LookupError, TypeError, AttributeError) as e:
                warn(f"{path}, line {i}: no answer of a rollout ({type(e).__name__}: {e})")
                break
    ends = dict.fromkeys([r["step"] for r in found][::len(found) - 1 or 1])
    return [r for step in ends for r in [r for r in found if r["step"] == step][:3]]


def opened_up(rollouts):
    """HTML of a run's answers, their tokens coloured by advantage, on one scale, which 95 % of them stay within."""
    sizes = sorted(abs(a) for r in rollouts for a in r["advantages"])
    scale, cards = sizes[int(0.95 * (len(sizes) - 1))] or 1.0, []
    for r in rollouts:
        spans, labels = "", dict(TOKEN_NUMBERS)
        for t, (token, advantage) in enumerate(zip(r["tokens"], r["advantages"])):
            if t + 1 == len(r["tokens"]):
                labels["rewards"] = "KL reward + score"
            numbers = "|".join(f"{label} {r[name][t]:.3f}" for name, label in labels.items() if name in r)
            spans += (f'<span class="{"less" if advantage < 0 else "more"}" data-numbers="{numbers}" tabindex=0 '
                      f'style="--s:{min(1.0, abs(advantage) / scale):.2f}">{escape(token)}</span>')
        cards.append(f'<article><h3>{escape(r["question"])}</h3><small>{r["about"]}</small>'
                     f'<p class="tokens">{spans}</p><output></output></article>')
    return f'<p>worse, −{scale:.2f} <i></i> +{scale:.2f}, better than expected</p>{"".join(cards)}'


def page(tables, facts, examples, rollouts, image=None):
    """The report as HTML. facts: lines. rollouts: {model: what read_rollouts gives}. image: a PNG file."""
    shown, answers, figure = "", "", ""
    for title, (heads, *rows) in tables:
        cells = "<th>" + "<th>".join(map(escape, heads))
        for row in rows:
            cells += "<tr><td>" + "<td>".join(map(escape, row))
        meanings = "".join(f"<dt>{escape(head)}<dd>{escape(about)}"
                           for head, (_, _, about) in COLUMNS.get(title, {}).items())
        shown += (f'<h2>{escape(title)}</h2><div class="wide" tabindex=0><table>{cells}</table></div>'
                  f'<dl class="columns">{meanings}</dl>')
    for question, several in examples:
        said = "".join(f"<dt>{escape(name)} <small>{escape(about)}</small><dd>{escape(text)}"
                       for name, about, text in several)
        answers += f"<article><h3>{escape(question)}</h3><dl>{said}</dl></article>"
    if image:
        with open(image, "rb") as f:
            figure = f'<img alt="" src="data:image/png;base64,{b64encode(f.read()).decode()}">'
    inside = "".join(f"<h2>{escape(name)}</h2>{opened_up(some)}" for name, some in rollouts.items() if some)
    return PAGE.substitute(facts=escape(" ".join(facts)), tables=shown, figure=figure, answers=answers,
                           inside=inside)


PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>How the models answer</title>
<style>
  body { margin: 0 auto; max-width: 60rem; padding: 0 1rem 4rem; color: #1c1c1c; background: #fff;
         font: 17px/1.55 system-ui, sans-serif }
  h2 { margin: 2.5rem 0 .5rem } h3 { font-size: 1rem; margin: 0 } img { width: 100% } .wide { overflow-x: auto }
  small, .columns { font-size: .85rem; color: #555; font-weight: normal } .columns { columns: 20rem }
  table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; white-space: nowrap }
  th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
  th:first-child, td:first-child { position: sticky; left: 0; background: #fff; text-align: left; padding-left: 0 }
  dt { font-weight: 600; break-after: avoid } dd { margin: 0 0 .3rem 1rem; overflow-wrap: anywhere }
  article { border: 1px solid #ddd; border-radius: .5rem; padding: .7rem 1rem; margin: 1rem 0 }
  .tokens { font: 1rem/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 }
  .tokens span { background: rgb(var(--c) / calc(.7 * var(--s))); border-bottom: 2px solid rgb(var(--c)) }
  .more { --c: 33 102 172 } .less { --c: 230 97 1; border-bottom-style: dotted !important }
  i { display: inline-block; width: 6rem; height: .8rem; background: linear-gradient(90deg, #ee9040, #fff, #6494c5) }
  output { display: flex; flex-wrap: wrap; gap: 0 1.2rem; min-height: 3rem } .on { outline: 2px solid #000 }
  section:not(:has(article, img)) { display: none }
</style>
<h1>How the models answer</h1>
<p>Several language models answered the same questions, which were not in their training. The first has only imitated
people; the others have learnt, each in its way, to give the answers that people prefer. In training a <em>reward
model</em> stands for these people, and can be fooled. Here a <em>judge</em> says how good the answers are. $facts
$tables
<section><h2>Pleasing, or being right?</h2>
<p>Where the reward goes on rising and the judge's score falls, a model has learnt to please the reward model with
answers that are no better: the reward is being hacked.$figure</section>
<section><h2>Answers side by side</h2>$answers</section>
<section><h1>Inside PPO</h1>
<p>Answers of the first step of training and of the last, token by token. A blue token with a solid line did better
than expected, and becomes likelier; an orange one with a dotted line did worse. Point at one, tap it, or use Tab: log π
is its log-probability, log π_ref the first model's, the KL reward the penalty for the difference, the value what the
critic expected from there on, the return what came, and the advantage what it did better than expected.$inside</section>
<script>
const text = numbers => Object.assign(document.createElement("span"), {textContent: numbers})
function show({target}) {
  if (!target.dataset?.numbers) return
  document.querySelectorAll(".on").forEach(token => token.classList.remove("on"))
  target.classList.add("on")
  target.closest("article").querySelector("output").replaceChildren(...target.dataset.numbers.split("|").map(text))
}
for (const kind of ["pointerover", "focusin", "click"]) document.addEventListener(kind, show)
</script>
""")
