"""Put checkpoints side by side on held-out prompts, or talk to one.

    python evaluate.py                                        all that out/ holds: sft, best_of_n, dpo, ppo, ppo_no_kl
    python evaluate.py out/sft out/mine --judge out/reward_model --data prompts.jsonl
    python evaluate.py out/ppo --chat

Each model answers every prompt a few times, by sampling. The first is the one to beat, and the reference of the KL.
Prints a table and some answers next to each other; writes out/report.json, out/report.md and, if matplotlib is
installed, out/overoptimization.png: the learned reward and the judge's score against √KL, as in Gao et al. (2022).
"""
import json
import math
import os
from dataclasses import dataclass, field

import torch

import parallel
import runtime
from data import loading, world
from data.tokenizer import Tokenizer
from model import GPT
from flags import Settings, flag

try:                                        # an extra: pip install matplotlib
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    plt = None


@dataclass
class Config(Settings):
    models: tuple = flag((), "checkpoint folders; none takes what there is of out/sft, out/dpo, out/ppo, out/ppo_no_kl")
    out: str = flag("out", "folder of the report")
    data: str = flag("world", "prompts: world (its held-out ones), or a file")
    judge: str = flag("world", "world, or a reward model's folder")
    reward: str = flag("out/reward_model", "reward model that scores, and that picks the best of n")
    demonstrations: str = flag("world", "held-out demonstrations for the alignment tax: world, or a file")
    samples: int = flag(3, "answers to each prompt", 1)
    best_of: int = flag(16, "n of best-of-n, drawn from the first model; 0 leaves it out", 0)
    temperature: float = flag(1.0, "of sampling; 0 is greedy", 0)
    max_new_tokens: int = flag(64, "longest answer, in tokens", 1)
    micro_batch: int = flag(256, "answers a forward pass", 1)
    show: int = flag(6, "prompts whose answers are printed next to each other", 0)
    chat: bool = flag(False, "talk to the (first) model in the terminal; an empty line starts anew, Ctrl-D ends")


@dataclass
class Contestant:
    """A model's answers to P prompts, N times each; all lists run over prompt 0's answers, then prompt 1's, ..."""
    name: str
    texts: list
    lengths: list                           # tokens, <|im_end|> included
    ended: list                             # bools
    reward: list                            # the reward model's score, or empty
    kl: float                               # nats an answer from the first model
    sft_loss: float                         # nats a token on held-out demonstrations
    judge: list = field(default_factory=list)


# ---------------------------------------------------------------------------------------- answers and scores

@torch.no_grad()
def answer(cfg, model, reference, tokenizer, prompts, n, salt):
    """n sampled answers to each prompt (ids): rows (ids of prompt and answer), starts, ended, and without a reference 0
    for kl, each a list."""
    rows, starts, ended, kl = [], [], [], []
    jobs = sorted(((len(p), i, j) for i, p in enumerate(prompts) for j in range(n)))    # neighbours in length
    order = [i * n + j for _, i, j in jobs]
    for part, live in parallel.micro_batches(jobs, cfg.micro_batch):
        lengths = torch.tensor([length for length, _, _ in part], device=model.device)
        seeds = torch.tensor([(i * n + j) * 1000 + salt + 10 ** 9 * cfg.seed for _, i, j in part], device=model.device)
        with parallel.gathered(model) as anyone:
            tokens, mask, logprobs = model.generate(
                loading.pad([prompts[i] for _, i, _ in part]).to(model.device), lengths, cfg.max_new_tokens, cfg.temperature,
                stop_token=tokenizer.end, seeds=seeds, anyone=anyone)
        if cfg.temperature not in (0, 1):                       # the KL speaks of the models as they are
            logprobs = model.logprobs(tokens, mask)
        kl += (logprobs - (reference.logprobs(tokens, mask) if reference else logprobs)).sum(1).tolist() * live
        for row, length, size in zip(tokens.tolist(), lengths.tolist() * live, mask.sum(1).tolist()):
            rows.append(row[:length + size])
            starts.append(length)
            ended.append(rows[-1][-1] == tokenizer.end)
    back = sorted(range(len(order)), key=order.__getitem__)
    return tuple([values[i] for i in back] for values in map(parallel.gather, (rows, starts, ended, kl)))


@torch.no_grad()
def rewards(cfg, model, rows):
    """The reward model's score of each row of ids, a list."""
    order, scores = sorted(range(len(rows)), key=lambda i: len(rows[i])), []
    for part, live in parallel.micro_batches(order, cfg.micro_batch):
        last = torch.tensor([len(rows[i]) - 1 for i in part], device=model.device)
        scores += model(loading.pad([rows[i] for i in part]).to(model.device)).gather(1, last[:, None])[:, 0].tolist() * live
    found = dict(zip(order, parallel.gather(scores)))
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def sft_loss(cfg, model, examples):
    """Mean −log p a token on what the assistant says in held-out demonstrations, in nats."""
    total = count = 0
    examples = sorted(examples, key=lambda e: len(e[0]))
    for rows, live in parallel.micro_batches(examples, cfg.micro_batch):
        ids, learn = zip(*rows)
        mask = loading.pad(learn).to(model.device)
        total -= live * model.logprobs(loading.pad(ids).to(model.device), mask).sum().item()
        count += live * mask.sum().item()
    return parallel.total(total) / parallel.total(count)


def distinct2(texts):
    """Different word pairs as a share of all word pairs (Li et al. 2016): low when a model says one thing over and over."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:])]
    return len(set(pairs)) / max(1, len(pairs))


def win_rate(mine, theirs, n, resamples=2000):
    """How often mine scores above theirs, a tie counting half, answer by answer: (rate, low, high), with a 95 %
    interval by the bootstrap over prompts (n answers each), since answers to one prompt are alike."""
    wins = torch.tensor([(a > b) + 0.5 * (a == b) for a, b in zip(mine, theirs)]).view(-1, n).mean(1)
    picks = torch.randint(len(wins), (resamples, len(wins)), generator=torch.Generator().manual_seed(0))
    low, high = wins[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return wins.mean().item(), low, high


def best_of(pool, n, keep):
    """From pool[p], the (reward, index) of many answers to prompt p: `keep` winners among n each, as indices."""
    return [max(answers[k * n:(k + 1) * n])[1] for answers in pool for k in range(keep)]


# ---------------------------------------------------------------------------------------- the report

def table(report):
    """The report's models as lines of Markdown."""
    lines = ["| model | judge | wins against the first | reward | KL (nats) | length | ended | distinct-2 | SFT loss |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, m in report["models"].items():
        low, high = m["win_rate_interval"]
        reward = "–" if m["reward"] is None else f"{m['reward']:.2f}"
        lines.append(f"| {name} | {m['judge']:.2f} | {m['win_rate']:.1%} ({low:.1%} to {high:.1%}) | {reward} | {m['kl']:.1f} "
                     f"| {m['length']:.1f} | {m['ended']:.0%} | {m['distinct2']:.2f} | {m['sft_loss']:.2f} |")
    return lines


def seconds(out, names):
    """Wall-clock seconds of each stage from its run.json, and of all together; stages that overlap count once."""
    spans, found = [], {}
    for name in ("world", "sft", "reward_model", *names):
        try:
            with open(os.path.join(out, name, "run.json"), encoding="utf-8") as f:
                about = json.load(f)
            found["data" if name == "world" else name] = about["seconds"]
            spans.append((about["started"], about["ended"]))
        except (OSError, ValueError, KeyError):
            continue
    now = runtime.time.time()
    found["evaluate"] = round(now - runtime.STARTED, 1)
    total, reached = 0.0, 0.0
    for start, end in sorted([*spans, (runtime.STARTED, now)]):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return found | {"total": round(total, 1)}


def side_by_side(contestants, prompts, n, count):
    """Lines of Markdown: the first answer of each contestant to `count` prompts spread over all of them."""
    lines = []
    for i in range(0, len(prompts), max(1, len(prompts) // count))[:count] if count else ():
        lines += ["", "**" + "** / **".join(m["content"] for m in prompts[i] if m["role"] == "user") + "**", ""]
        lines += [f"- {c.name} ({c.judge[i * n]:.2f}): {c.texts[i * n]}" for c in contestants]
    return lines


def plot(path, out, report, curve):
    """Both scores against √KL: PPO's rollouts step by step, and best-of-n. One line a run, the same colour in both."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    for name, colour, label in (("ppo", "#1f77b4", "PPO, adaptive KL"), ("ppo_no_kl", "#d62728", "PPO, no KL penalty")):
        metrics = os.path.join(out, name, "metrics.jsonl")
        if name in report["models"] and os.path.exists(metrics):
            with open(metrics, encoding="utf-8") as f:
                steps = [json.loads(line) for line in f]
            root = [math.sqrt(max(0.0, s["kl"])) for s in steps]
            for axis, key in zip(axes, ("score", "judge")):
                if key in steps[0]:
                    axis.plot(root, [s[key] for s in steps], color=colour, alpha=0.6, linewidth=1.2)
                m = report["models"][name]
                axis.plot(math.sqrt(max(0.0, m["kl"])), m["reward" if key == "score" else "judge"], "o", color=colour, label=label)
    for axis, key in zip(axes, ("reward", "judge")):
        if curve:
            axis.plot([math.sqrt(c["kl"]) for c in curve], [c[key] for c in curve], "s-", color="#555555", markersize=4,
                      label=f"best of n, n up to {curve[-1]['n']}")
        axis.set_xlabel("√KL(π ‖ SFT), nats an answer")
        axis.grid(alpha=0.25)
    axes[0].set_title("What PPO sees: the learned reward")
    axes[1].set_title("What is true: the judge's score")
    axes[0].legend(frameon=False)
    figure.text(0.5, 0.015, "lines: training rollouts, step by step; dots and squares: held-out prompts", fontsize=9,
                color="#666666", ha="center")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------------------------- talking

@torch.no_grad()
def chat(cfg, folder):
    """A conversation in the terminal: each turn sees those before it, as far as they fit."""
    tokenizer, model, messages = Tokenizer.load(folder), GPT.load(folder, device=runtime.pick_device(cfg.device)), []
    print(f"talking to {folder}; an empty line starts anew, Ctrl-D ends")
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            print()
            return
        if not text:
            messages = []
            continue
        messages.append({"role": "user", "content": text})
        ids = tokenizer.prompt(messages)
        if len(ids) >= model.config.block_size:
            print("(this is longer than the model can read: starting anew)")
            messages = []
            continue
        room = min(cfg.max_new_tokens, model.config.block_size - len(ids))
        tokens, mask, _ = model.generate(torch.tensor([ids], device=model.device), torch.tensor([len(ids)], device=model.device),
                                         room, cfg.temperature, stop_token=tokenizer.end)
        messages.append({"role": "assistant", "content": tokenizer.decode(tokens[0][mask[0]].tolist())})
        print(f"{os.path.basename(folder)}> {messages[-1]['content']}")


# ---------------------------------------------------------------------------------------- all together

def contest(cfg, folders):
    """Let every checkpoint answer, and score the answers: (contestants, prompts, best-of-n curve)."""
    device = runtime.pick_device(cfg.device)

    def load(folder):
        net = parallel.load(folder).requires_grad_(False)
        return parallel.spread(net, parallel.choose(cfg.parallel, [net] * 4, device), device)      # four are there at once

    tokenizer, reference = Tokenizer.load(folders[0]), load(folders[0])
    prompts = loading.fit(loading.load("prompts", cfg.data)[1], lambda p: len(tokenizer.prompt(p)),
                          reference.config.block_size - cfg.max_new_tokens, "held-out prompts")
    ids = [tokenizer.prompt(p) for p in prompts]
    examples = [tokenizer.chat(m) for m in loading.load("demonstrations", cfg.demonstrations)[1]]
    examples = loading.fit(examples, lambda e: len(e[0]), reference.config.block_size, "held-out demonstrations")
    scorer = load(cfg.reward) if os.path.exists(cfg.reward) else None
    judge_net = load(cfg.judge) if cfg.judge != "world" else None
    for folder, net in ((cfg.reward, scorer), (cfg.judge, judge_net)):
        if net is not None:
            runtime.require_reward_model(folder, net, tokenizer)
    contestants, curve, n = [], [], cfg.samples

    def add(name, rows, starts, ended, kl, loss):
        texts = [tokenizer.decode(row[start:]) for row, start in zip(rows, starts)]
        c = Contestant(name, texts, [len(r) - s for r, s in zip(rows, starts)], ended,
                       rewards(cfg, scorer, rows) if scorer else [], kl, loss)
        c.judge = (rewards(cfg, judge_net, rows) if judge_net else
                   [world.judge(prompts[i // n], text) for i, text in enumerate(texts)])
        contestants.append(c)
        return c

    for k, folder in enumerate(folders):
        model = load(folder)
        print(f"{folder} answers {len(ids)} prompts {n} times ...", flush=True)
        rows, starts, ended, kl = answer(cfg, model, reference, tokenizer, ids, n, salt=k)
        add(os.path.basename(os.path.normpath(folder)), rows, starts, ended, sum(kl) / len(kl), sft_loss(cfg, model, examples))
        if k == 0 and scorer and cfg.best_of:
            many = n * cfg.best_of
            print(f"best of {cfg.best_of}: {many} answers to each prompt ...", flush=True)
            rows, starts, ended, _ = answer(cfg, model, None, tokenizer, ids, many, salt=999)
            scores = rewards(cfg, scorer, rows)
            pool = [[(scores[i], i) for i in range(p * many, (p + 1) * many)] for p in range(len(ids))]
            size = 1
            while size <= cfg.best_of:                          # n answers to each prompt at every size
                won = best_of(pool, size, n)
                c = add("best_of_n", [rows[i] for i in won], [starts[i] for i in won], [ended[i] for i in won],
                        math.log(size) - (size - 1) / size, contestants[0].sft_loss)    # KL: Stiennon et al. 2020
                curve.append({"n": size, "kl": c.kl, "reward": sum(c.reward) / len(c.reward), "judge": sum(c.judge) / len(c.judge)})
                size *= 2
                if size <= cfg.best_of:
                    contestants.pop()                           # only the largest n competes
    return contestants, prompts, curve


def evaluate(cfg):
    if cfg.chat:
        folder = cfg.models[0] if cfg.models else "out/ppo"
        runtime.require(folder, os.path.basename(folder))
        return chat(cfg, folder)
    folders = list(cfg.models) or [f for f in ("out/sft", "out/dpo", "out/ppo", "out/ppo_no_kl") if os.path.exists(f"{f}/config.json")]
    for folder in folders or ["out/sft"]:
        runtime.require(folder, os.path.basename(folder))
    if cfg.judge == "world" and cfg.data != "world":
        raise ValueError("the world's judge knows the world's prompts alone: name a reward model with --judge")
    os.makedirs(cfg.out, exist_ok=True)                         # before the work, so that none is lost
    contestants, prompts, curve = contest(cfg, folders)
    if parallel.rank():                                         # the first process writes
        return

    def mean(values):
        return round(sum(values) / len(values), 4) if values else None

    report = {"judge": cfg.judge, "prompts": len(prompts), "answers_each": cfg.samples, "seed": cfg.seed, "models": {}}
    for c in contestants:
        rate, low, high = win_rate(c.judge, contestants[0].judge, cfg.samples)
        report["models"][c.name] = {
            "judge": mean(c.judge), "reward": mean(c.reward), "win_rate": round(rate, 4),
            "win_rate_interval": [round(low, 4), round(high, 4)], "kl": round(c.kl, 3) + 0.0, "length": mean(c.lengths),
            "ended": mean(c.ended), "distinct2": round(distinct2(c.texts), 4), "sft_loss": round(c.sft_loss, 4)}
        if c.name == "best_of_n":
            report["models"][c.name] |= {"n": cfg.best_of, "curve": curve}
    try:
        with open(os.path.join(cfg.reward, "run.json"), encoding="utf-8") as f:
            report["reward_model"] = json.load(f)["held_out"]
    except (OSError, ValueError, KeyError):
        pass
    drawn = bool(plt and curve)
    if drawn:
        plot(os.path.join(cfg.out, "overoptimization.png"), cfg.out, report, curve)
    report["seconds"] = seconds(cfg.out, [c.name for c in contestants[1:]])
    runtime.write_json(os.path.join(cfg.out, "report.json"), report)
    rm, took = report.get("reward_model", {}), report["seconds"]
    facts = [f"{len(prompts)} held-out prompts, {cfg.samples} answers each, judged by {cfg.judge}."]
    if "accuracy" in rm:
        facts.append(f"Reward model: {rm['accuracy']:.1%} of {rm['pairs']} held-out pairs"
                     + (f"; the best any scorer could reach is {rm['ceiling']:.1%}." if "ceiling" in rm else "."))
    facts.append("Seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in took.items()) + ".")
    lines = table(report) + [""] + facts
    with open(os.path.join(cfg.out, "report.md"), "w", encoding="utf-8") as f:
        image = ["", "![learned reward and judge's score against √KL](overoptimization.png)"] if drawn else []
        f.write("\n".join(["# Report", "", *lines, *image, "", "## Side by side",
                           *side_by_side(contestants, prompts, cfg.samples, 24)]) + "\n")
    print("\n".join(side_by_side(contestants, prompts, cfg.samples, cfg.show)))
    print("\n" + "\n".join(lines) + f"\nwrote {cfg.out}/report.json and report.md" + (" and overoptimization.png" if drawn else ""))


if __name__ == "__main__":
    runtime.main(Config, evaluate, __doc__)
