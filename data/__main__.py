"""Make the embedded world's files, or read them.

    python -m data              write out/world/: demonstrations, preferences and prompts, with held-out parts
    python -m data --show 2     print prompts, answers and rankings of each family
"""
import os
import random
import sys
from dataclasses import dataclass

from data import loading, world
from runtime.files import reading
from runtime.flags import flag, parse


@dataclass
class Config:
    out: str = flag(loading.WORLD, "folder to write")
    seed: int = flag(0, "seed of everything drawn", 0, 2 ** 31)
    overwrite: bool = flag(False, "replace the world of another seed, or of another version, in the folder")
    show: int = flag(0, "write nothing; print this many prompts of each family", 0, 20)


def show(n, seed):
    """Print n prompts of each family, each with four answers, an annotator's ranks and the judge's scores."""
    rng = random.Random(seed)
    for family in dict.fromkeys(item.family for item in world.items()):
        items = [item for item in world.items() if item.family == family]
        held_out = sum(item.part == "heldout" for item in items)
        print(f"\n=== {family}: {len(items)} prompts, {held_out} of them held out")
        for item in rng.sample(items, n):
            print()
            for role, text in item.messages:
                print(f"{role:>10}: {text}")
            record = loading.preference(item, rng, panel=1)
            print("      rank  judge  helpful honest harmless manner  answer")
            for rank, answer in sorted(zip(record["ranks"], record["responses"])):
                score, p = world.judge(item, answer), world.parts(item, answer)
                print(f"{rank:10}  {score:5.2f}  {p['helpful']:7.1f} {p['honest']:6.1f} "
                      f"{p['harmless']:8.1f} {p['manner']:6.2f}  {answer}")


def make(cfg):
    """Write the files, unless they are there. Raises ValueError if those of another seed are."""
    path = f"{cfg.out}/run.json"
    if not cfg.overwrite and os.path.exists(path):
        with reading(path, "a world's run") as made:
            seed = made.get("seed", "unknown")
        if seed != cfg.seed:
            raise ValueError(f"{cfg.out} holds the world of seed {seed}: name another --out, "
                             "or add --overwrite")
        print(f"{cfg.out} holds this world already; --overwrite would make it again")
        return
    loading.make_world(cfg.out, cfg.seed)
    print(f"wrote {cfg.out}/; to read some of it: python -m data --show 1")


if __name__ == "__main__":
    cfg = parse(Config, __doc__)
    try:
        show(cfg.show, cfg.seed) if cfg.show else make(cfg)
    except (OSError, ValueError, KeyboardInterrupt) as e:
        sys.exit(f"python -m data: {str(e) or 'interrupted'}")
