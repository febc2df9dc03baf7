"""Networks from folders."""
import pytest

from runtime import models


def test_require_says_what_to_run_first(tmp_path):
    said = r"no model in .*/sft: run `python sft\.py` first, or name another"
    with pytest.raises(ValueError, match=said) as e:
        models.require(str(tmp_path / "sft"))
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="no model in .*/mine: name another folder"):
        models.require(str(tmp_path / "mine"))
    (tmp_path / "config.json").write_text("{}")
    models.require(str(tmp_path))
