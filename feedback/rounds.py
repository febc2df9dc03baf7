"""The loop closed: sample from the policy, have its answers compared, learn from all labels, and again.

    python -m feedback.rounds    three rounds of PPO, labelled by the world's annotators
    python -m feedback.rounds --by person    ... by you, on a page: end it with Ctrl-C, and start this again
    python -m feedback.rounds --by folder    ... by a chat model that judges (feedback/judge.py)
    python -m feedback.rounds --way best    the best answers go back into supervised fine-tuning instead

A reward model knows the answers that it has seen compared. PPO leaves them, and goes first where the score is
wrong: labels of the new policy's answers are labels of these mistakes. Each round trains the reward model on
all labels so far, and PPO from the SFT model again. Beside the rounds stands "once": one round with as many
labels in all, all of the SFT model's answers.

The other way needs no reward model (rejection sampling: Dong et al. 2023, "RAFT"): each round imitates the
answers that were ranked first, and the next samples from what came out.

A part that is there already is not made again.
"""
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import reward_model
from data import annotators, loading, records
from data.batches import encode_comparisons
from data.tokenizer import Tokenizer
from runtime.compute import Compute
from runtime.files import find
from runtime.flags import Settings, flag
from runtime.launch import main
from runtime.models import load_reward_model

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class Config(Settings):
    out: str = flag("out/loop", "folder of all that is written")
    init: str = flag("out/sft", "SFT model: the first policy, and where each PPO starts")
    by: str = flag("annotators", "who compares: annotators, person, or the folder of a judge")
    way: str = flag("ppo", "how a round learns", choices=("ppo", "best"))
    rounds: int = flag(3, "rounds", 1)
    labels: int = flag(1000, "prompts per round, with four ranked answers each", 10)


def run(script, done, *words, **flags):
    """A script of the project with flags, unless the file that it ends with is there."""
    if os.path.exists(done):
        return
    name = ["-m", script] if "." in script else [os.path.join(HERE, f"{script}.py")]
    words += tuple(word for flag, value in flags.items() for word in (f"--{flag}", str(value)))
    print(f"\n--- {script} {' '.join(words)}", flush=True)
    if subprocess.run([sys.executable, *name, *words], env={**os.environ, "PYTHONPATH": HERE}).returncode:
        raise ValueError(f"{script} did not end well: see above")


def label(cfg, policy, name, prompts, seed):
    """Labels of a policy's answers: the name of their file."""
    folder = f"{cfg.out}/labels_{name}"
    file = f"{folder}/preferences.jsonl"
    how = {"model": policy, "prompts": prompts, "seed": seed}
    if cfg.by == "person":
        run("feedback.label", file, tasks=f"{folder}/tasks.jsonl", out=file, **how)
    else:
        run("feedback.collect", file, by=cfg.by, out=folder, **how)
    return file


def learn(cfg, name, labels):
    """A reward model from files of labels, and a policy from it: the policy's folder."""
    data, reward = f"{cfg.out}/labels_{name}.jsonl", f"{cfg.out}/reward_model_{name}"
    policy = f"{cfg.out}/{name}"
    Path(data).write_text("".join(Path(file).read_text("utf-8") for file in labels), "utf-8")
    run("reward_model", f"{reward}/model.safetensors", data=data, init=cfg.init, out=reward, seed=cfg.seed)
    run("ppo", f"{policy}/model.safetensors", init=cfg.init, reward=reward, out=policy, seed=cfg.seed)
    return policy


def imitate(cfg, name, labels, policy):
    """A policy that imitates the answers that were ranked first, from the one that gave them."""
    out = f"{cfg.out}/{name}"
    run("sft", f"{out}/model.safetensors", data=labels[-1], init=policy, out=out, lr=5e-4, seed=cfg.seed,
        max_dropped=1)                                          # where all answers tie none is imitated
    return out


def accuracy(cfg, folder, file):
    """How often a reward model's scores order two answers of a file as its labels do."""
    tokenizer, compute = Tokenizer.load(folder), Compute(cfg)
    model = load_reward_model(folder).requires_grad_(False)
    compute.place(model)
    preferences = loading.without_ties([p for p in records.read("preferences", file, 1.0) if p])
    examples = encode_comparisons(tokenizer, preferences, model.config.block_size, "rankings")
    return reward_model.evaluate(model, compute, examples)[0]["accuracy"]


def loop(cfg):
    find(cfg.init)                                                  # before the folder is made
    os.makedirs(cfg.out, exist_ok=True)
    policy, labels, names = cfg.init, [], [f"{cfg.way}_{r}" for r in range(1, cfg.rounds + 1)]
    for r, name in enumerate(names):
        labels.append(label(cfg, policy, name, cfg.labels, cfg.seed + r))
        policy = learn(cfg, name, labels) if cfg.way == "ppo" else imitate(cfg, name, labels, policy)
    if cfg.way == "ppo":
        once = label(cfg, cfg.init, "once", cfg.labels * cfg.rounds, cfg.seed + cfg.rounds + 1)
        names.append("once")
        learn(cfg, "once", [once])
        fresh = label(cfg, policy, "after", cfg.labels, cfg.seed + cfg.rounds)
        print("\nright on the last policy's answers, which none of them has seen:")
        for name in names:
            print(f"  reward model of {name}: {accuracy(cfg, f'{cfg.out}/reward_model_{name}', fresh):.1%}")
        if cfg.by == "annotators":
            labelled = [p for p in records.read("preferences", fresh, 1.0) if p]
            print(f"  the annotators' own mean utility: {annotators.accuracy(labelled):.1%}")
    folders = [cfg.init, *(f"{cfg.out}/{name}" for name in names)]
    run("evaluate", "", *folders, best_of=0, show=0, out=cfg.out, seed=cfg.seed)


if __name__ == "__main__":
    main(Config, loop, __doc__)
