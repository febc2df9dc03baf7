"""Networks by folder or name."""
import pytest
import torch

from model import GPT, GPTConfig
from runtime import models
from runtime.safetensors import save_tensors


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
