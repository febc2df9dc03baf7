"""Rank a model's answers yourself, on a page of this machine: preferences that every stage reads.

    python -m feedback.label --model out/sft    then open the address that it prints
    python -m feedback.label --agreement out/label/ann.jsonl out/label/bob.jsonl

The first run samples the answers and writes them to --tasks; later runs, and other people, get the same ones.
Every choice is on the disk before the page goes on, and the same command goes on where it stopped.
"""
import os
import random
from dataclasses import dataclass
from pathlib import Path

from data import loading, records
from data.answers import sample
from data.batches import fit_prompts
from data.tokenizer import Tokenizer
from feedback.choices import Choices, compare, read
from feedback.page import Page
from runtime.compute import Compute, row_seeds
from runtime.files import find, lock
from runtime.flags import Settings, flag
from runtime.launch import main
from runtime.models import load
from runtime.processes import is_first

HERE = Path(__file__).parent


@dataclass
class Config(Settings):
    files: tuple = flag((), "with --agreement: the files of two people")
    agreement: bool = flag(False, "compare two people's choices, and label nothing")
    model: str = flag("out/sft", "folder of the model that answers")
    data: str = flag(loading.WORLD, "prompts: a folder of the world's, or a file")
    prompts: int = flag(50, "prompts to answer, drawn at random", 1)
    answers: int = flag(4, "different answers to each prompt, if it gets so many", 2, 9)
    temperature: float = flag(1.0, "of sampling; 0 is greedy", 0)
    max_new_tokens: int = flag(64, "longest answer, in tokens", 1)
    tasks: str = flag("out/label/tasks.jsonl", "file of what is to be ranked: sampled if there is none")
    gold: str = flag("", "file of preferences of known order, mixed in among the tasks")
    guidelines: str = flag("", "text file shown beside the answers; none takes feedback/guidelines.txt")
    name: str = flag("", "who labels; none takes the login name")
    out: str = flag("", "file of the choices; none takes out/label/NAME.jsonl")
    port: int = flag(8000, "port of the page on this machine; 0 takes a free one", 0, 65535)


def sample_tasks(cfg):
    """A record for each of some training prompts to which the model gives different answers."""
    tokenizer, compute = Tokenizer.load(find(cfg.model)), Compute(cfg)
    model = load(cfg.model, vocab_size=tokenizer.vocab_size).requires_grad_(False)
    if model.head_kind != "lm":
        raise ValueError(f"{cfg.model} is a reward model: it gives scores, not answers")
    compute.place(model)
    rng, room = random.Random(cfg.seed), model.config.block_size - cfg.max_new_tokens
    prompts, _ = loading.load("prompts", cfg.data, "", cfg.max_dropped)
    prompts = fit_prompts(tokenizer, prompts, room, "prompts", cfg.max_dropped)
    prompts = rng.sample(prompts, min(cfg.prompts, len(prompts)))
    print(f"{cfg.model} answers {len(prompts)} prompts ...", flush=True)
    each, tasks = 2 * cfg.answers, []                           # twice as many, for some will be the same
    seeds = row_seeds(rng, each * len(prompts))
    for prompt, found in zip(prompts, sample(compute, model, tokenizer, prompts, each, cfg.max_new_tokens,
                                             seeds, cfg.temperature)):
        different = list(dict.fromkeys(a.text for a in found if a.text.strip()))
        if len(different) > 1:
            tasks.append({"prompt": prompt, "responses": different[:cfg.answers]})
    if not tasks:
        raise ValueError("no prompt got two different answers: a higher --temperature may give some")
    return tasks


def label(cfg):
    if cfg.agreement:
        if len(cfg.files) != 2:
            raise ValueError("--agreement needs the files of two people")
        return compare(*map(read, cfg.files))
    cfg.name = cfg.name or os.environ.get("USER") or "me"
    cfg.out = cfg.out or f"out/label/{cfg.name}.jsonl"
    for path in (cfg.tasks, cfg.out):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    tasks = [] if os.path.exists(cfg.tasks) else sample_tasks(cfg)
    if not is_first():
        return
    if not os.path.exists(cfg.tasks):                           # another person may have been faster
        records.write(cfg.tasks, tasks)
    folder, name = os.path.split(os.path.realpath(cfg.out))
    lock(folder, f".{name}")
    gold = records.read("preferences", cfg.gold) if cfg.gold else []
    guidelines = Path(cfg.guidelines or HERE / "guidelines.txt").read_text("utf-8")
    choices = Choices(cfg, records.read("tasks", cfg.tasks), gold, guidelines)
    page = Page(cfg.port, (HERE / "label.html").read_text("utf-8"), choices.talk)
    print(f"{cfg.name} ranks answers at\n\n    {page.address}\n\nCtrl-C ends", flush=True)
    try:
        page.serve_forever()
    except KeyboardInterrupt:
        page.lock.acquire()                                     # what is being saved now is saved first
    print(f"\n{len(choices.done)} are ranked, in {cfg.out}. {choices.gold_score()}")


if __name__ == "__main__":
    main(Config, label, __doc__)
