"""The edits of docs/changing.md apply to ppo.py as it is, and fail the tests that the page says they fail."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.start import ROOT

PAGE = Path(ROOT, "docs/changing.md").read_text("utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.M)[1:]
EDITS = {section.splitlines()[0]: section for section in SECTIONS if "```diff" in section}
[COMMAND] = re.findall(r"^python -m (pytest .*)$", PAGE, flags=re.M)


def edited(section, folder):
    """A copy of the project with a section's edit."""
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "homework", "__pycache__"))
    [diff] = re.findall(r"```diff\n(.*?)```", section, flags=re.S)
    subprocess.run(["git", "apply", "-"], input=diff, cwd=copy, text=True, check=True)
    return copy


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("name", EDITS)
def test_the_edit_applies(tmp_path, name):
    copy = edited(EDITS[name], tmp_path)
    assert (copy / "ppo.py").read_text("utf-8") != Path(ROOT, "ppo.py").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("name", EDITS)
def test_the_edit_fails_the_tests_that_the_page_names_and_no_others(tmp_path, name):
    copy = edited(EDITS[name], tmp_path)
    done = subprocess.run([sys.executable, "-m", *COMMAND.split()], cwd=copy, capture_output=True, text=True)
    failed = re.findall(r"^FAILED \S+?::(\w+)", done.stdout, flags=re.M)
    assert set(failed) == set(re.findall(r"`(test_\w+)`", EDITS[name]))
    for test in re.findall(r"`(test_\w+)`, (?:in|with) all eight", EDITS[name]):
        assert failed.count(test) == 8
