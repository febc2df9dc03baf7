"""Networks by folder or name."""
import sys
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig
from runtime import models
from runtime.safetensors import save_tensors


def test_a_folder_without_a_model_says_what_to_run_first(tmp_path):
    said = r"no model in .*/sft: run `python sft\.py` first, or name another"
    with pytest.raises(ValueError, match=said) as e:
        models.find(str(tmp_path / "sft"))
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="no model in .*/mine: name another folder"):
        models.find(str(tmp_path / "mine"))
    (tmp_path / "config.json").write_text("{}")
    assert models.find(str(tmp_path)) == str(tmp_path)


def test_a_name_of_the_hub_is_fetched_where_that_can_be_done(monkeypatch):
    hub = SimpleNamespace(snapshot_download=lambda name, allow_patterns: f"/fetched/{name}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert models.find("owner/some-model.1") == "/fetched/owner/some-model.1"

    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")
    hub.snapshot_download = fail
    with pytest.raises(ValueError, match="no model in gpt2, and the hub does not give it .*: put its") as e:
        models.find("gpt2")
    assert "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="no model in owner/name: .*huggingface_hub is installed"):
        models.find("owner/name")


@pytest.mark.parametrize("head, tied", [("lm", True), ("lm", False), ("scalar", True)])
def test_new_tokens_start_as_the_mean_of_the_others_and_leave_these_as_they_were(tmp_path, head, tied):
    torch.manual_seed(0)
    GPT(GPTConfig(10, 8, 1, 1, 4, tied=tied), head).save(tmp_path)
    before, after = models.load(str(tmp_path)), models.load(str(tmp_path), vocab_size=12)
    assert after.config.vocab_size == 12 and models.load(str(tmp_path), vocab_size=9).config.vocab_size == 10
    old, new = before.token_embedding.weight, after.token_embedding.weight
    torch.testing.assert_close(new, torch.cat([old, old.mean(0, keepdim=True).expand(2, -1)]))
    x = torch.randint(10, (2, 8))
    found = after(x)[..., :10] if head == "lm" else after(x)        # a wider product may round differently
    torch.testing.assert_close(found, before(x))
    after.save(tmp_path / "new")
    assert GPT.load(tmp_path / "new").config.vocab_size == 12


def test_what_is_known_of_another_models_scores_is_refused_in_one_line(tmp_path):
    GPT(GPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=8), "scalar").save(str(tmp_path))
    assert models.load_reward_model(str(tmp_path)).known is None
    for C, fits in ((8, True), (6, False)):
        known = {"heads": torch.zeros(3, C), "bias": torch.zeros(3), "mean": torch.zeros(C),
                 "precision": torch.eye(C), "threshold": torch.tensor(1.0)}
        save_tensors(str(tmp_path / models.UNCERTAINTY), known)
        if fits:
            assert models.load_reward_model(str(tmp_path)).known.keys() == known.keys()
            continue
        with pytest.raises(ValueError, match="uncertainty.safetensors does not fit the model beside it"):
            models.load_reward_model(str(tmp_path))
