"""Require bounds of the last model in a report: ends with status 1 if one is not met, for tests in CI.

    python -m lab.require out/report.json "win_rate>=0.7" "kl<5"
    python -m lab.require out/red_team.json "unsafe_declined>=0.9"
"""
import json
import operator
import re
import sys
from pathlib import Path

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def unmet(conditions, numbers):
    """The conditions that a model's numbers do not meet, in words; a number that was not measured meets none.
    Ends the program with status 2 for what is no condition."""
    found = []
    for text in conditions:
        match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)\s*", text)
        if not match:
            print(f"{text!r} is not a condition such as kl<5", file=sys.stderr)
            sys.exit(2)
        name, sign, bound = match.groups()
        value = numbers.get(name)
        if not isinstance(value, (int, float)) or not OPERATORS[sign](value, float(bound)):
            found.append(f"{name} is {value}, not {sign} {bound}")
    return found


if __name__ == "__main__":
    *_, (model, measured) = json.loads(Path(sys.argv[1]).read_text("utf-8"))["models"].items()
    if missed := unmet(sys.argv[2:], measured):
        sys.exit(f"{model}: {'; '.join(missed)}")
