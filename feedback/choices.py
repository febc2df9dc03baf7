"""The file of one person's rankings."""
import hashlib
import json
import os
import random
import time

from data import records


def key(p):
    """The name of an item (a records.Preference) in every file and run: a hash of its prompt and answers."""
    return hashlib.sha256(json.dumps([p.prompt, p.responses]).encode()).hexdigest()[:16]


class Choices:
    """The items that a person ranks, and the file of their choices. A new file replaces it after each choice,
    so that it is whole at any moment and holds every choice that the page shows as saved.

    name: the person; out: the file; tasks: the items, as records.Preference."""

    def __init__(self, name, out, tasks):
        self.name, self.out = name, out
        self.items, self.done = {key(p): p for p in tasks}, {}      # done: {key: record}, as in the file
        self.saved = []                                             # keys of this run's choices
        if os.path.exists(out) and os.path.getsize(out):
            keys = map(key, records.read("preferences", out))
            with open(out, encoding="utf-8") as f:
                self.done = dict(zip(keys, (json.loads(line) for line in f if line.strip())))

    def left(self):
        """The keys of the items that are not ranked yet."""
        return [item for item in self.items if item not in self.done]

    def order(self, item):
        """The order of the answers on this person's page: their indices in the record."""
        n = len(self.items[item].responses)
        return random.Random(f"{self.name}/{item}").sample(range(n), n)

    def talk(self, change):
        """Save or undo a choice, if the page asks for it. Returns what the page shows next."""
        item = change.get("item") if isinstance(change, dict) else 0
        if item is not None:
            if not isinstance(item, str) or item not in self.items:
                raise ValueError("no such item")
            if change.get("undo") is True:
                self.undo(item)
            else:
                self.save(item, change.get("ranks"), change.get("cannot_judge") is True)
        left, total = self.left(), len(self.items)
        state = {"total": total, "done": total - len(left), "last": self.saved[-1] if self.saved else None,
                 "item": None, "prompt": [], "answers": []}
        if not left:
            return state | {"end": f"All {total} are ranked. Thank you!"}
        p = self.items[left[0]]
        return state | {"item": left[0], "prompt": p.prompt,
                        "answers": [p.responses[i] for i in self.order(left[0])]}

    def save(self, item, ranks, cannot_judge):
        """ranks: in the order of the page. The first choice counts: a double click or a second tab changes
        nothing."""
        if item in self.done:
            return
        p, order = self.items[item], self.order(item)
        if cannot_judge:
            ranks = [1] * len(order)
        if not isinstance(ranks, list) or len(ranks) != len(order) or \
                not all(type(r) is int and 1 <= r <= len(order) for r in ranks):
            raise ValueError("expected a rank for each answer")
        record = {"prompt": p.prompt, "responses": p.responses,
                  "ranks": [ranks[order.index(i)] for i in range(len(order))], "by": self.name,
                  "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "order": order,
                  "cannot_judge": cannot_judge}
        self.write(self.done | {item: record})
        self.saved.append(item)

    def undo(self, item):
        """Take a choice back, if it is the last one of this run."""
        if self.saved and self.saved[-1] == item:
            self.write({other: record for other, record in self.done.items() if other != item})
            self.saved.pop()

    def write(self, done):
        """Replace the file by one of these choices, which is on the disk when this returns. If that fails,
        the old file stays."""
        with open(f"{self.out}.tmp", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in done.values())
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{self.out}.tmp", self.out)
        if hasattr(os, "O_DIRECTORY"):                  # Windows has none: there the new name may come later
            folder = os.open(os.path.dirname(os.path.abspath(self.out)), os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
        self.done = done
