"""Networks by folder or name."""
import pytest
import torch

from model import GPT, GPTConfig
from runtime import models


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


def test_a_reward_model_is_a_network_with_a_score(tmp_path):
    for head in ("lm", "scalar"):
        GPT(GPTConfig(20, 8, 1, 2, 8), head).save(tmp_path / head)
    assert models.load_reward_model(str(tmp_path / "scalar")).head_kind == "scalar"
    with pytest.raises(ValueError, match="/lm is not a reward model: it gives no score"):
        models.load_reward_model(str(tmp_path / "lm"))
