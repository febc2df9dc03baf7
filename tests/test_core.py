"""The core stands alone: nothing in it imports variants/, feedback/ or lab/, and without them its stages, the
demo and its tests work."""
import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers.start import ROOT, SMALL, ranks, run_copies

from runtime.files import write_json

OUTER = {"variants", "feedback", "lab"}
CORE = ["model.py", "sft.py", "reward_model.py", "ppo.py", "dpo.py", "evaluate.py", "data", "runtime", "docs"]


def imports(path):
    """The first names of all modules that a file imports, at its top or in a function."""
    with open(path, encoding="utf-8") as f:
        nodes = list(ast.walk(ast.parse(f.read())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def files(path):
    if path.endswith(".py"):
        return [path]
    return [os.path.join(path, name) for name in sorted(os.listdir(path)) if name.endswith(".py")]


def test_no_file_of_the_core_imports_what_stands_beside_it():
    found = {path: imports(path) & OUTER for name in CORE for path in files(os.path.join(ROOT, name))}
    assert len(found) > 30 and not {path: names for path, names in found.items() if names}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A copy of the project without the three folders and the tests that are about them."""
    copy = str(tmp_path_factory.mktemp("core") / "project")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "homework", "bench",
                                                              "__pycache__", ".*_cache", *OUTER))
    for path in files(os.path.join(copy, "tests")):
        if imports(path) & OUTER and "test_gpu" not in path:    # it imports the planner for one test
            os.remove(path)
    return copy


def run(folder, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def demo(folder):
    """What demo.py of a folder prints."""
    helper = os.path.join(ROOT, "tests/helpers/commands_in_copies.py")
    done = run_copies([helper, "demo.py"], folder, ranks(0))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_demo_runs_without_them(alone, small_world):
    """`make demo` with the flags of a small chain, and once more."""
    shutil.copytree(small_world, os.path.join(alone, "out/demo/world"))
    write_json(os.path.join(alone, "out/demo/world/run.json"), {"seed": 0})
    program = os.path.join(alone, "demo.py")
    with open(program, encoding="utf-8") as f:
        text = f.read()
    for name, flags in SMALL.items():
        text = text.replace(f'"{name}.py ', f'"{name}.py {flags} --device cpu ')
    text = text.replace(" --steps 60", "")
    with open(program, "w", encoding="utf-8") as f:
        f.write(text)
    printed = demo(alone)
    heads = re.findall(r"^\d of 7  .*\n\$ python (\S+)", printed, re.M)
    assert heads == ["-m", "sft.py", "reward_model.py", "dpo.py", "ppo.py", "ppo.py", "evaluate.py"]
    for name in ("dpo", "ppo_no_kl"):               # what ran beside another one is printed too, and whole
        assert f"wrote out/demo/{name}/ after" in printed
    assert "open out/demo/report.html in a browser" in printed
    assert len(re.findall("holds this run already", demo(alone))) == 5


def test_its_tests_can_be_collected_without_them(alone):
    done = run_copies(["-m", "pytest", "-q", "--collect-only"], alone, ranks(0))
    assert done.returncode == 0, done.stdout[-2000:]
    for name in ("test_ppo", "test_dpo", "test_known_answers", "test_run", "test_sharding", "test_evaluate"):
        assert f"tests/{name}.py::" in done.stdout


@pytest.mark.slow
def test_its_tests_pass_without_them(alone):
    run(alone, sys.executable, "-m", "pytest", "-q", "--ignore", "tests/test_mistakes.py",
        "--ignore", "tests/test_core.py", "--ignore", "tests/test_readme.py")
