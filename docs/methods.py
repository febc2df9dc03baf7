"""Ways to learn from preferences, side by side on the embedded world, from the same SFT model and labels.

    python docs/methods.py                       all of them on three seeds, and the table
    python docs/methods.py ppo rloo --seeds 0    some of them

Each method is a command below, run in out/methods/<seed>/, and not again if its model is there. Prints the
worst of the seeds in each column: a method is as good as it is on a bad day.
"""
import argparse
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BASE = ["-m data", "sft.py", "reward_model.py"]
METHODS = {
    "ppo": "ppo.py",
    "ppo_no_kl": "ppo.py --kl_coef 0 --no-adaptive_kl --steps 60",
    "rloo": "ppo.py --advantage rloo",
    "grpo": "ppo.py --advantage grpo",
    "dr_grpo": "ppo.py --advantage grpo --no-divide_by_std --no-divide_by_length",
    "dpo": "dpo.py",
    "dpo_alone": "dpo.py --nll_coef 0",
    "dpo_online": "dpo.py --online annotators",
}


def run(command, folder):
    """A script, in a folder. Ends this program where it fails."""
    script, *words = command.split()
    path = [script] if script == "-m" else [os.path.join(ROOT, script)]
    if subprocess.run([sys.executable, *path, *words], cwd=folder, stdout=subprocess.DEVNULL,
                      env={**os.environ, "PYTHONPATH": ROOT}).returncode:
        sys.exit(f"{command} in {folder} failed")


def measure(seed, names):
    """The report's numbers of each method on one seed: {name: {"judge", "kl", "seconds", ...}}."""
    folder = os.path.join(ROOT, "out", "methods", str(seed))
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(f"{folder}/out/reward_model/model.safetensors"):
        for command in BASE:
            run(f"{command} --seed {seed}", folder)
    for name in names:
        if not os.path.exists(f"{folder}/out/{name}/model.safetensors"):
            run(f"{METHODS[name]} --seed {seed} --out out/{name}", folder)
    models = " ".join(f"out/{name}" for name in ["sft", *names])
    run(f"evaluate.py {models} --best_of 16 --show 0 --seed {seed}", folder)
    with open(f"{folder}/out/report.json", encoding="utf-8") as f:
        found = json.load(f)["models"]
    for name in names:
        with open(f"{folder}/out/{name}/run.json", encoding="utf-8") as f:
            about = json.load(f)
        found[name] |= {"seconds": about["seconds"], "memory": about["peak_memory"] / 1e9}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    names = args.names or list(METHODS)
    if unknown := set(names) - set(METHODS):
        parser.error(f"{min(unknown)} is none of {', '.join(METHODS)}")
    found = [measure(seed, names) for seed in args.seeds]
    print("| method | judge | wins | KL | length | ended | seconds | memory |\n|" + " --- |" * 8)
    for name in ["sft", "best_of_n", *names]:
        rows = [seed[name] for seed in found]
        least = {key: min(row[key] for row in rows) for key in ("judge", "win_rate", "ended")}
        most = {key: max(row.get(key, 0) for row in rows) for key in ("kl", "length", "seconds", "memory")}
        print(f"| {name} | {least['judge']:.2f} | {least['win_rate']:.1%} | {most['kl']:.1f} "
              f"| {most['length']:.0f} | {least['ended']:.0%} | {most['seconds']:.0f} "
              f"| {most['memory']:.1f} GB |")


if __name__ == "__main__":
    main()
