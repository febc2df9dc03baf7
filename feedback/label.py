"""Rank a model's answers yourself, on a page of this machine: preferences that every stage reads.

    python -m feedback.label --model out/sft    then open the address that it prints
    python -m feedback.label --agreement out/label/ann.jsonl out/label/bob.jsonl

The first run samples the answers and writes them to --tasks; later runs and other people rank the same ones.
Each choice is on the disk before the page shows the next item. The same command continues where it stopped.
"""
import os
import random
from dataclasses import dataclass
from pathlib import Path

from data import records
from feedback.answers import Sampling, answer_prompts
from feedback.choices import Choices, compare, read
from feedback.page import Page
from runtime.compute import Compute
from runtime.files import lock
from runtime.flags import flag
from runtime.launch import main
from runtime.processes import is_first

HERE = Path(__file__).parent


@dataclass
class Config(Sampling):
    files: tuple = flag((), "with --agreement: the files of two people")
    agreement: bool = flag(False, "compare two people's choices instead")
    prompts: int = flag(50, "prompts drawn at random", 1)
    tasks: str = flag("out/label/tasks.jsonl", "file of the answers to rank: sampled if there is none")
    gold: str = flag("", "file of preferences of known order, mixed in among the tasks")
    guidelines: str = flag("", "text file shown beside the answers; none takes feedback/guidelines.txt")
    name: str = flag("", "who labels; none takes the login name")
    out: str = flag("", "file of the choices; none takes out/label/NAME.jsonl")
    port: int = flag(8000, "port of the page on this machine; 0 takes a free one", 0, 65535)


def label(cfg):
    if cfg.agreement:
        if len(cfg.files) != 2:
            raise ValueError("--agreement needs the files of two people")
        return compare(*map(read, cfg.files))
    cfg.name = cfg.name or os.environ.get("USER") or "me"
    cfg.out = cfg.out or f"out/label/{cfg.name}.jsonl"
    tasks = []
    if not os.path.exists(cfg.tasks):
        tasks = [{"prompt": prompt, "responses": [a.text for a in answers]}
                 for prompt, answers in answer_prompts(cfg, Compute(cfg), random.Random(cfg.seed))]
    if is_first():
        for path in (cfg.tasks, cfg.out):
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        if not os.path.exists(cfg.tasks):                       # another person may have been faster
            records.write(cfg.tasks, tasks)
        serve(cfg)


def serve(cfg):
    """Show the page until Ctrl-C, or not at all if every item is ranked already."""
    folder, name = os.path.split(os.path.realpath(cfg.out))
    lock(folder, f".{name}")
    gold = records.read_preferences(cfg.gold) if cfg.gold else []
    guidelines = Path(cfg.guidelines or HERE / "guidelines.txt").read_text("utf-8")
    choices = Choices(cfg, records.read_tasks(cfg.tasks), gold, guidelines)
    if len(choices.done) < len(choices.items):
        page = Page(cfg.port, (HERE / "label.html").read_text("utf-8"), choices.talk)
        print(f"{cfg.name} ranks answers at\n\n    {page.address}\n\nCtrl-C ends", flush=True)
        try:
            page.serve_forever()
        except KeyboardInterrupt:
            page.lock.acquire()                                 # a choice that is being saved is saved first
    print(f"\n{len(choices.done)} of {len(choices.items)} are ranked, in {cfg.out}. {choices.gold_score()}")


if __name__ == "__main__":
    main(Config, label, __doc__)
