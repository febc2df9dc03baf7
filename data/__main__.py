"""Make the embedded world's files, or read them.

    python -m data              write out/world/: demonstrations, preferences and prompts, with held-out parts
    python -m data --show 2     print prompts, answers and rankings of each family
"""
import random
import time
from dataclasses import dataclass

from data import loading, world
from runtime.files import write_json
from runtime.flags import flag
from runtime.launch import STARTED, main


@dataclass
class Config:
    out: str = flag(loading.WORLD, "folder to write")
    seed: int = flag(0, "seed of everything drawn", 0, 2 ** 31)
    show: int = flag(0, "write nothing; print this many prompts of each family", 0, 20)
    debug: bool = flag(False, "show the traceback of an error")


def show(n, seed):
    """Print n prompts of each family, each with four answers, an annotator's ranking and the judge's view."""
    rng = random.Random(seed)
    for family in dict.fromkeys(item.family for item in world.items()):
        items = [item for item in world.items() if item.family == family]
        print(f"\n=== {family}: {len(items)} prompts, {sum(i.held_out for i in items)} of them held out")
        for item in rng.sample(items, n):
            print()
            for role, text in item.messages:
                print(f"{role:>10}: {text}")
            record = loading.preference(item, rng, panel=1)
            print("      rank  judge  helpful honest harmless manner  answer")
            for place, answer in sorted(zip(record["ranks"], record["responses"])):
                score, p = world.judge(item.prompt, answer), world.parts(item.prompt, answer)
                print(f"{place:10}  {score:5.2f}  {p['helpful']:7.1f} {p['honest']:6.1f} "
                      f"{p['harmless']:8.1f} {p['manner']:6.2f}  {answer}")


def make(cfg):
    if cfg.show:
        return show(cfg.show, cfg.seed)
    loading.make_world(cfg.out, cfg.seed)
    ended = time.time()
    seconds = ended - STARTED
    write_json(f"{cfg.out}/run.json", {"started": STARTED, "ended": ended, "seconds": round(seconds, 1)})
    print(f"wrote {cfg.out}/ after {seconds:.0f} s; to read some of it: python -m data --show 1")


if __name__ == "__main__":
    main(Config, make, __doc__)
