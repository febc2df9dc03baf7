"""README.zh.md has the sections of README.md, each with the same commands, tables, numbers and links."""
import os
import re
from collections import Counter

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OTHER = {"README.md": "[中文](README.zh.md)", "README.zh.md": "[English](README.md)"}
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
CODE = re.compile(r"`([^`]+)`")


def lines(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read().split("\n")


def sections(name):
    """A file cut before each heading, without the line that leads to the other language."""
    text = "\n".join(line for line in lines(name) if line != OTHER[name])
    text = FENCE.sub(lambda fence: fence[0].replace("\n#", "\n #"), text)     # a comment is no heading
    return re.split(r"^(?=#+ )", text, flags=re.M)[1:]


def level(section):
    return len(section) - len(section.lstrip("#"))


def prose(section):
    return FENCE.sub("", section)


def codes(text):
    """What stands between backticks, which a line may break."""
    return Counter(re.sub(r"\s+", " ", code) for code in CODE.findall(text))


def numbers(text):
    """Numbers outside code and links' addresses, with their signs. "95 %" is "95%", as Chinese writes it."""
    text = re.sub(r"\]\([^)]*\)", "]", CODE.sub("", text))
    return [re.sub(r"\s", "", number) for number in re.findall(r"[-−±]?\d+(?:[.,]\d+)*(?:\s?%)?", text)]


def rows(text):
    """Of each cell of each row of the tables: its numbers and its code."""
    return [[(numbers(cell), codes(cell)) for cell in line.strip().strip("|").split("|")]
            for line in text.split("\n") if line.startswith("|")]


def links(text):
    return re.findall(r"\]\(([^)]+)\)", text)


PAIRS = list(zip(sections("README.md"), sections("README.zh.md")))


def test_both_have_the_same_sections():
    assert [level(s) for s in sections("README.md")] == [level(s) for s in sections("README.zh.md")]


@pytest.mark.parametrize("name", OTHER)
def test_each_leads_to_the_other_under_its_title(name):
    assert lines(name)[1:4] == ["", OTHER[name], ""] and lines(name).count(OTHER[name]) == 1


@pytest.mark.parametrize("i", range(len(PAIRS)))
def test_a_section_has_the_same_commands_tables_numbers_and_links(i):
    english, chinese = PAIRS[i]
    assert FENCE.findall(english) == FENCE.findall(chinese)
    english, chinese = prose(english), prose(chinese)
    assert codes(english) == codes(chinese)
    assert rows(english) == rows(chinese)
    assert Counter(numbers(english)) == Counter(numbers(chinese))
    assert links(english) == links(chinese)
