"""README.zh.md has the sections of README.md, each with the same commands, tables, numbers and links."""
import os
import re
from collections import Counter

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def sections(name):
    """The texts between headings, the beginning first."""
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return re.split(r"^#+ .*$", f.read(), flags=re.M)


def commands(text):
    """What stands in fences, and between backticks."""
    fences = re.findall(r"^```.*?^```", text, re.M | re.S)
    for fence in fences:
        text = text.replace(fence, "")
    return fences, Counter(re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", text))


def numbers(text):
    return re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"`[^`]+`|\]\([^)]*\)", "", text))


def rows(text):
    return [numbers(line) for line in text.splitlines() if line.startswith("|")]


PAIRS = list(zip(sections("README.md"), sections("README.zh.md")))


def test_both_have_the_same_sections():
    assert len(sections("README.md")) == len(sections("README.zh.md"))


@pytest.mark.parametrize("i", range(len(PAIRS)))
def test_a_section_has_the_same_commands_tables_numbers_and_links(i):
    english, chinese = PAIRS[i]
    assert commands(english)[0] == commands(chinese)[0]
    assert commands(english)[1] == commands(chinese)[1]
    assert rows(english) == rows(chinese)
    assert Counter(numbers(english)) == Counter(numbers(chinese))
    links = r"\]\(([^)]+)\)"
    assert re.findall(links, english) == re.findall(links, chinese)
