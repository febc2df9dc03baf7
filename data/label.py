"""Rank a model's answers yourself, on a page of this machine: preferences that every stage reads.

    python -m data.label --model out/sft                            then open the address that it prints
    python -m data.label --agreement out/label/ann.jsonl out/label/bob.jsonl

The first run samples the answers and writes them to --tasks; later runs, and other people, get the same ones.
Every choice is on the disk before the page goes on, and the same command goes on where it stopped.
"""
import getpass
import hashlib
import json
import os
import random
import time
from dataclasses import dataclass, replace

from data import loading, records
from data.annotators import choices, compare
from data.batches import fit_prompts
from data.tokenizer import Tokenizer
from runtime import Compute, Settings, find, flag, load, main
from runtime.compute import row_seeds
from runtime.files import Journal, lock
from runtime.page import Page
from runtime.processes import is_first

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class Config(Settings):
    files: tuple = flag((), "with --agreement: the files of two people")
    agreement: bool = flag(False, "compare two people's choices, and label nothing")
    model: str = flag("out/sft", "folder of the model that answers")
    data: str = flag("world", "prompts: world, or a file")
    prompts: int = flag(50, "prompts to answer, drawn at random", 1)
    answers: int = flag(4, "different answers to each prompt, if it gets so many", 2, 9)
    temperature: float = flag(1.0, "of sampling; 0 is greedy", 0)
    max_new_tokens: int = flag(64, "longest answer, in tokens", 1)
    tasks: str = flag("out/label/tasks.jsonl", "file of what is to be ranked: sampled if there is none")
    gold: str = flag("", "file of preferences of known order, mixed in among the tasks")
    guidelines: str = flag("", "text file shown beside the answers; none takes data/guidelines.txt")
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
    ids = [tokenizer.prompt(p) for p in prompts for _ in range(each)]
    seeds = row_seeds(rng, len(ids))
    found = compute.sample(model, ids, seeds, cfg.max_new_tokens, cfg.temperature, tokenizer.end)
    texts = [tokenizer.decode(row[mask].tolist()) for row, mask in zip(found["tokens"], found["mask"])]
    for i, prompt in enumerate(prompts):
        different = list(dict.fromkeys(t for t in texts[i * each:(i + 1) * each] if t.strip()))
        if len(different) > 1:
            tasks.append({"prompt": prompt, "responses": different[:cfg.answers]})
    if not tasks:
        raise ValueError("no prompt got two different answers: a higher --temperature may give some")
    return tasks


def key(p):
    """The name of an item (a records.Preference), the same in every file and run: what it says, hashed."""
    return hashlib.sha256(json.dumps([p.prompt, p.responses]).encode()).hexdigest()[:16]


def read_choices(path):
    return {key(p): p for p in records.read_preferences(path)}


class Labels:
    """What a person has to rank, and the file of what they chose."""

    def __init__(self, cfg, tasks, gold, guidelines):
        self.cfg, self.gold, self.guidelines = cfg, {key(p): p for p in gold}, guidelines
        self.saved = []                                         # (key, where its line begins) in this run
        rng = random.Random(cfg.seed)
        for p in gold:
            tasks.insert(rng.randint(0, len(tasks)), p)
        self.items, self.journal = {key(p): p for p in tasks}, Journal(cfg.out)
        self.done = read_choices(cfg.out) if self.journal.size() else {}

    def order(self, item):
        """In which order the answers stand on this person's page: their numbers in the record."""
        n = len(self.items[item].responses)
        return random.Random(f"{self.cfg.name}/{item}").sample(range(n), n)

    def talk(self, change):
        """Save or undo a choice, if the page asks for it; returns what it shows next."""
        item = change.get("item") if isinstance(change, dict) else 0
        if item is not None:
            if not isinstance(item, str) or item not in self.items:
                raise ValueError("no such item")
            if change.get("undo") is True:
                self.undo(item)
            else:
                self.save(item, change.get("ranks"), change.get("cannot_judge") is True)
        left = [item for item in self.items if item not in self.done]
        state = {"total": len(self.items), "done": len(self.items) - len(left), "guidelines": self.guidelines,
                 "last": self.saved[-1][0] if self.saved else None, "item": None, "prompt": [], "answers": []}
        if not left:
            return state | {"end": f"All {len(self.items)} are ranked. Thank you! {self.gold_score()}"}
        p = self.items[left[0]]                                 # nothing here tells a gold item from another
        return state | {"item": left[0], "prompt": p.prompt,
                        "answers": [p.responses[i] for i in self.order(left[0])]}

    def save(self, item, ranks, cannot_judge):
        """ranks: in the page's order. What has been saved, by a double click or another tab, stays."""
        p, order = self.items[item], self.order(item)
        if item in self.done:
            return
        if cannot_judge:
            ranks = [1] * len(order)
        if not isinstance(ranks, list) or len(ranks) != len(order) or \
                not all(type(r) is int and 1 <= r <= len(order) for r in ranks):
            raise ValueError("expected a rank for each answer")
        p = replace(p, ranks=[ranks[order.index(i)] for i in range(len(order))], cannot_judge=cannot_judge)
        record = {"prompt": p.prompt, "responses": p.responses, "ranks": p.ranks, "by": self.cfg.name,
                  "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "order": order}
        record |= {"cannot_judge": True} if cannot_judge else {}
        record |= {"gold": True} if item in self.gold else {}
        self.saved.append((item, self.journal.append(record)))
        self.done[item] = p

    def undo(self, item):
        """Take this choice out of the file, if it is the last one of this run."""
        if self.saved and self.saved[-1][0] == item:
            del self.done[item]
            self.journal.cut(self.saved.pop()[1])

    def gold_score(self):
        """A sentence, or nothing where nothing of known order has been ranked."""
        right = [a == b for item, p in self.gold.items() if item in self.done
                 for a, b in zip(choices(p.ranks), choices(self.done[item].ranks))
                 if a != 0 and not self.done[item].cannot_judge]
        return f"{sum(right)} of {len(right)} pairs of known order are right." if right else ""


def label(cfg):
    if cfg.agreement:
        if len(cfg.files) != 2:
            raise ValueError("--agreement needs the files of two people")
        return compare(*map(read_choices, cfg.files))
    cfg.name = cfg.name or getpass.getuser()
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
    gold = records.read_preferences(cfg.gold) if cfg.gold else []
    with open(cfg.guidelines or f"{HERE}/guidelines.txt", encoding="utf-8") as f:
        labels = Labels(cfg, records.read_tasks(cfg.tasks), gold, f.read())
    with open(f"{HERE}/label.html", encoding="utf-8") as f:
        page = Page(cfg.port, f.read(), labels.talk)
    print(f"{cfg.name} ranks answers at\n\n    {page.address}\n\nCtrl-C ends", flush=True)
    try:
        page.serve_forever()
    except KeyboardInterrupt:
        page.lock.acquire()                                     # what is being saved now is saved first
    print(f"\n{len(labels.done)} are ranked, in {cfg.out}. {labels.gold_score()}")


if __name__ == "__main__":
    main(Config, label, __doc__)
