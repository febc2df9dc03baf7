"""The hacking lab: what a policy does to its reward model, and what stops it, on the embedded world.

    python -m lab.hacking              one seed, some twelve minutes on two cores (make lab)
    python -m lab.hacking --seed 1     another one

Trains PPO without a KL penalty, and under each defence, from one SFT model and one reward model, in
out/lab/<seed>/ (what is there is not made again). Prints and draws the judge's score against √KL, with
best-of-n; fits the laws of Gao et al. (2022), section 3,

    PPO        R(d) = d·(α − β·log d)
    best of n  R(d) = d·(α − β·d)            d = √KL(π ‖ SFT), R: the judge's score above the SFT model's

for two sizes of reward model; and asks whether distance from the training answers and disagreement of an
ensemble tell, without a judge, which answers please the reward model alone.
"""
import argparse
import math
import os

import torch
from matplotlib.figure import Figure

import evaluate
from data import loading, world
from lab.methods import ROOT, learn
from runtime.compute import select
from runtime.models import load_reward_model
from variants import cautious as uncertainty

FREE = "--kl_coef 0 --no-adaptive_kl --steps 60"
DRAWS = 2000                    # of the bootstrap
# name: (what the figure calls it, colour, flags of ppo.py)
RUNS = {
    "none": ("nothing", "#d62728", FREE),
    "none_small": ("nothing, small reward model", "#ff9896", f"{FREE} --reward out/reward_model_small"),
    "fixed": ("fixed KL penalty", "#17becf", "--no-adaptive_kl --steps 60"),
    "adaptive": ("adaptive KL penalty", "#1f77b4", "--steps 60"),
    "ptx": ("PTX mixing", "#8c564b", f"{FREE} --ptx_coef 1"),
    "deviation": ("ensemble, mean − 4·deviation", "#2ca02c",
                  f"{FREE} --pessimism deviation --pessimism_coef 4"),
    "worst": ("ensemble, worst head", "#98df8a", f"{FREE} --pessimism worst"),
    "ood_penalty": ("OOD penalty", "#9467bd", f"{FREE} --ood_penalty 3"),
    "ood_drop": ("OOD answers dropped", "#e377c2", f"{FREE} --ood_drop"),
    "stop": ("stopped at 10 % OOD", "#ff7f0e", f"{FREE} --stop_ood 0.1"),
}
STAGES = {"sft": "-m data && sft.py", "reward_model": "reward_model.py --ensemble 5",
          "sft_small": "sft.py --n_embd 48 --n_layer 2",
          "reward_model_small": "reward_model.py --init out/sft_small",
          **{name: f"ppo.py {flags}" for name, (_, _, flags) in RUNS.items()}}


def smooth(values, width=5):
    """Means over each step and those before it, `width` in all: one step's judge is that of 128 answers."""
    windows = [values[max(0, i + 1 - width):i + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def smoothed(name):
    """A run's judge, KL and OOD share over its steps: lists. NaN is what its reward model cannot tell."""
    steps = evaluate.read_steps(f"out/{name}")
    return [smooth([s.get(key, math.nan) for s in steps]) for key in ("judge", "kl", "ood")]


# ------------------------------------------------------------------------------------------ the law

def fit(d, R, decline):
    """(α, β) of R = d·(α − β·decline(d)) by least squares: linear in both. d, R: (..., n)."""
    return torch.linalg.lstsq(torch.stack([d, -d * decline(d)], -1), R[..., None]).solution[..., 0]


def in_words(found, draws):
    """α and β (2,), each with the middle 95 % of draws (DRAWS, 2)."""
    low, high = draws.quantile(torch.tensor([0.025, 0.975]), dim=0)
    return ", ".join(f"{name} {x:.3f} ({a:.3f} to {b:.3f})" for name, x, a, b in zip("αβ", found, low, high))


def law_of_ppo(name, start):
    """α and β of a run in words, with intervals by the bootstrap over blocks of five steps, since neighbours
    are alike. start: the judge of the SFT model on training prompts, which these are."""
    steps = [s for s in evaluate.read_steps(f"out/{name}") if s["kl"] > 0.01]
    d, R = torch.tensor([s["kl"] for s in steps]).sqrt(), torch.tensor([s["judge"] - start for s in steps])
    first = torch.randint(len(d) - 4, (DRAWS, len(d) // 5), generator=torch.Generator().manual_seed(0))
    some = (first[:, :, None] + torch.arange(5)).flatten(1)
    return in_words(fit(d, R, torch.log), fit(d[some], R[some], torch.log))


def law_of_best_of_n(rewards, judged):
    """α and β of best of n in words, with intervals by the bootstrap over prompts; and (d, judge) for n = 1,
    2, 4, ... Both (prompts, answers)."""
    P, many = rewards.shape
    sizes = [2 ** i for i in range(int(math.log2(many)) + 1)]
    d = torch.tensor([evaluate.best_of_n_kl(n) for n in sizes]).sqrt()
    won = []                                    # the judge of the winners among n, a mean for each prompt
    for n in sizes:
        best = rewards.view(P, -1, n).argmax(-1, keepdim=True)
        won.append(judged.view(P, -1, n).gather(-1, best).mean((1, 2)))
    won = torch.stack(won, -1)                                                              # (prompts, sizes)
    R = won - won[:, :1]
    some = torch.randint(P, (DRAWS, P), generator=torch.Generator().manual_seed(0))
    draws = fit(d.expand(DRAWS, -1), R[some].mean(1), torch.clone)
    return in_words(fit(d, R.mean(0), torch.clone), draws), list(zip(d.tolist(), won.mean(0).tolist()))


# ----------------------------------------------------------------------------------------- answers

def answer(together, model, prompts, samples, noise):
    """A model's answers to some prompts, and the judge's score of each, (prompts · samples,)."""
    asked = [prompt for prompt in prompts for _ in range(samples)]
    found = together.answers(model, asked, noise)
    return found, torch.tensor([world.judge(*pair) for pair in zip(asked, together.texts(found))])


def auroc(signal, positive):
    """The chance that the signal is higher for one drawn from the positive than for one from the others."""
    above = signal[positive][:, None] - signal[~positive][None]
    return ((above > 0).float() + 0.5 * (above == 0)).mean().item()


def detect(together, start):
    """Among answers of the policy that nothing held back, those that the reward model likes better than the
    SFT model's average: do its own signals tell the ones that the judge likes less? Prints how well."""
    answers, judged = answer(together, together.network("out/none"), together.prompts, 8, "none")

    def read(rows):
        b = select(answers, rows)
        found = uncertainty.score(together.scorer, b["tokens"], b["lengths"])
        return {"distance": found["distance"], "disagreement": found["heads"].std(1)}
    found = together.compute.map(read, range(len(judged)), answers["lengths"])
    found["reward itself"] = torch.tensor(together.scores(together.scorer, answers))
    liked = found["reward itself"] > 0
    hacked = judged[liked] < start
    print("\nthe last policy without a defence, answers that the reward model likes:")
    print(f"  answers: {len(hacked)}\n  of which hacked: {hacked.float().mean():.2f}")
    for name, signal in found.items():
        print(f"  AUROC of {name}: {auroc(signal[liked], hacked):.2f}")


# ------------------------------------------------------------------------------------- all together

def draw(path, curve):
    figure = Figure(figsize=(8, 5))
    axis = figure.subplots()
    for name, (label, colour, _) in RUNS.items():
        judge, kl, _ = smoothed(name)
        d = [math.sqrt(max(0, x)) for x in kl]
        axis.plot(d, judge, color=colour, label=label, linewidth=1.6)
        axis.plot(d[-1], judge[-1], "o", color=colour, markersize=4)
    axis.plot(*zip(*curve), "s-", color="#555555", markersize=4, label="best of n")
    axis.set(xlabel="√KL(π ‖ SFT), KL in nats per answer", ylabel="judge's score of the answers",
             title="What holds when the reward is climbed")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def table(together):
    """Of each run: the best judge on the way, KL and OOD share at the end, means over five steps of training
    answers; the first step of which more than a tenth of the answers is OOD; and the judge of the policy that
    it saved, on held-out prompts."""
    heads = ["defence", "best judge", "at step", "last KL", "last OOD share", "OOD share first above 10 %",
             "saved policy: judge"]
    rows = [heads, ["---"] * len(heads)]
    for name, (label, _, _) in RUNS.items():
        judge, kl, ood = smoothed(name)
        alarms = [s["step"] for s in evaluate.read_steps(f"out/{name}") if s.get("ood", 0) > 0.1]
        saved = answer(together, together.network(f"out/{name}"), together.prompts, 8, name)[1].mean()
        rows.append([label, f"{max(judge):.2f}", str(judge.index(max(judge)) + 1), f"{kl[-1]:.1f}",
                     "–" if math.isnan(ood[-1]) else f"{ood[-1]:.0%}", f"step {alarms[0]}" if alarms else "–",
                     f"{saved:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", default="", help="file of the figure; none is lab.png beside the runs")
    args = parser.parse_args()
    figure = args.figure and os.path.abspath(args.figure)
    learn(ROOT / f"out/lab/{args.seed}", STAGES, args.seed)
    together = evaluate.Contest(evaluate.Config(seed=args.seed), "out/sft")
    answers, judged = answer(together, together.reference, together.prompts, 64, "best_of_n")
    start = judged.mean().item()
    prompts, _ = loading.load("prompts", loading.WORLD)
    in_training = answer(together, together.reference, prompts[:1000], 4, "training")[1].mean().item()
    print(f"judge of the SFT model: {start:.2f} held out, {in_training:.2f} in training\n")
    print(table(together) + "\n")
    small = load_reward_model("out/reward_model_small").requires_grad_(False)
    together.compute.place(small)
    for size, name, scorer in (("", "none", together.scorer), ("small ", "none_small", small)):
        rewards = torch.tensor(together.scores(scorer, answers)).view(-1, 64)
        law, curve = law_of_best_of_n(rewards, judged.view(-1, 64))
        if scorer is together.scorer:
            draw(figure or "lab.png", curve)
        print(f"{size}reward model, PPO: {law_of_ppo(name, in_training)}")
        print(f"{size}reward model, best of n: {law}")
    detect(together, start)


if __name__ == "__main__":
    main()
