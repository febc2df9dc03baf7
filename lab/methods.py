"""Ways to learn from preferences, side by side on the embedded world, from the same SFT model and labels.

    python -m lab.methods                       all of them on three seeds, and the table
    python -m lab.methods ppo rloo --seeds 0    some of them

Each method is a line of commands below, run in out/methods/<seed>/, and not again if its model is there.
Prints the worst of the seeds in each column: a method is as good as it is on a bad day. All learn from
10,000 rankings of four answers: the world's, through a reward model or not, or as many of fresh answers.
docs/choosing.md says what follows from the table.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from runtime.files import write_json

ROOT = Path(__file__).resolve().parent.parent
BASE = {"sft": "-m data && sft.py", "reward_model": "reward_model.py"}
# name: (commands, networks held while it learns, answers that are sampled to learn from)
METHODS = {
    "rejection": ("-m feedback.collect --by out/reward_model --prompts 4000 --answers 9 --out out/picked && "
                  "sft.py --init out/sft --data out/picked/preferences.jsonl --lr 5e-4", 2, 36000),
    "dpo": ("dpo.py", 2, 0),
    "dpo_alone": ("dpo.py --nll_coef 0", 2, 0),
    "dpo_ai": ("-m feedback.collect --by out/reward_model --prompts 10000 --out out/ai && "
               "dpo.py --data out/ai/preferences.jsonl --held_out out/world/preferences_heldout.jsonl",
               2, 40000),
    "dpo_online": ("-m variants.online_dpo", 2, 40000),
    "ppo": ("ppo.py", 4, 54 * 128),
    "rloo": ("-m variants.grpo --advantage rloo", 3, 54 * 128),
    "grpo": ("-m variants.grpo", 3, 54 * 128),
    "dr_grpo": ("-m variants.grpo --no-divide_by_std --no-divide_by_length", 3, 54 * 128),
    "ppo_no_kl": ("ppo.py --kl_coef 0 --no-adaptive_kl --steps 60", 4, 60 * 128),
}


def learn(folder, stages, seed):
    """Go to a folder, and run {name: commands} there, the last of which leaves out/<name>/. What has run
    already does not run again; seconds.json says how long it took. Ends this program where one fails."""
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    for name, commands in stages.items():
        if os.path.exists(f"out/{name}/seconds.json"):
            continue
        began = time.time()
        for command in f"{commands} --out out/{name}".split(" && "):
            run(f"{command} --seed {seed}")
        write_json(f"out/{name}/seconds.json", time.time() - began)


def run(command):
    script, *words = command.split()
    path = script if script == "-m" else ROOT / script
    if subprocess.run([sys.executable, path, *words], stdout=subprocess.DEVNULL,
                      env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode:
        sys.exit(f"{command} in {os.getcwd()} failed")


def measure(seed, names):
    """The report's numbers of each method on one seed: {name: {"judge", "kl", "seconds", ...}}."""
    learn(ROOT / f"out/methods/{seed}", BASE | {name: METHODS[name][0] for name in names}, seed)
    models = " ".join(f"out/{name}" for name in ["sft", *names])
    run(f"evaluate.py {models} --best_of 16 --show 0 --seed {seed}")
    found = read("out/report.json")["models"]
    for name in names:
        found[name]["memory"] = read(f"out/{name}/run.json")["peak_memory"] / 1e9
        found[name]["seconds"] = read(f"out/{name}/seconds.json")
    return found


def read(path):
    return json.loads(Path(path).read_text("utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    names = args.names or list(METHODS)
    if unknown := set(names) - set(METHODS):
        parser.error(f"{min(unknown)} is none of {', '.join(METHODS)}")
    found = [measure(seed, names) for seed in args.seeds]
    print("| method | judge | wins | KL | length | ended | seconds | memory | networks | answers sampled |\n|"
          + " --- |" * 10)
    for name in ["sft", "best_of_n", *names]:
        rows = [seed[name] for seed in found]
        least = {key: min(row[key] for row in rows) for key in ("judge", "win_rate", "ended")}
        most = {key: max(row.get(key, 0) for row in rows) for key in ("kl", "length", "seconds", "memory")}
        _, networks, answers = METHODS.get(name, ("", 2 if name == "best_of_n" else 1, 0))
        print(f"| {name} | {least['judge']:.2f} | {least['win_rate']:.1%} | {most['kl']:.1f} "
              f"| {most['length']:.0f} | {least['ended']:.0%} | {most['seconds']:.0f} "
              f"| {most['memory']:.1f} GB | {networks} | {answers} |")


if __name__ == "__main__":
    main()
