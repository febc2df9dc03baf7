"""Put checkpoints side by side on held-out prompts: one set of samples, one table, one report.

    python evaluate.py                              what there is of out/sft, out/dpo, out/ppo, out/ppo_no_kl
    python evaluate.py out/sft out/mine --judge out/reward_model --data prompts.jsonl

Each model samples a few answers to every prompt. The others are compared with the first one: they win where
the judge scores their answer higher than its answer, and their KL is measured from it. Prints tables and
answers side by side; writes out/report.json, report.md, report.html and, if matplotlib is installed,
overoptimization.png: the learned reward and the judge's score against √KL, as in Gao et al. (2022).
"""
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data import loading, report, world
from data.batches import encode_demonstrations, fit_prompts
from data.tokenizer import Tokenizer
from runtime.compute import Compute, pad, row_seeds, select
from runtime.files import find, write_json
from runtime.flags import Settings, flag
from runtime.launch import STARTED, main
from runtime.models import load
from runtime.processes import is_first
from runtime.rewards import find_reward

try:                                        # an extra: pip install matplotlib
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

DEFAULT_MODELS = ("out/sft", "out/dpo", "out/ppo", "out/ppo_no_kl")


@dataclass
class Sampling(Settings):
    """The flags of every script that samples answers from checkpoints."""
    temperature: float = flag(1.0, "of sampling; 0 is greedy", 0)
    top_k: int = flag(0, "sample from the k likeliest tokens; 0 from all", 0, needs="temperature")
    top_p: float = flag(1.0, "sample from the fewest tokens that hold this share of the probability", 1e-6, 1,
                        needs="temperature")
    max_new_tokens: int = flag(64, "longest answer, in tokens", 1)
    micro_batch: int = flag(256, "sequences per forward pass: lower it if memory runs out", 1)


@dataclass
class Config(Sampling):
    models: tuple = flag((), f"checkpoint folders; none takes what there is of {', '.join(DEFAULT_MODELS)}")
    out: str = flag("out", "folder of the report")
    data: str = flag(loading.WORLD, "prompts: a folder of the world's (the held-out ones), or a file")
    held_out: str = flag("", "file of prompts in place of the held-out ones of --data, such as "
                         f"{loading.WORLD}/prompts_development.jsonl")
    judge: str = flag("world", "scores the answers: world, or as --reward")
    reward: str = flag("out/reward_model", "what scores, and picks the best of n: see runtime/rewards.py")
    demonstrations: str = flag(loading.WORLD, "held-out demonstrations, for the SFT loss: as --data")
    samples: int = flag(3, "answers to each prompt", 1)
    best_of: int = flag(16, "n of best-of-n, sampled from the first model; 0 leaves it out", 0)
    show: int = flag(6, "prompts whose answers are printed side by side", 0)


@dataclass
class Contestant:
    """A model and its answers to P prompts, n times each: lists of P·n, the first prompt's answers first."""
    name: str
    texts: list
    judge: list                             # the judge's scores
    reward: list                            # the reward model's scores, or empty
    numbers: dict                           # its entry in report.json


# ------------------------------------------------------------------------------------------ numbers

def distinct2(texts):
    """Different word pairs divided by all (Li et al. 2016): low for a model that repeats itself."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:])]
    return len(set(pairs)) / max(1, len(pairs))


def win_rate(mine, theirs, n, resamples=2000):
    """How often mine scores above theirs, where a tie counts half: (rate, low, high), with a 95 % interval by
    the bootstrap over prompts (n answers each) and not over answers: those to one prompt are alike."""
    # The same answer scored in another batch may differ by rounding: such a difference is a tie.
    points = [0.5 if abs(a - b) < 1e-5 else float(a > b) for a, b in zip(mine, theirs)]
    wins = torch.tensor(points).view(-1, n).mean(1)
    picks = torch.randint(len(wins), (resamples, len(wins)), generator=torch.Generator().manual_seed(0))
    low, high = wins[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return wins.mean().item(), low, high


def best_of(scores, n, keep):
    """The answers with the highest score among n, `keep` for each prompt, as a list of indices. scores
    (P, M), with M at least n·keep, of answers that are numbered row by row."""
    P, M = scores.shape
    winners = scores[:, :n * keep].reshape(P, keep, n).argmax(-1).cpu()
    return (torch.arange(P)[:, None] * M + torch.arange(keep) * n + winners).flatten().tolist()


def best_of_n_kl(n):
    """KL(best of n ‖ the sampled model) in nats per answer: log n − (n − 1)/n (Stiennon et al. 2020)."""
    return math.log(n) - (n - 1) / n


def named(folders):
    """{name in the report: folder} of checkpoints: a folder's own name, or its path if two share that name.
    Raises ValueError if one is given twice."""
    paths = [os.path.normpath(folder) for folder in folders]
    names = [*(os.path.basename(path) for path in paths), "best_of_n"]
    found = {path if names.count(name) > 1 else name: path for path, name in zip(paths, names)}
    if len(found) < len(paths):
        raise ValueError(f"{max(paths, key=paths.count)} is named twice")
    return found


# -------------------------------------------------------------------------------------- the contest

class Sampler:
    """Samples answers from checkpoints that share a tokenizer."""

    def __init__(self, cfg, folders):
        """cfg: a Sampling; folders: of all networks. Raises ValueError if their tokenizers differ."""
        self.cfg, self.run, self.tokenizer = cfg, Compute(cfg), Tokenizer.load(folders[0])
        for folder in folders[1:]:
            self.tokenizer.check_same(folder)

    def load(self, folder, *others):
        """A frozen language model, placed on the device together with other networks."""
        model = load(folder, "lm", self.tokenizer.vocab_size).requires_grad_(False)
        self.run.place(model, *others)
        return model

    def sample(self, model, prompts, noise, max_new_tokens=0):
        """An answer to each prompt (a message list), as a batch: see Compute.sample. noise: a name from which
        the seeds of the sampling noise are drawn; max_new_tokens: if not the flag's."""
        cfg, ids = self.cfg, [self.tokenizer.prompt(prompt) for prompt in prompts]
        seeds = row_seeds(random.Random(f"{cfg.seed}/{noise}"), len(ids))
        return self.run.sample(model, ids, seeds, max_new_tokens or cfg.max_new_tokens, self.tokenizer.end,
                               temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)

    def texts(self, answers):
        return [self.tokenizer.decode(ids[mask].tolist())
                for ids, mask in zip(answers["tokens"], answers["mask"])]


class Contest(Sampler):
    """The prompts that all models answer, and the networks that score the answers."""

    def __init__(self, cfg, folders):
        """folders: of the models, the one to compare with first."""
        names = {} if cfg.judge == "world" else {"judge": cfg.judge}
        if cfg.reward != Config.reward or os.path.exists(cfg.reward):           # the default may be missing
            names["reward"] = cfg.reward
        super().__init__(cfg, folders)
        self.scorers = {role: find_reward(name, self.tokenizer) for role, name in names.items()}
        networks = [network for scorer in self.scorers.values() for network in scorer.networks]
        self.reference = self.load(folders[0], *networks)
        self.first = None                                           # its Contestant, once it has answered
        size = self.reference.config.block_size
        _, prompts = loading.load("prompts", cfg.data, cfg.held_out, cfg.max_dropped)
        self.prompts = fit_prompts(self.tokenizer, prompts, size - cfg.max_new_tokens, "held-out prompts")
        self.asked = [p for p in self.prompts for _ in range(cfg.samples)]
        _, demonstrations = loading.load("demonstrations", cfg.demonstrations, "", cfg.max_dropped)
        encoded = encode_demonstrations(self.tokenizer, demonstrations, size, "demonstrations")
        self.demonstrations = self.run.batch([d.ids for d in encoded])
        self.demonstrations["mask"] = pad([d.learn for d in encoded]).to(self.run.device)

    def contestant(self, name, answers, kl, sft_loss):
        """The Contestant that gave these answers. kl: nats per answer from the first model; sft_loss: nats
        per token on held-out demonstrations."""
        texts, more = self.texts(answers), {}
        scores = {role: scorer(self.run, self.asked, texts, answers).tolist()
                  for role, scorer in self.scorers.items()}
        judge, reward = scores.get("judge"), scores.get("reward", [])
        if judge is None:
            judge = [world.judge(prompt, text) for prompt, text in zip(self.asked, texts)]
            families = [world.find(prompt).family for prompt in self.asked]
            more = world.mean_parts(self.asked, texts) | {"families": world.means_by(families, judge)}
        rate, low, high = win_rate(judge, self.first.judge if self.first else judge, self.cfg.samples)
        return Contestant(name, texts, judge, reward, {
            "judge": world.mean(judge), "reward": world.mean(reward) if reward else None,
            "win_rate": round(rate, 4), "win_rate_interval": [round(low, 4), round(high, 4)],
            "kl": round(kl, 3) + 0.0,                               # -0.0 becomes 0.0
            "length": world.mean(answers["mask"].sum(1).tolist()),          # in tokens, with the end token
            "ended": world.mean(answers["ended"].tolist()),
            "distinct2": round(distinct2(texts), 4), "sft_loss": round(sft_loss, 4)} | more)

    def enter(self, number, name, folder):
        """Let a checkpoint answer: a Contestant. number: its own, from 0; it names the sampling noise.

        The KL is the mean of log π − log π_ref over the model's own answers, which is an unbiased estimate of
        KL(π ‖ π_ref) if they are sampled from π itself: at temperature 1, without top_k and top_p."""
        print(f"{folder} answers {len(self.prompts)} prompts {self.cfg.samples} times ...", flush=True)
        model = self.load(folder)
        answers = self.sample(model, self.asked, noise=number)
        log_ratio = self.run.logprobs(model, answers) - self.run.logprobs(self.reference, answers)
        loss = -self.run.logprobs(model, self.demonstrations).sum() / self.demonstrations["mask"].sum()
        entered = self.contestant(name, answers, log_ratio.sum(1).mean().item(), loss.item())
        self.first = self.first or entered
        return entered

    def enter_best_of(self):
        """The first model's answers that the reward model scores highest among n: a Contestant. Its numbers
        hold a curve over n = 1, 2, 4, ..., with the same number of answers for every n, out of one pool."""
        cfg, many, curve = self.cfg, self.cfg.samples * self.cfg.best_of, []
        print(f"best of {cfg.best_of}: {many} answers to each prompt ...", flush=True)
        asked = [prompt for prompt in self.prompts for _ in range(many)]
        answers = self.sample(self.reference, asked, "best_of_n")
        scores = self.scorers["reward"](self.run, asked, self.texts(answers), answers).view(-1, many)
        for n in [*(2 ** i for i in range(10) if 2 ** i < cfg.best_of), cfg.best_of]:
            winners, kl = select(answers, best_of(scores, n, cfg.samples)), best_of_n_kl(n)
            entered = self.contestant("best_of_n", winners, kl, self.first.numbers["sft_loss"])
            curve.append({"n": n, "kl": kl} | {key: entered.numbers[key] for key in ("reward", "judge")})
        entered.numbers |= {"n": n, "curve": curve}
        return entered


# --------------------------------------------------------------------------------------- the report

def read_run(folder):
    """A run's run.json, or {}."""
    try:
        return json.loads(Path(folder, "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def read_steps(folder):
    """The metrics of each step of a run: a list of dicts, empty if the run has none."""
    path = Path(folder, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def seconds(out, checkpoints):
    """Wall-clock seconds of each stage, by its run.json, and in all; time in which stages overlap counts
    once. checkpoints: {name: folder}; the stages before them are looked for in the folder `out`."""
    now, found, folders = time.time(), {}, {"data": f"{out}/world"}
    folders |= {name: f"{out}/{name}" for name in ("sft", "reward_model")} | checkpoints
    spans = [(STARTED, now)]
    for name, run in ((name, read_run(folder)) for name, folder in folders.items()):
        if run.keys() >= {"seconds", "started", "ended"}:
            found[name] = run["seconds"]
            spans.append((run["started"], run["ended"]))
    total, reached = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return found | {"evaluate": round(now - STARTED, 1), "total": round(total, 1)}


def plot(path, measured, runs):
    """Draw the learned reward and the judge's score against √KL: training rollouts as lines, held-out prompts
    as dots, best-of-n as squares. measured: the report; runs: {name: metrics of each step}."""
    def root(numbers):
        return math.sqrt(max(0.0, numbers["kl"]))

    figure, models = Figure(figsize=(10, 4)), measured["models"]
    curve = models.get("best_of_n", {}).get("curve", [])
    column = "judge" if measured["judge"] == "world" else ""                # a rollout knows no other judge
    panels = (("reward", "score", "What training sees: the learned reward"),
              ("judge", column, "What is true: the judge's score"))
    for axis, (key, column, title) in zip(figure.subplots(1, 2, sharex=True), panels):
        for i, (name, steps) in enumerate(runs.items()):
            steps = [s for s in steps if None not in (s.get("kl"), s.get(column))]      # null: not finite
            axis.plot([root(s) for s in steps], [s[column] for s in steps], color=f"C{i}", alpha=0.6)
            if models[name][key] is not None:
                axis.plot(root(models[name]), models[name][key], "o", color=f"C{i}", label=name)
        if curve:
            axis.plot([root(c) for c in curve], [c[key] for c in curve], "s-", color="#555555",
                      markersize=4, label=f"best of n, n up to {curve[-1]['n']}")
        axis.set(xlabel="√KL from the first model, KL in nats per answer", title=title)
        axis.grid(alpha=0.25)
    figure.axes[1].legend(fontsize="small", framealpha=0.6)
    figure.text(0.5, 0.015, "lines: training rollouts, step by step; dots and squares: held-out prompts",
                fontsize=9, color="#666666", ha="center")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)


def write_report(cfg, checkpoints, contestants, prompts):
    """Write report.json, report.md, report.html and the figure; print tables and answers."""
    measured = {"judge": cfg.judge, "prompts": len(prompts), "answers_each": cfg.samples, "seed": cfg.seed,
                "models": {c.name: c.numbers for c in contestants}, "seconds": seconds(cfg.out, checkpoints)}
    if held_out := read_run(cfg.reward).get("held_out"):
        measured["reward_model"] = held_out
    write_json(os.path.join(cfg.out, "report.json"), measured)
    runs, figure = {name: read_steps(folder) for name, folder in checkpoints.items()}, ""
    runs = {name: steps for name, steps in runs.items() if steps and steps[0].keys() >= {"kl", "score"}}
    if Figure and (runs or "best_of_n" in measured["models"]):
        figure = os.path.join(cfg.out, "overoptimization.png")
        plot(figure, measured, runs)
    tables = report.tables(measured["models"])
    facts = report.facts(measured) + report.lessons(measured["models"])
    answers = report.examples(contestants, prompts, cfg.samples, 24)
    rollouts = {name: report.read_rollouts(folder) for name, folder in checkpoints.items()}
    for name, text in (("report.md", report.document(tables, facts, answers, figure)),
                       ("report.html", report.page(tables, facts, answers, rollouts, figure))):
        Path(cfg.out, name).write_text(text, encoding="utf-8", errors="replace")
    shown = report.examples(contestants, prompts, cfg.samples, cfg.show)
    print("\n".join([*report.in_terminal(tables[:2], shown), *facts]))
    print(f"wrote {cfg.out}/report.json and report.md; open {cfg.out}/report.html in a browser")


def evaluate(cfg):
    folders = cfg.models or [f for f in DEFAULT_MODELS if os.path.exists(f"{f}/tokenizer.json")]
    folders = folders or DEFAULT_MODELS[:1]
    for folder in folders:
        find(folder)
    if cfg.judge == "world" and not loading.is_world(cfg.data):
        raise ValueError("the world's judge knows only the world's prompts: name another with --judge")
    checkpoints = named(folders)
    os.makedirs(cfg.out, exist_ok=True)                             # before the work, so that none is lost
    contest, contestants = Contest(cfg, list(checkpoints.values())), []
    for number, (name, folder) in enumerate(checkpoints.items()):
        contestants.append(contest.enter(number, name, folder))
        if number == 0 and "reward" in contest.scorers and cfg.best_of:
            contestants.append(contest.enter_best_of())
    if is_first():
        write_report(cfg, checkpoints, contestants, contest.prompts)
    return contestants


if __name__ == "__main__":
    main(Config, evaluate, __doc__)
