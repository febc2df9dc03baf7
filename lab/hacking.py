"""What a policy does to its reward model, and what stops it, on the embedded world.

    python -m lab.hacking              one seed, some twelve minutes on two cores (make lab)
    python -m lab.hacking --seed 1     another one

Trains PPO without a KL penalty, and under each defence, from one SFT model and one reward model, in
out/lab/<seed>/ (what is there is not run again). Its figure, out/report/overoptimization.png, shows reward
and judge's score of all runs against √KL. Prints a table of the runs, and fits the laws of Gao et al. (2022),
section 3,

    PPO        R(d) = d·(α − β·log d)
    best of n  R(d) = d·(α − β·d)            d = √KL(π ‖ SFT), R: the judge's score above the SFT model's

for two sizes of reward model.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch

import evaluate
from data import loading, report, world
from lab.stages import ROOT, run_stages
from runtime.flags import flag
from runtime.launch import main
from runtime.models import load_reward_model

FREE = "--kl_coef 0 --no-adaptive_kl --steps 60"
RUNS = {                                    # variants.cautious logs the share of answers that are OOD
    "no_defence": f"-m variants.cautious {FREE}",
    "small_reward_model": f"-m variants.cautious {FREE} --reward out/reward_model_small",
    "fixed_kl": "-m variants.cautious --no-adaptive_kl --steps 60",
    "adaptive_kl": "-m variants.cautious --steps 60",
    "ptx": f"-m variants.ppo_ptx {FREE} --ptx_coef 1",
    "ensemble_deviation": f"-m variants.cautious {FREE} --pessimism deviation --pessimism_coef 4",
    "ensemble_worst": f"-m variants.cautious {FREE} --pessimism worst",
    "ood_penalty": f"-m variants.cautious {FREE} --ood_penalty 3",
}
STAGES = {"world": "-m data", "sft": "sft.py", "reward_model": "reward_model.py",
          "sft_small": "sft.py --n_embd 48 --n_layer 2",
          "reward_model_small": "reward_model.py --init out/sft_small", **RUNS,
          "report": f"evaluate.py out/sft {' '.join(f'out/{name}' for name in RUNS)} --samples 8 --show 0"}


@dataclass
class Config:
    seed: int = flag(0, "seed of all runs", 0, 2 ** 31)
    debug: bool = flag(False, "show the traceback of an error")


# ---------------------------------------------------------------------------------------- the table

def smooth(values, width=5):
    """Means over each value and those before it, `width` in all: a step's judge is that of 128 answers."""
    windows = [values[max(0, i + 1 - width):i + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def alarm(steps):
    """The index of the first step in which more than a tenth of the answers is OOD, or None."""
    return next((i for i, s in enumerate(steps) if s.get("ood", 0) > 0.1), None)


def row(name, steps, saved):
    """A run's row of the table. steps: its metrics; saved: the judge's score of its policy."""
    judge, kl, first = smooth([s["judge"] for s in steps]), smooth([s["kl"] for s in steps]), alarm(steps)
    ood = f"{smooth([s['ood'] for s in steps])[-1]:.0%}" if "ood" in steps[0] else "–"
    return [name, f"{max(judge):.2f}", str(judge.index(max(judge)) + 1), f"{kl[-1]:.1f}", ood,
            "–" if first is None else f"step {steps[first]['step']}", f"{saved:.2f}"]


def table(models):
    """One row per run: its highest judge, its last KL and OOD share, all means over five steps on training
    prompts; and the judge of the saved policy on held-out prompts. The last row stops the undefended run at
    the first OOD share above 10 %; its policy's judge is that step's rollout's. models: the report's."""
    rows = [["run", "best judge", "at step", "last KL", "last OOD share", "OOD share first above 10 %",
             "saved policy: judge"]]
    rows += [row(name, evaluate.read_steps(f"out/{name}"), models[name]["judge"]) for name in RUNS]
    steps = evaluate.read_steps("out/no_defence")
    if (first := alarm(steps)) is not None:
        rows.append(row("no_defence, stopped at 10 % OOD", steps[:first + 1], steps[first]["judge"]))
    return [("What holds when the reward is maximised", rows)]


# ------------------------------------------------------------------------------------------ the law

def fit(d, R, decline):
    """(α, β) of R = d·(α − β·decline(d)) by least squares, which is linear in both. d, R: (..., n)."""
    return torch.linalg.lstsq(torch.stack([d, -d * decline(d)], -1), R[..., None]).solution[..., 0]


def in_words(law, draws):
    """(α, β) with their 95 % intervals, from draws (N, 2) of the bootstrap."""
    low, high = draws.quantile(torch.tensor([0.025, 0.975]), dim=0)
    return ", ".join(f"{name} {x:.3f} ({a:.3f} to {b:.3f})" for name, x, a, b in zip("αβ", law, low, high))


def law_of_ppo(steps, start, draws=2000):
    """α and β of a run in words. The bootstrap resamples blocks of five steps, because neighbouring steps are
    alike. start: the judge of the SFT model on training prompts, as the steps have it."""
    steps = [s for s in steps if s["kl"] > 0.01]
    d, R = torch.tensor([s["kl"] for s in steps]).sqrt(), torch.tensor([s["judge"] - start for s in steps])
    first = torch.randint(len(d) - 4, (draws, len(d) // 5), generator=torch.Generator().manual_seed(0))
    some = (first[:, :, None] + torch.arange(5)).flatten(1)
    return in_words(fit(d, R, torch.log), fit(d[some], R[some], torch.log))


def best_of_n_curve(rewards, judge):
    """d (S,) and the judge (P, S) of the best among n = 1, 2, 4, ... answers to each of P prompts: the mean
    over all groups of n. rewards, judge: (P, N)."""
    P, N = rewards.shape
    sizes = [2 ** i for i in range(N.bit_length())]
    won = [judge.flatten()[evaluate.best_of(rewards, n, N // n)].view(P, -1).mean(1) for n in sizes]
    return torch.tensor([evaluate.best_of_n_kl(n) for n in sizes]).sqrt(), torch.stack(won, -1)


def law_of_best_of_n(rewards, judge, draws=2000):
    """α and β of best of n in words. The bootstrap resamples prompts. rewards, judge: (P, N)."""
    d, won = best_of_n_curve(rewards, judge)
    R = won - won[:, :1]
    some = torch.randint(len(R), (draws, len(R)), generator=torch.Generator().manual_seed(0))
    return in_words(fit(d, R.mean(0), torch.clone), fit(d.expand(draws, -1), R[some].mean(1), torch.clone))


def judged_answers(contest, model, prompts, samples, noise):
    """A model's answers to some prompts, and the judge's score of each, (prompts · samples,)."""
    asked = [prompt for prompt in prompts for _ in range(samples)]
    answers = contest.sample(model, asked, noise)
    return answers, torch.tensor([world.judge(*pair) for pair in zip(asked, contest.texts(answers))])


def hack(cfg):
    run_stages(ROOT / f"out/lab/{cfg.seed}", STAGES, cfg.seed)
    models = json.loads(Path("out/report/report.json").read_text("utf-8"))["models"]
    contest = evaluate.Contest(evaluate.Config(seed=cfg.seed), ["out/sft"])
    answers, judge = judged_answers(contest, contest.reference, contest.prompts, 64, "best_of_n")
    prompts, _ = loading.load("prompts", loading.WORLD)
    start = judged_answers(contest, contest.reference, prompts[:1000], 4, "training")[1].mean().item()
    print(f"judge of the SFT model: {judge.mean():.2f} held out, {start:.2f} in training\n")
    print("\n".join(report.markdown(table(models))) + "\n")
    small = load_reward_model("out/reward_model_small").requires_grad_(False)
    contest.run.place(small)
    for size, run, scorer in (("large", "no_defence", contest.scorers["reward"]),
                              ("small", "small_reward_model", small)):
        rewards = contest.run.score(scorer, answers).view(-1, 64)
        print(f"{size} reward model, PPO: {law_of_ppo(evaluate.read_steps(f'out/{run}'), start)}")
        print(f"{size} reward model, best of n: {law_of_best_of_n(rewards, judge.view(-1, 64))}")
    print(f"the figure is {Path('out/report/overoptimization.png').resolve()}")


if __name__ == "__main__":
    main(Config, hack, __doc__)
