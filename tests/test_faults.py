"""The faults of lab/faults.py change what docs/troubleshooting.md says they change."""
import re
from pathlib import Path

import pytest
from helpers.start import ROOT

from lab import faults

PAGE = Path(ROOT, "docs/troubleshooting.md").read_text("utf-8")


@pytest.fixture(scope="module")
def found(chain):
    cfg = faults.Config(models=str(chain[0] / "out"), steps=3, batch=16)
    healthy = {}
    return {name: faults.compare(cfg, name, healthy) for name in faults.FAULTS}


@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_fault_shows_in_the_log_and_on_the_page(found, name):
    assert any(healthy != faulty for healthy, faulty in found[name].values())
    assert f"python -m lab.faults {name}" in PAGE


def test_every_fault_of_the_page_is_there():
    named = re.findall(r"python -m lab.faults (\w+)", PAGE)
    assert sorted(named) == sorted(faults.FAULTS)


def test_what_the_page_says_of_single_faults_holds(found):
    """On a tiny chain in three steps: what must hold at once, and not what learning shows in the end."""
    def of(name, metric):
        return found[name][metric]
    healthy, faulty = of("reference_moves", "kl")
    assert [*faulty, healthy[0]] == pytest.approx([0, 0, 0, 0], abs=1e-4) and abs(healthy[2]) > 1e-3
    assert of("sampler_differs", "approx_kl")[1][0] > 3 * of("sampler_differs", "approx_kl")[0][0]
    assert of("dropout", "approx_kl")[1][0] > of("dropout", "approx_kl")[0][0]
    assert of("rate_too_low", "approx_kl")[1][0] < 1e-6 < of("rate_too_low", "approx_kl")[0][0]
    assert of("rate_too_high", "kl")[1][2] > 3 * of("rate_too_high", "kl")[0][2]
