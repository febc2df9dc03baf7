"""The grade of an exercise (docs/exercise.py): run its tests on homework/, and say in words what holds.

    python tests/helpers/grade.py

homework/ comes first on the path: modules that it lacks, like variants/, are the project's, and import the
homework's stages.
"""
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "docs"))
from exercise import EXERCISES, HOMEWORK, PARTS, ROOT, find  # noqa: E402

# {exercise: (the names of test files, which of their tests: an expression for pytest -k)}
TESTS = {
    "sft_loss": ("formulas sft ppo", "sft_loss or sfts_gradient"),
    "pairwise_loss": ("formulas reward_model known_answers",
                      "pairwise_loss and not ranking_loss or true_differences"),
    "ranking_loss": ("formulas reward_model", "ranking_loss or soft_label"),
    "sample": ("formulas model",
               "test_sample_ or ends_of_the_uniform or top_k or sampled_frequencies or cached_logprobs"),
    "kl_rewards": ("formulas ppo known_answers", "kl_rewards or exact_gradient and 1.0"),
    "whiten": ("formulas ppo", "whiten and not plain_loop or plain_loop and 0.4"),
    "gae": ("formulas ppo known_answers", "gae or carry_no_graph or exact_gradient and 0.5"),
    "policy_loss": ("formulas ppo known_answers",
                    "policy_loss or policy_gradient_is_ratio or exact_gradient and 1.0"),
    "value_loss": ("formulas ppo", "value_loss or value_gradient"),
    "AdaptiveKL.update": ("formulas ppo", "adaptive_kl and not plain_loop"),
    "dpo_loss": ("formulas dpo known_answers", "dpo_loss or dpo_gradient or each_kind and 0.0"),
    "Linear": ("formulas adapters", "linear or adapter_starts or its_gradient or full_rank"),
    "read_logprobs": ("formulas model", "read_logprobs or read_entropy or softmax_of_logits or who_asks"),
    "approximate_kl": ("formulas", "approximate_kl"),
    "grpo": ("grpo variants", "test_grpo_ or in_groups or best_policy and group and 8"),
    "rloo": ("grpo variants", "test_rloo or in_groups or best_policy and rloo"),
}


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
    words = [word.upper() if word in ("sft", "kl", "gae", "dpo", "ipo", "td", "grpo", "rloo") else word
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
        file, (tests, which) = EXERCISES[name], TESTS[name]
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
    sys.exit(grade())
