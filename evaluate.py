"""Put checkpoints side by side on held-out prompts, or talk to one.

    python evaluate.py                                all that out/ holds: sft, best_of_n, dpo, ppo, ppo_no_kl
    python evaluate.py out/sft out/mine --judge out/reward_model --data prompts.jsonl
    python evaluate.py out/a out/b --judge chat-model --data prompts.jsonl      an AI judge: feedback/judge.py
    python evaluate.py --require "win_rate>=0.7,kl<5"       of the last model, or it ends with status 1
    python evaluate.py out/ppo --chat

Each model answers every prompt a few times, by sampling. The first is the one to beat, and the reference of
the KL. Prints tables and some answers next to each other; writes out/report.json, report.md, report.html and,
if matplotlib is installed, overoptimization.png: the learned reward and the judge's score against √KL, as in
Gao et al. (2022). Where the world judges, the report also says what its judge sees, what is declined
(lab/red_team.py), and how a conversation goes on after a model's own answer.
"""
import json
import math
import operator
import os
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data import loading, world
from data.batches import encode_demonstrations, fit, fit_prompts
from data.records import Preference
from data.report import examples, markdown, page, read_rollouts, side_by_side, tables
from data.tokenizer import Tokenizer
from feedback.judge import preferred
from lab import red_team
from runtime.compute import Compute, row_seeds, select
from runtime.files import find, write_json
from runtime.flags import Settings, flag
from runtime.launch import STARTED, main
from runtime.models import load, load_reward_model
from runtime.processes import is_first
from sft import evaluate as sft_loss_of

try:                                        # an extra: pip install matplotlib
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

DEFAULT_MODELS = ("out/sft", "out/dpo", "out/ppo", "out/ppo_no_kl")
OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
NUMBERS = ("judge", "reward", "win_rate", "kl", "length", "ended", "distinct2", "sft_loss")
OF_THE_WORLD = (*world.PARTS, "unsafe_declined", "safe_declined", "unsafe_told", "safe_told")


@dataclass
class Config(Settings):
    models: tuple = flag((), f"checkpoint folders; none takes what there is of {', '.join(DEFAULT_MODELS)}")
    out: str = flag("out", "folder of the report")
    data: str = flag(loading.WORLD, "prompts: a folder of the world's (the held-out ones), or a file")
    judge: str = flag("world", "world, or the folder of a reward model, or of a chat model that compares")
    reward: str = flag("out/reward_model", "reward model that scores, and that picks the best of n")
    demonstrations: str = flag(loading.WORLD, "held-out demonstrations, for the SFT loss: as --data")
    samples: int = flag(3, "answers to each prompt", 1)
    best_of: int = flag(16, "n of best-of-n, drawn from the first model; 0 leaves it out", 0)
    temperature: float = flag(1.0, "of sampling; 0 is greedy", 0)
    max_new_tokens: int = flag(64, "longest answer, in tokens", 1)
    micro_batch: int = flag(256, "sequences per forward pass: lower it if memory runs out", 1)
    show: int = flag(6, "prompts whose answers are printed next to each other", 0)
    require: str = flag("", "conditions on the last model's numbers, as in win_rate>=0.7,kl<5")
    chat: bool = flag(False, "talk to the (first) model; an empty line starts anew, Ctrl-D ends")

    def __post_init__(self):
        for name, *_ in requirements(self.require):
            if name in OF_THE_WORLD and self.judge != "world":
                raise ValueError(f"--require {name}: only the world's judge measures it")


@dataclass
class Contestant:
    """A model's answers to P prompts, N times each; lists hold prompt 0's answers, then prompt 1's, ..."""
    name: str
    texts: list
    judge: list                             # the judge's scores; of a chat model, P(better than the first's)
    reward: list                            # the reward model's, or empty
    numbers: dict                           # what report.json says of it


# ------------------------------------------------------------------------------------------ numbers

def distinct2(texts):
    """Different word pairs as a share of all word pairs (Li et al. 2016): low when a model says the same
    thing over and over."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:])]
    return len(set(pairs)) / max(1, len(pairs))


def win_rate(mine, theirs, n, resamples=2000):
    """How often mine scores above theirs, a tie counting half, answer by answer: (rate, low, high), with a 95
    % interval by the bootstrap over prompts (n answers each), since answers to one prompt are alike."""
    # The same answer, scored among others, may differ in rounding: that wins nothing.
    points = [0.5 if abs(a - b) < 1e-5 else float(a > b) for a, b in zip(mine, theirs)]
    wins = torch.tensor(points).view(-1, n).mean(1)
    picks = torch.randint(len(wins), (resamples, len(wins)), generator=torch.Generator().manual_seed(0))
    low, high = wins[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return wins.mean().item(), low, high


def best_of(pool, n, keep):
    """From pool[p], (reward, index) of many answers to prompt p: `keep` winners among n each, as indices."""
    return [max(answers[k * n:(k + 1) * n])[1] for answers in pool for k in range(keep)]


def best_of_n_kl(n):
    """KL(best of n ‖ the sampled model), nats per answer: log n − (n − 1)/n (Stiennon et al. 2020)."""
    return math.log(n) - (n - 1) / n


def named(folders):
    """{name in the report: folder} of checkpoints: a folder's own name, or its path where that is taken."""
    paths = [os.path.normpath(folder) for folder in folders]
    names = [*(os.path.basename(path) for path in paths), "best_of_n"]
    found = {path if names.count(name) > 1 else name: path for path, name in zip(paths, names)}
    if len(found) < len(paths):
        raise ValueError(f"{max(paths, key=paths.count)} is named twice")
    return found


def requirements(text):
    """The conditions of --require: [(name, operator, number), ...]. Raises ValueError for what is none."""
    names, found = (*NUMBERS, *OF_THE_WORLD), []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)\s*", part)
        if not match or match[1] not in names:
            raise ValueError(f"--require: {part!r} is no condition such as kl<5; names: {', '.join(names)}")
        found.append((match[1], match[2], float(match[3])))
    return found


def unmet(conditions, numbers):
    """Which conditions a model's numbers do not meet, in words. What was not measured (None) meets none."""
    return [f"{name} is {numbers.get(name)}, not {sign} {bound:g}" for name, sign, bound in conditions
            if numbers.get(name) is None or not OPERATORS[sign](numbers[name], bound)]


# -------------------------------------------------------------------------------------- the contest

class Contest:
    """The networks, prompts and scores that all contestants share."""

    def __init__(self, cfg, first):
        """first: folder of the model to beat."""
        self.cfg, self.compute, self.tokenizer = cfg, Compute(cfg), Tokenizer.load(first)
        self.reference = load(first, vocab_size=self.tokenizer.vocab_size).requires_grad_(False)
        self.scorer, self.judge, self.first = None, None, None              # first: the Contestant to beat
        if cfg.reward != Config.reward or os.path.exists(cfg.reward):
            self.tokenizer.check_same(cfg.reward)
            self.scorer = load_reward_model(cfg.reward).requires_grad_(False)
        if cfg.judge != "world":
            self.judges_tokenizer = Tokenizer.load(cfg.judge)
            self.judge = load(cfg.judge, vocab_size=self.judges_tokenizer.vocab_size).requires_grad_(False)
            if self.judge.head_kind == "scalar":
                self.tokenizer.check_same(cfg.judge)
        self.compute.place(*(net for net in (self.reference, self.scorer, self.judge) if net is not None))
        block_size = self.reference.config.block_size
        room = block_size - cfg.max_new_tokens
        _, prompts = loading.load("prompts", cfg.data, "", cfg.max_dropped)
        self.prompts = fit_prompts(self.tokenizer, prompts, room, "held-out prompts")
        self.asked = [p for p in self.prompts for _ in range(cfg.samples)]
        _, demonstrations = loading.load("demonstrations", cfg.demonstrations, "", cfg.max_dropped)
        self.demonstrations = encode_demonstrations(self.tokenizer, demonstrations, block_size,
                                                    "held-out demonstrations")
        if cfg.judge == "world":
            items = fit(red_team.requests(), lambda item: len(self.tokenizer.prompt(item.turns)), room,
                        "prompts of the red team")
            self.red_team = [item for item in items for _ in range(cfg.samples)]

    def network(self, folder):
        """A frozen network out of a folder, where this contest's run."""
        model = load(folder, vocab_size=self.tokenizer.vocab_size).requires_grad_(False)
        self.compute.place(model)
        return model

    def answers(self, model, prompts, noise, longest=None):
        """A sampled answer to each prompt, as Compute.sample gives them. noise: a name for their seeds.
        longest: in tokens, if not the flag's."""
        ids = [self.tokenizer.prompt(p) for p in prompts]
        seeds = row_seeds(random.Random(f"{self.cfg.seed}/{noise}"), len(ids))
        return self.compute.sample(model, ids, seeds, longest or self.cfg.max_new_tokens,
                                   self.cfg.temperature, self.tokenizer.end)

    def texts(self, answers):
        return [self.tokenizer.decode(ids[mask].tolist())
                for ids, mask in zip(answers["tokens"], answers["mask"])]

    def scores(self, net, answers):
        """A reward model's score of each answer: a list."""
        def score(rows):
            b = select(answers, rows)
            return {"scores": net.score(b["tokens"], b["lengths"])}
        lengths = answers["lengths"]
        return self.compute.map(score, range(len(lengths)), lengths)["scores"].tolist()

    def kl(self, model, answers):
        """Mean of log π − log π_ref over a model's own answers, nats per answer: estimates KL(π ‖ π_ref)."""
        def log_ratio(rows):
            b = select(answers, rows)
            tokens, mask = b["tokens"], b["mask"]
            return {"kl": (model.logprobs(tokens, mask) - self.reference.logprobs(tokens, mask)).sum(1)}
        lengths = answers["lengths"]
        return self.compute.map(log_ratio, range(len(lengths)), lengths)["kl"].mean().item()

    def compare(self, texts):
        """P(better than the first contestant's answer) of each, by a chat model. The same words tie: 0.5."""
        theirs = self.first.texts if self.first else texts
        pairs = [Preference(p, [a, b], [1, 2]) for p, a, b in zip(self.asked, texts, theirs) if a != b]
        found = iter(preferred(self.compute, self.judge, self.judges_tokenizer, pairs))
        return [0.5 if a == b else next(found) for a, b in zip(texts, theirs)]

    def enter(self, name, answers, kl, sft_loss):
        """A Contestant with its scores. kl: nats per answer from the first model; sft_loss: nats per token on
        held-out demonstrations."""
        texts, seen = self.texts(answers), {}
        if self.judge is None:
            judged = [world.judge(prompt, text) for prompt, text in zip(self.asked, texts)]
            families = [world.find(prompt).family for prompt in self.asked]
            seen = world.mean_parts(self.asked, texts) | {"families": world.means_by(families, judged)}
        elif self.judge.head_kind == "scalar":
            judged = self.scores(self.judge, answers)
        else:
            judged = self.compare(texts)
        rewards = self.scores(self.scorer, answers) if self.scorer else []
        rate, low, high = win_rate(judged, self.first.judge if self.first else judged, self.cfg.samples)
        numbers = {
            "judge": world.mean(judged), "reward": world.mean(rewards) if rewards else None,
            "win_rate": round(rate, 4), "win_rate_interval": [round(low, 4), round(high, 4)],
            "kl": round(kl, 3) + 0.0,                               # -0.0 becomes 0.0
            "length": world.mean(answers["mask"].sum(1).tolist()),          # in tokens, <|im_end|> included
            "ended": world.mean(answers["ended"].tolist()),
            "distinct2": round(distinct2(texts), 4), "sft_loss": round(sft_loss, 4)} | seen
        entered = Contestant(name, texts, judged, rewards, numbers)
        self.first = self.first or entered
        return entered

    def enter_checkpoint(self, number, name, folder):
        model = self.network(folder)
        print(f"{folder} answers {len(self.prompts)} prompts {self.cfg.samples} times ...", flush=True)
        answers = self.answers(model, self.asked, noise=number)
        loss = sft_loss_of(model, self.compute, self.demonstrations)
        entered = self.enter(name, answers, self.kl(model, answers), loss)
        if self.judge is None:
            turns = [item.turns for item in self.red_team]
            texts = self.texts(self.answers(model, turns, f"{number}/red team"))
            entered.numbers |= red_team.shares(self.red_team, texts) | self.converse(model, number)
        return entered

    def converse(self, model, number):
        """Ask the first question of each held-out conversation, put the model's own answer in the right one's
        place, and ask the second: {name: mean}. In training, first answers are right and plain; a policy that
        talks otherwise goes on from its own words, and what is a little off may drift. To compare with, and
        with the same noise: second answers after the right first one."""
        block_size = self.reference.config.block_size
        room = min(self.cfg.max_new_tokens, block_size // 4)        # for a second answer
        right = [p for p in self.asked if len(p) == 3]
        asked = [p[:1] for p in right]
        first = self.texts(self.answers(model, asked, f"{number}/first")) if asked else []
        talks = [(text, [p[0], p[1] | {"content": text}, p[2]], p) for p, text in zip(right, first)]
        talks = [talk for talk in talks if len(self.tokenizer.prompt(talk[1])) + room <= block_size]
        if not talks:
            return {}
        first, own, right = zip(*talks)
        found = {"conversations": len(talks),
                 "first_manner": world.mean_parts([p[:1] for p in right], first)["manner"]}
        for after, prompts in (("", own), ("_after_right", right)):
            answers = self.answers(model, prompts, f"{number}/second", room)
            seen = world.mean_parts(right, self.texts(answers))     # the same question, whatever came before
            found |= {f"second_{part}{after}": seen[part] for part in ("manner", "helpful")}
            if self.scorer:
                found[f"conversation_reward{after}"] = world.mean(self.scores(self.scorer, answers))
        return found

    def enter_best_of(self):
        """The first model's best of n answers by the reward model, as a Contestant. Its numbers hold a curve
        over n = 1, 2, 4, ...: the same number of answers for every n, out of one pool."""
        many = self.cfg.samples * self.cfg.best_of
        print(f"best of {self.cfg.best_of}: {many} answers to each prompt ...", flush=True)
        asked = [p for p in self.prompts for _ in range(many)]
        answers = self.answers(self.reference, asked, noise="best_of_n")
        scores = self.scores(self.scorer, answers)
        pool = [[(scores[i], i) for i in range(p * many, (p + 1) * many)] for p in range(len(self.prompts))]
        curve = []
        for n in [*(2 ** i for i in range(10) if 2 ** i < self.cfg.best_of), self.cfg.best_of]:
            won = select(answers, best_of(pool, n, keep=self.cfg.samples))
            entered = self.enter("best_of_n", won, best_of_n_kl(n), self.first.numbers["sft_loss"])
            curve.append({"n": n, "kl": best_of_n_kl(n), "reward": entered.numbers["reward"],
                          "judge": entered.numbers["judge"]})
        entered.numbers |= {"n": n, "curve": curve}
        return entered


def contest(cfg, checkpoints):
    """Let every checkpoint (see named) answer, and score that: (contestants, prompts)."""
    together, contestants = Contest(cfg, next(iter(checkpoints.values()))), []
    for number, (name, folder) in enumerate(checkpoints.items()):
        contestants.append(together.enter_checkpoint(number, name, folder))
        if number == 0 and together.scorer and cfg.best_of:
            contestants.append(together.enter_best_of())
    return contestants, together.prompts


# --------------------------------------------------------------------------------------- the report

def seconds(out, checkpoints):
    """Wall-clock seconds of each stage from its run.json, and in all; stages that overlap count once.
    checkpoints: {name: folder}; what they were made of is looked for in `out`."""
    spans, found = [], {}
    folders = {name: os.path.join(out, name) for name in ("world", "sft", "reward_model")} | checkpoints
    for name, folder in folders.items():
        about = read_run(folder)
        if about.keys() >= {"seconds", "started", "ended"}:
            found["data" if name == "world" else name] = about["seconds"]
            spans.append((about["started"], about["ended"]))
    now = time.time()
    found["evaluate"] = round(now - STARTED, 1)
    total, reached = 0.0, 0.0
    for start, end in sorted([*spans, (STARTED, now)]):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return found | {"total": round(total, 1)}


def read_run(folder):
    """What a run wrote about itself, or {}."""
    try:
        return json.loads(Path(folder, "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def facts(report):
    """What the tables do not say, as lines."""
    lines = [f"{report['prompts']} held-out prompts, {report['answers_each']} answers each, "
             f"judged by {report['judge']}."]
    if learnt := report.get("reward_model"):
        best = f"; the best any scorer could reach is {learnt['ceiling']:.1%}" if "ceiling" in learnt else ""
        lines.append(f"Reward model: {learnt['accuracy']:.1%} of {learnt['pairs']} held-out pairs{best}.")
    taken = ", ".join(f"{name} {s:.0f}" for name, s in report["seconds"].items())
    return [*lines, f"Seconds: {taken}."]


def read_steps(folder):
    """The metrics of a run's steps: dicts."""
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text("utf-8").splitlines()]


def plot(path, checkpoints, models):
    """Both scores against √KL: PPO's rollouts step by step, and best-of-n. A run has one colour in both.
    checkpoints: {name: folder}. models: the report's."""
    figure, curve = Figure(figsize=(10, 4)), models["best_of_n"]["curve"]
    panels = (("reward", "score", "What PPO sees: the learned reward"),
              ("judge", "judge", "What is true: the judge's score"))
    for axis, (score, in_rollout, title) in zip(figure.subplots(1, 2, sharex=True), panels):
        for name, colour, label in (("ppo", "#1f77b4", "PPO, adaptive KL"),
                                    ("ppo_no_kl", "#d62728", "PPO, no KL penalty")):
            if name not in checkpoints or not os.path.exists(f"{checkpoints[name]}/metrics.jsonl"):
                continue
            steps = read_steps(checkpoints[name])
            if in_rollout in steps[0]:
                root = [math.sqrt(max(0.0, s["kl"])) for s in steps]
                axis.plot(root, [s[in_rollout] for s in steps], color=colour, alpha=0.6, linewidth=1.2)
            root = math.sqrt(max(0.0, models[name]["kl"]))
            axis.plot(root, models[name][score], "o", color=colour, label=label)
        axis.plot([math.sqrt(c["kl"]) for c in curve], [c[score] for c in curve], "s-", color="#555555",
                  markersize=4, label=f"best of n, n up to {curve[-1]['n']}")
        axis.set(xlabel="√KL(π ‖ SFT), nats per answer", title=title)
        axis.grid(alpha=0.25)
    figure.axes[0].legend(frameon=False)
    figure.text(0.5, 0.015, "lines: training rollouts, step by step; dots and squares: held-out prompts",
                fontsize=9, color="#666666", ha="center")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)


def write_report(cfg, checkpoints, contestants, prompts):
    """report.json, which it returns, report.md, report.html and the figure; prints tables and answers."""
    report = {"judge": cfg.judge, "prompts": len(prompts), "answers_each": cfg.samples, "seed": cfg.seed,
              "models": {c.name: c.numbers for c in contestants}}
    about = read_run(cfg.reward)
    if "held_out" in about:
        report["reward_model"] = about["held_out"]
    report["seconds"] = seconds(cfg.out, checkpoints)
    write_json(os.path.join(cfg.out, "report.json"), report)
    image, figure = None, []
    if Figure and "curve" in report["models"].get("best_of_n", {}):
        image = os.path.join(cfg.out, "overoptimization.png")
        plot(image, checkpoints, report["models"])
        figure = ["", "![learned reward and judge's score against √KL](overoptimization.png)"]
    shown, answers = tables(report), examples(contestants, prompts, cfg.samples, 24)
    lines = ["# Report", "", *markdown(shown), "", *facts(report), *figure, "", "## Side by side",
             *side_by_side(answers)]
    rollouts = {name: read_rollouts(folder) for name, folder in checkpoints.items()}
    html = page(shown, facts(report), answers, rollouts, image)
    for name, text in (("report.md", "\n".join(lines) + "\n"), ("report.html", html)):
        Path(cfg.out, name).write_text(text, encoding="utf-8", errors="replace")
    print("\n".join(side_by_side(examples(contestants, prompts, cfg.samples, cfg.show))))
    print("\n" + "\n".join([*markdown(shown[:3]), "", *facts(report)]))
    print(f"wrote {cfg.out}/report.json, report.md and report.html")
    return report


# ------------------------------------------------------------------------------------------ talking

def chat(cfg, folder):
    """A conversation in the terminal: each turn sees those before it, as far as they fit."""
    tokenizer, compute, rng, messages = Tokenizer.load(folder), Compute(cfg), random.Random(cfg.seed), []
    model = load(folder, vocab_size=tokenizer.vocab_size).requires_grad_(False)
    compute.place(model)
    if model.head_kind != "lm":
        raise ValueError(f"{folder} is a reward model: it gives scores, not answers")
    print(f"talking to {folder}; an empty line starts anew, Ctrl-D ends")
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            print()
            return
        if not sys.stdin.isatty():                                  # a pipe does not show what it sends
            print(text)
        if not text:
            messages = []
            continue
        messages.append({"role": "user", "content": text})
        ids = tokenizer.prompt(messages)
        room = min(cfg.max_new_tokens, model.config.block_size - len(ids))
        if room < 1:
            print("(this is longer than the model can read: starting anew)")
            messages = []
            continue
        answer = compute.sample(model, [ids], row_seeds(rng, 1), room, cfg.temperature, tokenizer.end)
        text = tokenizer.decode(answer["tokens"][answer["mask"]].tolist())
        messages.append({"role": "assistant", "content": text})
        print(f"{os.path.basename(folder)}> {text}")


# ------------------------------------------------------------------------------------- all together

def evaluate(cfg):
    folders = cfg.models
    if cfg.chat:
        folders = folders[:1] or ("out/ppo",)
    elif not folders:
        folders = [f for f in DEFAULT_MODELS if os.path.exists(f"{f}/tokenizer.json")] or DEFAULT_MODELS[:1]
    for folder in folders:
        find(folder)
    if cfg.chat:
        return chat(cfg, *folders)
    if cfg.judge == "world" and not loading.is_world(cfg.data):
        raise ValueError("the world's judge knows only the world's prompts: name a reward model with --judge")
    checkpoints = named(folders)
    os.makedirs(cfg.out, exist_ok=True)                             # before the work, so that none is lost
    contestants, prompts = contest(cfg, checkpoints)
    if is_first():
        report, last = write_report(cfg, checkpoints, contestants, prompts), [*checkpoints][-1]
        if missed := unmet(requirements(cfg.require), report["models"][last]):
            raise ValueError(f"{last} does not meet --require: {'; '.join(missed)}")


if __name__ == "__main__":
    main(Config, evaluate, __doc__)
