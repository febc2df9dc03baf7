"""Tasks of reasoning-gym, where a program makes the questions and another one scores the answers.

    pip install reasoning-gym
    python -m lab.gym spell_backward:max_word_len=6 chain_sum:max_terms=2,max_digits=2        writes out/gym/

A task is a name of that library (more than 100: https://github.com/open-thought/reasoning-gym), and after a
colon its settings. The folder has files like the world's, so that --data out/gym works in every script:
demonstrations.jsonl, prompts.jsonl, the same with _heldout, and a tokenizer. No held-out question is among
those for training.

`score` is a reward: ppo.py --reward lab/gym.py:score. `right` is 1 for a fully right answer and 0 for others.
"""
import functools
import json
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
    held_out: int = flag(200, "questions of each task that are held out", 1)
    vocab_size: int = flag(260, "size of the tokenizer: 256 bytes and what occurs most often", 260)
    seed: int = flag(0, "seed of the questions", 0)
    overwrite: bool = flag(False, f"replace the files that are in {FOLDER}")
    debug: bool = flag(False, "show the traceback of an error")


def questions(task, size, seed):
    """The questions of a task, name:setting=value,setting=value, as records {"prompt", "task", "entry"}."""
    name, _, text = task.partition(":")
    try:
        pairs = [pair.split("=") for pair in text.split(",") if pair]
        settings = {key: json.loads(value) for key, value in pairs}
        entries = list(reasoning_gym.create_dataset(name, size=size, seed=seed, **settings))
    except (ValueError, TypeError, AssertionError) as e:
        raise ValueError(f"{task}: {type(e).__name__}: {e}") from None
    return [{"prompt": entry["question"], "task": name, "entry": entry} for entry in entries]


def make(cfg):
    if not cfg.tasks:
        raise ValueError("name tasks of reasoning-gym, such as spell_backward")
    if reasoning_gym is None:
        raise ValueError("reasoning-gym is not there: pip install reasoning-gym")
    refuse_existing(f"{FOLDER}/tokenizer.json", cfg.overwrite)                      # the last one written
    # Question i is made from the seed plus i, so neighbouring seeds would give the same questions.
    seed = cfg.seed * 10 ** 6
    train = [row for task in cfg.tasks for row in questions(task, cfg.size, seed)]
    known = {row["prompt"] for row in train}
    held_out = [row for task in cfg.tasks for row in questions(task, cfg.held_out, seed + 5 * 10 ** 5)
                if row["prompt"] not in known]
    Path(FOLDER).mkdir(parents=True, exist_ok=True)
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
    row = known_questions()[messages[-1]["content"]]
    return reasoning_gym.get_score_answer_fn(row["task"])(answer.strip(), row["entry"])


def right(messages, answer):
    return float(score(messages, answer) == 1)


if __name__ == "__main__":
    main(Config, make, __doc__)
