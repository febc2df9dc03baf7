"""Make the embedded world's files, or read them.

    python -m data                   write out/world/: demonstrations, preferences, prompts, each with a held-out part
    python -m data --show 2          print prompts, answers and rankings of each family
"""
import argparse
import random
import time

import runtime
from data import loading, world


def show(n, seed):
    """Print n prompts of each family, each with what four people of the crowd answered, how an annotator ranked it,
    and what the judge says."""
    rng = random.Random(seed)
    families = {}
    for item in world.items():
        families.setdefault(item.family, []).append(item)
    for family, items in families.items():
        print(f"\n=== {family}: {len(items)} prompts, {sum(i.held_out for i in items)} of them held out")
        for item in rng.sample(items, n):
            print()
            for role, text in item.messages:
                print(f"{role:>10}: {text}")
            record = loading.preference(item, rng, panel=1)
            print("      rank  judge  helpful honest harmless manner  answer")
            for place, answer in sorted(zip(record["ranks"], record["responses"])):
                p = world.parts(item.prompt, answer)
                print(f"{place:10}  {world.judge(item.prompt, answer):5.2f}  {p['helpful']:7.1f} {p['honest']:6.1f} "
                      f"{p['harmless']:8.1f} {p['manner']:6.2f}  {answer}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default=loading.WORLD, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, metavar="N", help="write nothing; print N prompts of each family")
    args = parser.parse_args()
    started = time.time()
    if args.show is not None:
        show(args.show, args.seed)
    else:
        loading.make_world(args.out, args.seed)
        seconds = time.time() - started
        runtime.write_json(f"{args.out}/run.json", {"started": started, "ended": started + seconds, "seconds": round(seconds, 1)})
        print(f"wrote {args.out}/ after {seconds:.0f} s; to read some of it: python -m data --show 1")
