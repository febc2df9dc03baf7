"""The SFT loss, and the stage around it."""
import pytest
import torch
from helpers.arrays import B, T, dirt, near, ragged, seeds, tiny

from sft import sft_loss


@seeds
def test_sft_loss_is_the_mean_over_tokens_not_over_rows(seed):
    logprobs, mask = ragged(seed, 1)
    kept = [logprobs[b, t].item() for b in range(B) for t in range(T) if mask[b, t]]
    logprobs = dirt(logprobs, mask).requires_grad_()
    loss = sft_loss(logprobs, mask)
    near(loss, -sum(kept) / len(kept))
    loss.backward()
    near(logprobs.grad, -mask.double() / len(kept))


@pytest.mark.parametrize("sizes", [[1, 4], [2, 2, 1], [1] * 5])
def test_micro_batches_by_their_share_of_tokens_leave_sfts_gradient_the_same(sizes):
    model, mask = tiny("lm"), ragged(5, 1)[1]
    tokens = torch.randint(13, (B, T))
    sft_loss(model.logprobs(tokens, mask), mask).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for r in torch.arange(B).split(sizes):
        (sft_loss(model.logprobs(tokens[r], mask[r]), mask[r]) * mask[r].sum() / mask.sum()).backward()
    for n, p in model.named_parameters():
        near(p.grad, want[n])
