"""The mistakes that helpers/mistakes.py plants still fit the code."""
import os

import pytest
from helpers.mistakes import MISTAKES
from helpers.start import ROOT


@pytest.mark.parametrize("path", MISTAKES)
def test_what_a_mistake_replaces_is_there_once(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        code = f.read()
    lost = [name for name, right, _ in MISTAKES[path] if code.count(right) != 1]
    assert not lost, f"helpers/mistakes.py: adapt the entries of {path} whose right code is gone: {lost}"
