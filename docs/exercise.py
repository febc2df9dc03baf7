"""The exercises of docs/exercises.md: a copy of the project without one function, and a grade.

    python docs/exercise.py gae         copy the project to homework/, without the body of gae
    python docs/exercise.py --grade     run the tests of gae on homework/, and say what holds

The copy ends with the stage of the exercise, because later stages repeat some code of earlier ones. It holds
no tests, because many of them are the formulas once more, as slow loops. The grade runs the project's tests
with homework/ first on the path: modules that the copy lacks, like variants/, are the project's, and import
the copy's stages.
"""
import ast
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOMEWORK = ROOT / "homework"
STAGES = ["sft.py", "reward_model.py", "ppo.py", "dpo.py"]

# {exercise: (its file, the names of test files, which of their tests: an expression for pytest -k)}
EXERCISES = {
    "sft_loss": ("sft.py", "formulas sft ppo", "sft_loss or sfts_gradient"),
    "pairwise_loss": ("reward_model.py", "formulas reward_model known_answers",
                      "pairwise_loss and not ranking_loss or true_differences"),
    "ranking_loss": ("reward_model.py", "formulas reward_model", "ranking_loss or soft_label"),
    "sample": ("model.py", "formulas model",
               "test_sample_ or ends_of_the_uniform or top_k or sampled_frequencies or cached_logprobs"),
    "kl_rewards": ("ppo.py", "formulas ppo known_answers", "kl_rewards or exact_gradient and 1.0"),
    "whiten": ("ppo.py", "formulas ppo", "whiten and not plain_loop or plain_loop and 0.4"),
    "gae": ("ppo.py", "formulas ppo known_answers", "gae or carry_no_graph or exact_gradient and 0.5"),
    "policy_loss": ("ppo.py", "formulas ppo known_answers",
                    "policy_loss or policy_gradient_is_ratio or exact_gradient and 1.0"),
    "value_loss": ("ppo.py", "formulas ppo", "value_loss or value_gradient"),
    "AdaptiveKL.update": ("ppo.py", "formulas ppo", "adaptive_kl and not plain_loop"),
    "dpo_loss": ("dpo.py", "formulas dpo known_answers", "dpo_loss or dpo_gradient or each_kind and 0.0"),
    "Linear": ("model.py", "formulas adapters", "linear or adapter_starts or its_gradient or full_rank"),
}
# The functions to write where there are several, and other functions whose body would give the answer away.
PARTS = {"Linear": ["Linear.add_adapter", "Linear.forward", "Linear.matrix", "Linear.merge"]}
SPOILERS = {"pairwise_loss": [("reward_model.py", "ranking_loss"), ("reward_model.py", "evaluate")],
            "Linear": [("runtime/nf4.py", "PackedLinear.forward")]}


# ------------------------------------------------------------------------------------------ the copy

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
    file = EXERCISES[name][0]
    stages = STAGES[:STAGES.index(file) + 1] if file in STAGES else STAGES
    for folder in ("data", "runtime"):
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


# ----------------------------------------------------------------------------------------- the grade

class Results:
    """A pytest plugin that collects {sentence: [why a case of that test fails; None if it passes]}."""

    def __init__(self):
        self.reasons = {}

    def pytest_runtest_makereport(self, item, call):
        if call.when == "call" or call.excinfo:
            why = reason(call.excinfo) if call.excinfo else None
            self.reasons.setdefault(sentence(item.originalname), []).append(why)

    def pytest_collectreport(self, report):
        if report.failed:
            self.reasons["The tests can import it"] = [str(report.longrepr).splitlines()[-1]]


def sentence(test):
    """The name of a test as a sentence."""
    words = [word.upper() if word in ("sft", "kl", "gae", "dpo", "ipo", "td") else word
             for word in test.split("_")[1:]]
    return words[0][0].upper() + " ".join(words)[1:]


def reason(error):
    """Why a test fails, beyond its name: a line, or ""."""
    lines = [line for line in str(error.value).splitlines() if line] or [""]
    if error.errisinstance(AssertionError):
        if "not close" in lines[0]:
            return lines[1]                                     # the expected and the actual number
        return "" if lines[0].startswith("assert ") else lines[0]
    if error.typename == "NotImplementedError":
        return lines[0]
    mine = [entry for entry in error.traceback if HOMEWORK in Path(entry.path).parents]
    where = f", {mine[-1].path.relative_to(ROOT)}, line {mine[-1].lineno + 1}" if mine else ""
    return f"{lines[0]} ({error.typename}{where})"


def grade():
    """Print what holds of the exercise in homework/. Returns an error message, 1 if a test fails, else 0."""
    try:
        name = (HOMEWORK / "exercise.md").read_text("utf-8").split()[2]
        file, tests, which = EXERCISES[name]
        for part in PARTS.get(name, [name]):
            find((HOMEWORK / file).read_text("utf-8"), part)
    except FileNotFoundError as e:
        return f"{os.path.relpath(e.filename, ROOT)} is missing: make exercise NAME=... makes it"
    except SyntaxError as e:
        return f"homework/{file}, line {e.lineno}: {e.msg}"
    except StopIteration:
        return f"homework/{file} has no {part}"
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True      # for a file that changes twice in a second, it would be out of date
    import pytest
    results, holds = Results(), 0
    status = pytest.main(["-p", "no:terminal", "-p", "no:cacheprovider", "-o", "pythonpath=homework . tests",
                          "-k", which, *[f"tests/test_{test}.py" for test in tests.split()]], [results])
    for test, cases in results.reasons.items():
        wrong = [why for why in cases if why is not None]
        holds += not wrong
        why = next((f": {line}" for line in wrong if line), "")
        count = f" [{len(wrong)} of {len(cases)} cases]" if wrong and len(cases) > 1 else ""
        print(f"{'NOT YET' if wrong else 'holds  '}  {test}{why}{count}")
    print(f"{name}: {holds} of {len(results.reasons)} hold")
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(grade() if sys.argv[1:] == ["--grade"] else make(" ".join(sys.argv[1:])))
