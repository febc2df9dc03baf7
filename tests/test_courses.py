"""The functions that docs/courses.md offers run in a file with `import torch` alone above them."""
import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).resolve().parent.parent / "docs/courses.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n# (.*?)\n(.*?)```", PAGE, re.DOTALL)


def found(name):
    """What a name of the page stands for: ppo.gae, model.GPT.logprobs."""
    parts, rest = name.split("."), []
    while True:
        try:
            thing = importlib.import_module(".".join(parts))
            break
        except ModuleNotFoundError:
            rest.insert(0, parts.pop())
    for part in rest:
        thing = getattr(thing, part)
    return thing


@pytest.mark.parametrize("names, code", BLOCKS, ids=[names for names, _ in BLOCKS])
def test_a_pasted_function_runs_alone(names, code):
    """With its docstring; in float64 too; and without the functions that it needs its example fails."""
    sources = [inspect.getsource(found(name)) for name in names.split(", ")]
    assert all(ast.get_docstring(ast.parse(source).body[0]) for source in sources)
    exec("\n".join(["import torch", *sources, code]), {})
    doubled = f"torch.set_default_dtype(torch.float64)\n{code}"
    try:
        exec("\n".join(["import torch", *sources, doubled]), {})
    finally:
        torch.set_default_dtype(torch.float32)
    for i in range(len(sources)):
        with pytest.raises(NameError):
            exec("\n".join(["import torch", *sources[:i], *sources[i + 1:], code]), {})


def test_every_function_in_the_table_exists_and_the_formulas_of_the_stages_have_an_example():
    named = set(re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", PAGE.replace("tests/test_courses.py", "")))
    assert len(named) > 12 and all(callable(found(name)) for name in named)
    shown = {name for names, _ in BLOCKS for name in names.split(", ")}
    plain = {name for name in named if inspect.isfunction(found(name)) and found(name).__qualname__.islower()}
    assert plain - shown == set()
