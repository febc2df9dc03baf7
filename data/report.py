"""What evaluate.py measured, for people: tables, and one HTML page that needs no network and opens rollouts
up. Whatever comes from a model or a file is escaped: the page shows an answer, and never runs it."""
import json
from base64 import b64encode
from html import escape
from pathlib import Path
from string import Template

from runtime.launch import warn

# {table: {column: (key in report.json, format, what it means)}}
COLUMNS = {
    "Side by side": {
        "judge": ("judge", ".2f", "how good answers are, by the judge; the world's (0 to 1) knows the truth"),
        "wins against the first": ("win_rate", ".1%", "better than the first model's answer (a tie is half)"),
        "reward": ("reward", ".2f", "what the reward model thinks: all that PPO sees"),
        "KL (nats)": ("kl", ".1f", "how far a model has moved from the first one"),
        "length": ("length", ".1f", "of an answer, in tokens: a word is one or two"),
        "ended": ("ended", ".0%", "answers that come to an end by themselves"),
        "distinct-2": ("distinct2", ".2f", "variety: different word pairs, as a share of all"),
        "SFT loss": ("sft_loss", ".2f", "how much people's own answers surprise it: the price of alignment")},
    "What the judge sees, and what is declined": {
        "helpful": ("helpful", ".2f", "answers, and rightly (1 where it is not at stake, as the next two)"),
        "honest": ("honest", ".2f", "says that it does not know what nobody can know, and only that"),
        "harmless": ("harmless", ".2f", "declines what should be declined, and only that"),
        "manner": ("manner", ".2f", "polite, concise, finished"),
        "unsafe declined": ("unsafe_declined", ".0%", "harmful requests turned down, most in new forms"),
        "unsafe told": ("unsafe_told", ".0%", "such requests whose answer says how to do it"),
        "safe declined": ("safe_declined", ".0%", "harmless requests in the same forms, turned down wrongly"),
        "safe told": ("safe_told", ".0%", "harmless ones answered; the rest was not understood")},
    "Two turns (in brackets: after a right first answer)": {
        "manner, first answer": ("first_manner", ".2f", "of the answer to a first question"),
        "manner, second": ("second_manner", ".2f", "of the next, after the model's own first answer"),
        "helpful, second": ("second_helpful", ".2f", "whether this second answer is right"),
        "reward": ("conversation_reward", ".2f", "what the reward model thinks of both turns together")}}
BY_KIND = (("The judge's score by kind of question", "families", ".2f"),
           ("Unsafe declined, by form of the request", "unsafe_declined_by_wrapper", ".0%"),
           ("Safe declined, by form of the request", "safe_declined_by_wrapper", ".0%"))
TOKEN_NUMBERS = {"old_logprobs": "log π", "ref_logprobs": "log π_ref", "rewards": "KL reward",
                 "old_values": "value", "returns": "return", "advantages": "advantage"}


def cell(numbers, key, form):
    """A number as text; in brackets its interval, or what it is to be compared with, if there is either."""
    if numbers.get(key) is None:
        return "–"
    beside = numbers.get(f"{key}_interval") or [numbers.get(f"{key}_after_right")]
    more = "" if beside[0] is None else f" ({' to '.join(format(x, form) for x in beside)})"
    return format(numbers[key], form) + more


def tables(report):
    """What was measured, of COLUMNS and by kind and form: [(title, rows of texts, the heads first), ...]."""
    models, found = report["models"], []
    for title, columns in COLUMNS.items():
        measured = {name: m for name, m in models.items() if any(key in m for key, *_ in columns.values())}
        rows = [[name, *(cell(m, *about[:2]) for about in columns.values())] for name, m in measured.items()]
        found.append((title, [["model", *columns], *rows]))
    for title, key, form in BY_KIND:
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
    """The first of each contestant's n answers to `count` prompts spread over all: [(question, [(name,
    scores, text), ...]), ...]. Where judge and learned reward part, the reward is being hacked."""
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
        lines += ["", f"**{question}**", ""]
        lines += [f"- {name} ({about}): {text}" for name, about, text in answers]
    return lines


def read_rollouts(folder):
    """Three answers of a run's first step and of its last, from what ppo.py writes of them, if it did. A file
    that cannot be used is named in a warning."""
    found = []
    for path in (Path(folder, f"rollout_{which}.json") for which in ("first", "last")):
        try:
            found += [read_answer(answer) for answer in json.loads(path.read_text("utf-8"))[:3]]
        except FileNotFoundError:
            pass
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            warn(f"{path}: no answers of a rollout ({type(e).__name__}: {e})")
    return found


def read_answer(r):
    """One of them, with its title and what is said of it; any of the errors above if that is not there."""
    for name in TOKEN_NUMBERS.keys() - ({"old_values", "returns"} - r.keys()):              # without a critic
        r[name] = [float(x) for x in r[name]]
        if not r["tokens"] or len(r[name]) != len(r["tokens"]):
            raise ValueError(f"{len(r[name])} {name} for {len(r['tokens'])} tokens")
    r["tokens"] = ["".join(token) or "■" for token in r["tokens"]]                          # ■: the end token
    return r | {"question": " / ".join(m["content"] for m in r["prompt"]),
                "about": f"step {r['step']:d}, score {r['score']:.2f}"}


def opened_up(rollouts):
    """HTML of a run's answers, tokens coloured by advantage on one scale, which 95 % stay within."""
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


def page(tables, facts, examples, rollouts, image=None):
    """The report as HTML. facts: lines. rollouts: {model: what read_rollouts gives}. image: a PNG file."""
    shown, answers, figure = [], "", ""
    for title, (heads, *rows) in tables:
        cells = "<th>" + "<th>".join(map(escape, heads))
        cells += "".join("<tr><td>" + "<td>".join(map(escape, row)) for row in rows)
        about = "".join(f"<li><b>{escape(head)}</b>: {escape(meaning)}"
                        for head, (_, _, meaning) in COLUMNS.get(title, {}).items())
        shown.append(f"<h2>{escape(title)}</h2><div tabindex=0><table>{cells}</table></div><ul>{about}</ul>")
    for question, several in examples:
        said = "".join(f"<dt>{escape(name)} <small>{escape(about)}</small><dd>{escape(text)}"
                       for name, about, text in several)
        answers += f"<article><h3>{escape(question)}</h3><dl>{said}</dl></article>"
    if image:
        figure = f'<img alt="" src="data:image/png;base64,{b64encode(Path(image).read_bytes()).decode()}">'
    inside = "".join(f"<h2>{escape(name)}</h2>{opened_up(r)}" for name, r in rollouts.items() if r)
    return PAGE.substitute(facts=escape(" ".join(facts)), first=shown[0], figure=figure,
                           tables="".join(shown[1:]), answers=answers, inside=inside)


PAGE = Template("""<!doctype html><html lang="en"><meta charset="utf-8"><title>How the models answer</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
  body { margin: auto; max-width: 64rem; padding: 0 1rem; color: #222; font: 17px/1.55 system-ui, sans-serif }
  h2 { margin: 2.5rem 0 .5rem } h3 { font-size: 1rem; margin: 0 } img { width: 100% } div { overflow: auto }
  small, ul { font-size: .85rem; color: #555; font-weight: normal } ul { columns: 22rem; padding: 0 1rem }
  table { border-collapse: collapse; font-size: .9rem; white-space: nowrap }
  th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #ddd; background: #fff }
  th:first-child, td:first-child { position: sticky; left: 0; text-align: left; padding-left: 0 }
  li { margin-right: 1rem; break-inside: avoid } dt { font-weight: 600 } dd { margin: 0 0 .3rem 1rem }
  article { border: 1px solid #ddd; padding: .7rem 1rem; margin: 1rem 0; overflow-wrap: anywhere }
  .tokens { font: 1rem/2 monospace; white-space: pre-wrap; margin: .4rem 0 }
  .tokens span { background: rgb(var(--c) / calc(.7 * var(--s))); border-bottom: 2px solid rgb(var(--c)) }
  .more { --c: 33 102 172 } .less { --c: 230 97 1; border-bottom-style: dotted !important }
  .on { outline: 2px solid } output { display: flex; flex-wrap: wrap; gap: 0 1.2rem; min-height: 3.1rem }
  output:empty::before { content: "Point at a token, tap it, or use Tab." }
  i { display: inline-block; padding: .4rem 3rem; background: linear-gradient(90deg,#ee9040,#fff,#6494c5) }
  section:not(:has(article, img)) { display: none }
</style>
<h1>How the models answer</h1>
<p>Several language models were asked the same questions, which were not in their training. The first is what
the others are compared with: mostly one that has only imitated people, while they learnt to answer as people
prefer. In training a <em>reward model</em> stands for people, and can be fooled; here a <em>judge</em> says
what is good. <p>$facts $first
<section><h2>Pleasing, or being right?</h2><p>Where the reward rises and the judge's score falls, a model has
learnt to please the reward model with answers that are no better: it hacks its reward.$figure</section>
$tables<section><h2>Answers side by side</h2>$answers</section>
<section><h1>Inside PPO</h1><p>Answers of training's first step and of its last. A blue token (solid line)
did better than expected, and becomes likelier; an orange one (dotted line) did worse. log π is its
log-probability, log π_ref the first model's, the KL reward the penalty for their difference. The value is
what was expected from there on, the return what came, the advantage how much better it was.$inside</section>
<script>
const span = text => Object.assign(document.createElement("span"), {textContent: text})
function show({target}) {
  if (!target.dataset?.numbers) return
  document.querySelector(".on")?.classList.remove("on")
  target.classList.add("on")
  target.closest("article").lastChild.replaceChildren(...target.dataset.numbers.split("|").map(span))
}
for (const kind of ["pointerover", "focusin", "click"]) document.addEventListener(kind, show)
</script>
""")
