"""lab/curves.py: metrics of runs as a figure."""
import json

import pytest

import evaluate
from lab import curves


def test_each_run_is_a_line_in_each_panel(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(8, 4))
    monkeypatch.setattr(evaluate, "Figure", lambda figsize: figure)
    for name, values in (("a", [1, 2, 6]), ("b", [4, None, 8])):
        (tmp_path / name).mkdir()
        steps = [{"step": i + 1, "score": x, "kl": 0.5} for i, x in enumerate(values)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)) + "\n")
    cfg = curves.Config(runs=(str(tmp_path / "a"), str(tmp_path / "b")), metrics="score,kl", smooth=2,
                        out=str(tmp_path / "figure.png"))
    curves.draw(cfg)
    assert [line.get_label() for line in figure.axes[0].lines] == ["a", "b"] and len(figure.axes) == 2
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[2, 1.5], [3, 4]]
    assert figure.axes[0].lines[1].get_xydata().tolist() == [[3, 6]]            # its step 2 is not finite
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a has no metric nothing: its metrics are step, score, kl"):
        curves.draw(curves.Config(runs=cfg.runs, metrics="nothing"))
    with pytest.raises(ValueError, match="nowhere has no metrics.jsonl"):
        curves.draw(curves.Config(runs=("nowhere",)))
    with pytest.raises(ValueError, match="name folders of runs"):
        curves.draw(curves.Config())
