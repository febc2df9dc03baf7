"""The notebook docs/tour.ipynb, from top to bottom, on the models of a small chain."""
import json
import os
import shutil
from pathlib import Path

from helpers.start import ROOT, run_copies

DRIVER = """
import sys
import types
shown = types.ModuleType("IPython.display")
shown.display, shown.clear_output = print, lambda wait: None
sys.modules["IPython.display"] = shown
import matplotlib
matplotlib.use("Agg")
names = {}
for code in sys.stdin.read().split("# a new cell\\n"):
    exec(code, names)
"""


def cells(kind):
    page = json.loads(Path(ROOT, "docs/tour.ipynb").read_text("utf-8"))
    return [cell for cell in page["cells"] if cell["cell_type"] == kind]


def test_the_notebook_runs_from_top_to_bottom(chain, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(chain[0] / "out", out)
    shutil.copytree(out / "ppo", out / "ppo_no_kl")
    code = "# a new cell\n".join("".join(cell["source"]) + "\n" for cell in cells("code"))
    for right, small in (('"out/tour"', repr(str(out))), ('"demo.py", "--out", OUT]', '"demo.py", "--help"]'),
                         ("steps=10, batch=64", "steps=2, batch=8, max_new_tokens=12")):
        assert code.count(right) == 1
        code = code.replace(right, small)
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    done = run_copies([str(tmp_path / "driver.py")], ROOT, [environment], code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "log π_ref" in done.stdout and done.stdout.count("judge") >= 16
    assert (out / "mine/model.safetensors").exists()


def test_the_notebook_was_executed_in_order_and_shows_what_came_out():
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code[1:])
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
