"""Rounds of feedback: sample from the policy, have its answers ranked, learn from all labels, and again.

    python -m feedback.rounds                three rounds of PPO, labelled by the world's annotators
    python -m feedback.rounds --by person    by you, on a page: rank all, end it with Ctrl-C, start this again
    python -m feedback.rounds --by folder    by a chat model that judges (feedback/judge.py)
    python -m feedback.rounds --way best     the best answers go back into supervised fine-tuning instead

A reward model knows the answers that it has seen compared. PPO moves away from them, first of all to where
the score is wrong, so labels of the new policy's answers are labels of these mistakes. Each round trains the
reward model on all labels so far, and PPO from the SFT model again. For comparison, spend as many labels on
the SFT model's answers alone: --rounds 1 --labels 3000 --out out/once.

The other way needs no reward model (rejection sampling: Dong et al. 2023, "RAFT"): each round imitates the
answers that were ranked first, from the policy that gave them.

Each part is run once. A part that was made with other flags is refused.
"""
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from lab.stages import run_stage
from runtime.files import find
from runtime.flags import flag
from runtime.launch import main


@dataclass
class Config:
    out: str = flag("out/loop", "folder of all parts")
    init: str = flag("out/sft", "SFT model: the first policy, and where each PPO starts")
    by: str = flag("annotators", "who ranks: see feedback/collect.py")
    constitution: str = flag("", "file of the principles of a chat model, or of the guidelines for a person")
    way: str = flag("ppo", "how a round learns", choices=("ppo", "best"))
    rounds: int = flag(3, "rounds", 1)
    labels: int = flag(1000, "prompts per round, each with four answers to rank", 10)
    seed: int = flag(0, "seed of all parts", 0, 2 ** 31)
    device: str = flag("auto", "of all parts: auto, cuda, mps or cpu")
    precision: str = flag("auto", "of all parts: auto, float32 or bfloat16")
    debug: bool = flag(False, "show the traceback of an error")


def part(cfg, command, name, **flags):
    """Run a stage once (see lab/stages.py) and return its folder."""
    out = f"{cfg.out}/{name}"
    flags = {"out": out, "seed": cfg.seed, "device": cfg.device, "precision": cfg.precision} | flags
    run_stage(command, f"{out}/done.json", **flags)
    return out


def label(cfg, policy, name, seed):
    """Labels of a policy's answers: the name of their file. Each round has a seed, for prompts of its own."""
    flags = {"by": cfg.by, "model": policy, "prompts": cfg.labels, "seed": seed}
    if cfg.constitution and cfg.by != "person":
        flags["constitution"] = cfg.constitution
    folder = part(cfg, "-m feedback.collect --overwrite", f"labels_{name}", **flags)
    file = f"{folder}/preferences.jsonl"
    if cfg.by == "person":
        run_stage("-m feedback.label", f"{folder}/ranked.json", tasks=f"{folder}/tasks.jsonl", out=file,
                  guidelines=cfg.constitution)
    return file


def loop(cfg):
    find(cfg.init)                                              # before any folder is made
    os.makedirs(cfg.out, exist_ok=True)
    policies, labels = [cfg.init], []
    for r in range(cfg.rounds):
        name = f"{cfg.way}_{r + 1}"
        labels.append(label(cfg, policies[-1], name, cfg.seed + r))
        if cfg.way == "ppo":
            data = f"{cfg.out}/all_labels_{name}.jsonl"
            Path(data).write_text("".join(Path(file).read_text("utf-8") for file in labels), "utf-8")
            reward = part(cfg, "reward_model.py", f"reward_model_{name}", data=data, init=cfg.init)
            policies.append(part(cfg, "ppo.py", name, init=cfg.init, reward=reward))
        else:
            policies.append(part(cfg, "sft.py", name, data=labels[-1], init=policies[-1], lr=5e-4,
                                 max_dropped=1))                # where all answers tie, none is imitated
    report = part(cfg, f"evaluate.py {shlex.join(policies)}", f"report_{name}", best_of=0, show=0)
    print(f"{report}/report.md compares the rounds")


if __name__ == "__main__":
    main(Config, loop, __doc__)
