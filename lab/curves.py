"""Draw metrics of several runs over their steps.

    python -m lab.curves out/follow/seed0/ppo out/follow/seed0/grpo --metrics score_kept,kl,length

Needs matplotlib. The metrics are the names in the runs' metrics.jsonl.
"""
from dataclasses import dataclass

import evaluate
from runtime.flags import flag
from runtime.launch import main


@dataclass
class Config:
    runs: tuple = flag((), "folders of runs")
    metrics: str = flag("score", "names of metrics, with commas between them: one panel for each")
    smooth: int = flag(1, "steps in the running mean: each point is the mean of the last so many", 1)
    out: str = flag("out/curves.png", "the figure's file")
    debug: bool = flag(False, "show the traceback of an error")


def smoothed(values, n):
    """The running mean over n values of a list: one for each value but the first n − 1."""
    return [sum(values[i:i + n]) / n for i in range(len(values) - n + 1)]


def curve(name, steps, metric, n):
    """(steps, values) of a run's metric. Raises ValueError if the run has no such metric."""
    points = [(step["step"], step[metric]) for step in steps if step.get(metric) is not None]
    if not steps:
        raise ValueError(f"{name} has no metrics.jsonl, or an empty one")
    if not points:
        raise ValueError(f"{name} has no metric {metric}: its metrics are {', '.join(steps[-1])}")
    n = min(n, len(points))
    return [step for step, _ in points[n - 1:]], smoothed([value for _, value in points], n)


def draw(cfg):
    if evaluate.Figure is None:
        raise ValueError("matplotlib is not there: pip install matplotlib")
    if not cfg.runs:
        raise ValueError("name folders of runs")
    metrics = [name.strip() for name in cfg.metrics.split(",")]
    runs = {name: evaluate.read_steps(folder) for name, folder in evaluate.named(cfg.runs).items()}
    figure = evaluate.Figure(figsize=(4.2 * len(metrics), 3.6))
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        for name, steps in runs.items():
            axis.plot(*curve(name, steps, metric, cfg.smooth), label=name)
        axis.set(xlabel="step", title=metric)
        axis.grid(alpha=0.25)
    figure.axes[0].legend(fontsize="small", framealpha=0.6)
    figure.tight_layout()
    figure.savefig(cfg.out, dpi=150)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    main(Config, draw, __doc__)
