"""Rank answers yourself, on a page of this machine: preferences that every stage reads.

    python -m feedback.collect --by person --prompts 50    first: a model answers
    python -m feedback.label                               then open the address that this prints

Each choice is on the disk before the page shows the next item. The same command continues where it stopped.
"""
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data import records
from feedback.choices import Choices
from feedback.page import Page
from runtime.files import lock
from runtime.flags import flag
from runtime.launch import main

HERE = Path(__file__).parent


@dataclass
class Config:
    tasks: str = flag("out/feedback/tasks.jsonl", "file of the answers to rank")
    guidelines: str = flag("", "text file shown beside the answers; none takes feedback/guidelines.txt")
    name: str = flag("", "who labels; none takes the login name")
    out: str = flag("", "file of the choices; none takes NAME.jsonl beside the tasks")
    port: int = flag(8000, "port of the page on this machine; 0 takes a free one", 0, 65535)
    debug: bool = flag(False, "show the traceback of an error")


def label(cfg):
    if not os.path.exists(cfg.tasks):
        raise ValueError(f"no answers in {cfg.tasks}: run `python -m feedback.collect --by person` first")
    name = cfg.name or os.environ.get("USER") or "me"
    out = cfg.out or os.path.join(os.path.dirname(cfg.tasks), f"{name}.jsonl")
    path = os.path.realpath(out)
    folder, file = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    lock(folder, f".{file}")
    choices = Choices(name, path, records.read("tasks", cfg.tasks))
    guidelines = {"guidelines": Path(cfg.guidelines or HERE / "guidelines.txt").read_text("utf-8")}
    if choices.left():
        html = (HERE / "label.html").read_text("utf-8")
        page = Page(cfg.port, html, lambda change: choices.talk(change) | guidelines)
        print(f"{name} ranks answers at\n\n    {page.address}\n\nCtrl-C ends", flush=True)
        with suppress(KeyboardInterrupt):
            page.serve_forever()
        page.lock.acquire()                                     # a choice that is being saved is saved first
    total, left = len(choices.items), len(choices.left())
    print(f"\n{total - left} of {total} are ranked, in {out}.")
    if left:
        sys.exit(130)                                           # the status of interrupted work


if __name__ == "__main__":
    main(Config, label, __doc__)
