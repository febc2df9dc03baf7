"""Ways to learn from preferences, side by side on the embedded world, from the same SFT model and labels.

    python -m lab.methods                       ten of them on three seeds, and the table
    python -m lab.methods ppo gspo --seeds 1    some, also of those that docs/variants.md compares

Commands run in out/methods/<seed>/, each of them once. The table shows the worst of the seeds in each column,
because a method has to work on a bad seed too. All methods learn from 10,000 rankings of four answers: the
world's, through a reward model or not, or as many of fresh answers. docs/choosing.md draws the conclusions.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import evaluate
from data.report import markdown
from lab.stages import ROOT, run_stages
from runtime.flags import flag
from runtime.launch import main

BASE = {"world": "-m data", "sft": "sft.py", "reward_model": "reward_model.py"}
COLLECT = "-m feedback.collect --overwrite --by out/reward_model"
METHODS = {                                 # {name: {folder in out/: command}}
    "rejection": {"picked": f"{COLLECT} --prompts 4000 --answers 9",
                  "rejection": "sft.py --init out/sft --data out/picked/preferences.jsonl --lr 5e-4"},
    "dpo": {"dpo": "dpo.py --nll_coef 2"},
    "dpo_alone": {"dpo_alone": "dpo.py --beta 1"},
    "dpo_ai": {"ai": f"{COLLECT} --prompts 10000",
               "dpo_ai": "dpo.py --nll_coef 2 --data out/ai/preferences.jsonl "
                         "--held_out out/world/preferences_heldout.jsonl"},
    "dpo_online": {"dpo_online": "-m variants.online_dpo --nll_coef 2"},
    "ppo": {"ppo": "ppo.py"},
    "rloo": {"rloo": "-m variants.grpo --advantage rloo"},
    "grpo": {"grpo": "-m variants.grpo"},
    "dr_grpo": {"dr_grpo": "-m variants.grpo --no-divide_by_std --no-divide_by_length"},
    "ppo_no_kl": {"ppo_no_kl": "ppo.py --kl_coef 0 --no-adaptive_kl --steps 60"},
}
SINCE = {                                   # the same for docs/variants.md
    **{loss: {loss: f"-m variants.preferences --loss {loss}"}
       for loss in ("simpo", "orpo", "kto", "nca", "robust")},
    "reinforce_pp": {"reinforce_pp": "-m variants.reinforce_pp"},
    "gspo": {"gspo": "-m variants.gspo"},
    "cispo": {"cispo": "-m variants.cispo"},
    "dapo": {"dapo": "-m variants.dapo"},
    "distill": {"teacher": "ppo.py", "distill": "-m variants.distill --teacher out/teacher"},
    "lag_1": {"lag_1": "-m variants.lagged"},
    "lag_4": {"lag_4": "-m variants.lagged --lag 4"},
    "lag_4_uncorrected": {"lag_4_uncorrected": "-m variants.lagged --lag 4 --no-correct"},
}
ALL = METHODS | SINCE
COLUMNS = {                                 # {head: (key, format, worst)}
    "judge": ("judge", ".2f", min), "wins": ("win_rate", ".1%", min), "KL": ("kl", ".1f", max),
    "length": ("length", ".0f", max), "ended": ("ended", ".0%", min), "seconds": ("seconds", ".0f", max),
    "memory (GB)": ("memory", ".1f", max)}


@dataclass
class Config:
    names: tuple = flag((), f"some of {', '.join(ALL)}; none takes the first {len(METHODS)}")
    seeds: int = flag(3, "number of seeds: 0, 1, ...", 1)
    debug: bool = flag(False, "show the traceback of an error")

    def __post_init__(self):
        self.names = self.names or tuple(METHODS)
        if unknown := set(self.names) - set(ALL):
            raise ValueError(f"{min(unknown)} is none of {', '.join(ALL)}")


def measure(seed, names):
    """Run methods on one seed: {name: its numbers in the report, with its "seconds" and "memory" in GB}."""
    stages = dict(BASE)
    for name in names:
        stages |= ALL[name]
    models, report = " ".join(f"out/{name}" for name in ("sft", *names)), f"report_{'_'.join(names)}"
    stages[report] = f"evaluate.py {models} --show 0"
    seconds = run_stages(ROOT / f"out/methods/{seed}", stages, seed)
    found = json.loads(Path(f"out/{report}/report.json").read_text("utf-8"))["models"]
    for name in names:
        found[name]["memory"] = evaluate.read_run(f"out/{name}")["peak_memory"] / 1e9
        found[name]["seconds"] = sum(seconds[part] for part in ALL[name])
    return found


def compare(cfg):
    seeds = [measure(seed, cfg.names) for seed in range(cfg.seeds)]
    rows = [["method", *COLUMNS]]
    for name in seeds[0]:
        rows.append([name, *(format(worst(models[name].get(key, 0) for models in seeds), form)
                             for key, form, worst in COLUMNS.values())])
    print("\n".join(markdown([(f"The worst of {cfg.seeds} seeds", rows)])))


if __name__ == "__main__":
    main(Config, compare, __doc__)
