"""Tasks of reasoning-gym, where a program makes the questions and another one scores the answers.

    pip install reasoning-gym
    python -m lab.gym spell_backward:max_word_len=6 chain_sum:max_terms=2,max_digits=2        writes out/gym/

A task is a name of that library (more than 100: https://github.com/open-thought/reasoning-gym), and after a
colon its settings, whose values are JSON. The folder has files like the world's, so that --data out/gym works
in every script: demonstrations.jsonl, prompts.jsonl, the same with _heldout, and a tokenizer. No held-out
question is among those for training.

`score` is a reward: ppo.py --reward lab/gym.py:score. `right` is 1 for a fully right answer and 0 for others.
"""
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from data import records
from data.tokenizer import learn
from runtime.files import refuse_existing
from runtime.flags import flag
from runtime.launch import main

try:
    import reasoning_gym
except ImportError:
    reasoning_gym = None

FOLDER = "out/gym"                  # where everything is written, and where the rewards look for questions


@dataclass
class Config:
    tasks: tuple = flag((), "names of tasks, such as gcd or gcd:max_value=50,max_numbers=3")
    size: int = flag(3000, "questions of each task for training", 1, 500_000)
    held_out: int = flag(200, "questions of each task that are held out", 1, 500_000)
    vocab_size: int = flag(260, "size of the tokenizer: 256 bytes, 3 control tokens, and pairs of bytes", 260)
    seed: int = flag(0, "seed of the questions", 0)
    overwrite: bool = flag(False, f"replace the files that are in {FOLDER}")
    debug: bool = flag(False, "show the traceback of an error")


def questions(task, size, seed):
    """The questions of a task, name:setting=value,setting=value, as records {"prompt", "task", "entry"}."""
    try:
        rows = [{"prompt": entry["question"], "task": task, "entry": entry}
                for entry in dataset(task, size, seed)]
        first = json.loads(json.dumps(rows[0]))             # as a file gives it back
        if graded(first, first["entry"]["answer"]) != 1:
            raise ValueError("its own answer does not score 1 after it was in a file")
    except (ValueError, TypeError, AssertionError) as e:
        raise ValueError(f"{task}: {type(e).__name__}: {e}") from None
    return rows


@functools.cache
def dataset(task, size=1, seed=0):
    """The library's object for a task: it makes the questions, and scores answers by the same settings."""
    name, _, text = task.partition(":")
    settings = {}
    for pair in re.split(r",(?=\w+=)", text) if text else ():       # a value may hold commas: [1,2]
        key, _, value = pair.partition("=")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            raise ValueError(f"the value of {key} is no JSON: {value!r}") from None
    return reasoning_gym.create_dataset(name, size=size, seed=seed, **settings)


def graded(row, answer):
    """The score of an answer to a record's question."""
    return dataset(row["task"]).score_answer(answer, row["entry"])


def make(cfg):
    if not cfg.tasks:
        raise ValueError("name tasks of reasoning-gym, such as spell_backward")
    if reasoning_gym is None:
        raise ValueError("reasoning-gym is not there: pip install reasoning-gym")
    refuse_existing(f"{FOLDER}/tokenizer.json", cfg.overwrite)              # written last: all is there
    # Question i is made from the number seed + i. So each --seed has a million numbers: the first half is for
    # training, the second for held-out questions.
    seed = cfg.seed * 10 ** 6
    train = [row for task in cfg.tasks for row in questions(task, cfg.size, seed)]
    known = {row["prompt"] for row in train}
    held_out = [row for task in cfg.tasks for row in questions(task, cfg.held_out, seed + 5 * 10 ** 5)
                if row["prompt"] not in known]
    if lost := {task for task in cfg.tasks} - {row["task"] for row in held_out}:
        raise ValueError(f"{min(lost)}: all its held-out questions are for training too: lower --size")
    Path(FOLDER).mkdir(parents=True, exist_ok=True)
    Path(FOLDER, "tokenizer.json").unlink(missing_ok=True)
    for end, rows in (("", train), ("_heldout", held_out)):
        records.write(f"{FOLDER}/prompts{end}.jsonl", rows)
        records.write(f"{FOLDER}/demonstrations{end}.jsonl",
                      [{"prompt": row["prompt"], "response": row["entry"]["answer"]} for row in rows])
    learn([text for row in train for text in (row["prompt"], row["entry"]["answer"])],
          cfg.vocab_size).save(FOLDER)
    print(f"wrote {FOLDER}: {len(train)} questions for training, {len(held_out)} held out")


# ---------------------------------------------------------------------------------------------- rewards

@functools.cache
def known_questions():
    """{prompt: its record} of all prompts in FOLDER."""
    rows = [json.loads(line) for path in sorted(Path(FOLDER).glob("prompts*.jsonl"))
            for line in path.read_text("utf-8").split("\n") if line]
    return {row["prompt"]: row for row in rows}


def score(messages, answer):
    """The score that the question's own task gives an answer, from 0 to 1, partly right ones between."""
    row = known_questions().get(messages[-1]["content"])
    if row is None:
        raise ValueError(f"this question is not in {FOLDER}/prompts*.jsonl")
    return graded(row, answer.strip())


def right(messages, answer):
    return float(score(messages, answer) == 1)


if __name__ == "__main__":
    main(Config, make, __doc__)
