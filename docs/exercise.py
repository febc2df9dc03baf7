"""The exercises of docs/exercises.md: a copy of the project without one function.

    python docs/exercise.py gae         copy the project to homework/, without the body of gae

The copy ends with the stage of the exercise, because later stages repeat some code of earlier ones. It holds
no tests, because many of them are the formulas once more, as slow loops. tests/helpers/grade.py grades it.
"""
import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOMEWORK = ROOT / "homework"
STAGES = ["sft.py", "reward_model.py", "ppo.py", "dpo.py"]

# {exercise: its file}
EXERCISES = {"sft_loss": "sft.py", "pairwise_loss": "reward_model.py", "ranking_loss": "reward_model.py",
             "sample": "model.py", "kl_rewards": "ppo.py", "whiten": "ppo.py", "gae": "ppo.py",
             "policy_loss": "ppo.py", "value_loss": "ppo.py", "AdaptiveKL.update": "ppo.py",
             "dpo_loss": "dpo.py", "Linear": "model.py", "read_logprobs": "model.py",
             "approximate_kl": "ppo.py", "rloo": "variants/grpo.py", "grpo": "variants/grpo.py"}
# The functions to write where there are several, and other functions whose body would give the answer away.
PARTS = {"Linear": ["Linear.add_adapter", "Linear.forward", "Linear.matrix", "Linear.merge"],
         "read_logprobs": ["GPT.read_logprobs"]}
SPOILERS = {"pairwise_loss": [("reward_model.py", "ranking_loss"), ("reward_model.py", "evaluate")],
            "Linear": [("runtime/nf4.py", "PackedLinear.forward")]}


def find(code, name):
    """The ast node of a function ("gae", "AdaptiveKL.update") in a file's code, or StopIteration."""
    node = ast.parse(code)
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    return node


def empty(file, name, message):
    """Put an error in the place of a function's body in homework/, after its docstring. Returns the place, as
    in "homework/ppo.py, line 140"."""
    lines = (HOMEWORK / file).read_text("utf-8").splitlines(keepends=True)
    function = find("".join(lines), name)
    first = function.body[0]
    start = first.end_lineno if ast.get_docstring(function) else first.lineno - 1
    place = f"homework/{file}, line {start + 1}"
    error = f'raise NotImplementedError("{message}: {place}")'
    lines[start:function.end_lineno] = [f"{' ' * first.col_offset}{error}\n"]
    (HOMEWORK / file).write_text("".join(lines), "utf-8")
    return place


def make(name):
    """Make homework/, and print what to do. Returns an error message, or None."""
    if name not in EXERCISES:
        return f"NAME={name} is no exercise: take one of {', '.join(EXERCISES)}"
    if HOMEWORK.exists():
        return "homework/ exists already: move it away first"
    file = EXERCISES[name]
    stages = STAGES[:STAGES.index(file) + 1] if file in STAGES else STAGES
    for folder in ["data", "runtime"] + (["variants"] if file.startswith("variants/") else []):
        shutil.copytree(ROOT / folder, HOMEWORK / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("model.py", "evaluate.py", *stages):
        shutil.copy(ROOT / path, HOMEWORK)
    for part in PARTS.get(name, [name]):            # from top to bottom: each moves the lines below it
        print(f"Write {part}: {empty(file, part, f'{part} is still to be written')}.")
    for other, part in SPOILERS.get(name, []):
        empty(other, part, f"left out, because it would give {name} away")
    sections = (ROOT / "docs/exercises.md").read_text("utf-8").split("\n## ")
    [section] = [text.strip() for text in sections if text.split()[1] == name]
    (HOMEWORK / "exercise.md").write_text(f"## {section}\n", "utf-8")
    print("What to read first, and a hint, are in homework/exercise.md. To think about:\n\n"
          f"  {section.partition('**Think** ')[2]}\n\nmake grade says what holds, and what does not yet.")


if __name__ == "__main__":
    sys.exit(make(" ".join(sys.argv[1:])))
