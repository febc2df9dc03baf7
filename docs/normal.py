"""Is this normal? Ten curves of healthy runs on the embedded world, and a run of your own over them.

    python -m docs.normal --run out/demo/ppo            a run of any stage, over the curves of its stage
    python -m docs.normal --out docs/normal.png         all ten, from the numbers in docs/normal.json
    python -m docs.normal --seeds out/seeds/0,out/seeds/1,out/seeds/2       these numbers, after `make seeds`

Needs matplotlib. Runs have different numbers of steps. So each is cut into 27 equal parts (one or two steps
of PPO, by default), and a point is the mean over one part. A band is from the lowest to the highest seed.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import evaluate
from runtime.files import write_json
from runtime.flags import flag
from runtime.launch import main

HERE = Path(__file__).parent
PARTS = 27
CURVES = [                                              # (stage, metric, note under the title)
    ("sft", "loss", "starts near log V = 6.9, falls"),
    ("reward_model", "loss", "starts a little above log 2 = 0.69"),
    ("reward_model", "best_beats_worst", "starts near 0.5"),
    ("dpo", "margin", "starts at 0, rises"),
    ("dpo", "logp_chosen", "falls by a nat or two"),
    ("ppo", "score", "rises fast, then slowly"),
    ("ppo", "kl", "starts at 0, ends near --kl_target (3.5)"),
    ("ppo", "entropy", "falls, but not to 0"),
    ("ppo", "explained_variance", "rises towards 1"),
    ("ppo", "clip_fraction", "a few per cent"),
]


@dataclass
class Config:
    run: str = flag("", "folder of a run to draw over the curves of its stage")
    seeds: str = flag("", "folders of demo.py, with commas between them, to take the numbers from")
    out: str = flag("out/normal.png", "the figure's file")
    debug: bool = flag(False, "show the traceback of an error")


def parts_of(steps, metric):
    """The mean of a metric in each of the PARTS of a run; None in a part without a value."""
    parts = [[] for _ in range(PARTS)]
    for i, step in enumerate(steps):
        if step.get(metric) is not None:
            parts[i * PARTS // len(steps)].append(step[metric])
    return [sum(values) / len(values) if values else None for values in parts]


def bands_of(folders):
    """{"stage metric": (PARTS, 3): lowest, mean and highest value of the runs in these folders, or None}."""
    found = {}
    for stage, metric, _ in CURVES:
        each = [parts_of(steps_of(f"{folder}/{stage}"), metric) for folder in folders]
        found[f"{stage} {metric}"] = [
            None if None in some else [round(x, 5) for x in (min(some), sum(some) / len(some), max(some))]
            for some in zip(*each)]
    return found


def steps_of(folder):
    steps = evaluate.read_steps(folder)
    if not steps:
        raise ValueError(f"{folder} has no metrics.jsonl, or an empty one")
    return steps


def drawn(values):
    """(share of the run, value) of those parts that have a value, as two lists."""
    points = [((i + 0.5) / PARTS, value) for i, value in enumerate(values) if value is not None]
    return [x for x, _ in points], [value for _, value in points]


def draw(cfg):
    if evaluate.Figure is None:
        raise ValueError("matplotlib is not installed: pip install matplotlib")
    if cfg.seeds:
        write_json(str(HERE / "normal.json"), bands_of(cfg.seeds.split(",")))
    bands = json.loads((HERE / "normal.json").read_text("utf-8"))
    own = steps_of(cfg.run) if cfg.run else []
    stage = evaluate.read_run(cfg.run).get("stage", "").removesuffix(".py") if own else ""
    if own and stage not in {name for name, _, _ in CURVES}:                    # a variant
        stage = "dpo" if any("logp_chosen" in step for step in own) else "ppo"
    curves = [(name, metric, note) for name, metric, note in CURVES
              if not own or name == stage and any(metric in step for step in own)]
    if not curves:
        raise ValueError(f"{cfg.run} logs none of the curves that are drawn here")
    rows = 1 if own else 2
    columns = math.ceil(len(curves) / rows)
    figure = evaluate.Figure(figsize=(3.4 * columns, 3.2 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (name, metric, note) in zip(axes, curves):
        xs, values = drawn(bands[f"{name} {metric}"])
        low, mean, high = zip(*values)
        axis.fill_between(xs, low, high, alpha=0.3)
        axis.plot(xs, mean, label=f"{name} on the world, three seeds")
        if own:
            axis.plot(*drawn(parts_of(own, metric)), label=cfg.run)
        axis.set_title(f"{name}: {metric}\n{note}", fontsize="medium")
        axis.grid(alpha=0.25)
    figure.supxlabel("fraction of the run")
    figure.axes[0].legend(fontsize="small")
    figure.tight_layout()
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(cfg.out, dpi=110)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    main(Config, draw, __doc__)
