"""The figure of healthy runs: what is drawn is what the runs logged."""
import json

import pytest

from docs import normal


def write(folder, stage, metric, values):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"stage": stage}))
    steps = [{"step": i, metric: value} for i, value in enumerate(values, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def test_a_point_is_the_mean_of_its_part_of_the_run():
    steps = [{"a": float(i)} for i in range(2 * normal.PARTS)]
    assert normal.parts_of(steps, "a") == [2 * i + 0.5 for i in range(normal.PARTS)]
    sparse = [{"a": 1.0}] + [{}] * (normal.PARTS - 1)                   # a metric that is logged now and then
    assert normal.parts_of(sparse, "a") == [1.0] + [None] * (normal.PARTS - 1)
    assert normal.drawn(normal.parts_of(sparse, "a")) == ([0.5 / normal.PARTS], [1.0])


def test_a_band_is_from_the_lowest_to_the_highest_of_the_seeds(tmp_path):
    for seed, level in enumerate((1.0, 2.0, 6.0)):
        for stage in ("sft", "reward_model", "dpo", "ppo"):
            write(tmp_path / str(seed) / stage, f"{stage}.py", "loss", [level] * 40)
    found = normal.bands_of([tmp_path / str(seed) for seed in range(3)])
    assert found["sft loss"] == [[1.0, 3.0, 6.0]] * normal.PARTS
    assert found["ppo kl"] == [None] * normal.PARTS
    with pytest.raises(ValueError, match="no metrics.jsonl"):
        normal.bands_of([tmp_path / "nowhere"])


@pytest.mark.parametrize("stage, metric", [
    ("ppo.py", "kl"), ("variants.grpo", "kl"), ("dpo.py", "margin"), ("sft.py", "loss"),
    ("variants.preferences", "logp_chosen")])
def test_a_run_is_drawn_over_the_curves_of_its_stage(tmp_path, monkeypatch, stage, metric):
    figures, figure = [], pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(normal.evaluate, "Figure", lambda **how: figures.append(figure(**how)) or figures[-1])
    write(tmp_path / "run", stage, metric, [float(i) for i in range(54)])
    normal.draw(normal.Config(run=str(tmp_path / "run"), out=str(tmp_path / "a.png")))
    [axes] = [f.axes for f in figures]
    assert len(axes) == 1 and f": {metric}\n" in axes[0].get_title()
    healthy, own = axes[0].get_lines()
    assert list(own.get_ydata()) == [2 * i + 0.5 for i in range(27)] and len(healthy.get_ydata()) == 27
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_run_of_something_else_is_refused(tmp_path):
    write(tmp_path / "run", "ppo.py", "nothing_known", [1.0] * 30)
    with pytest.raises(ValueError, match="logs none of the curves"):
        normal.draw(normal.Config(run=str(tmp_path / "run"), out=str(tmp_path / "a.png")))


def test_the_page_gives_the_numbers_of_the_curves():
    bands = json.loads((normal.HERE / "normal.json").read_text("utf-8"))
    page = (normal.HERE / "normal.md").read_text("utf-8")
    assert set(bands) == {f"{stage} {metric}" for stage, metric, _ in normal.CURVES}
    for name, band in bands.items():
        assert len(band) == normal.PARTS and all(low <= mean <= high for low, mean, high in band)
        stage, metric = name.split()
        (_, first, _), (low, last, high) = band[0], band[-1]
        assert f"| {stage} `{metric}` | {first:.2g} → {last:.2g} ({low:.2g} to {high:.2g}) |" in page
