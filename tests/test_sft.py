"""The SFT loss, and the stage around it."""

import pytest
import torch
from helpers import plainly
from helpers.arrays import B, T, dirt, near, ragged, seeds, tiny

import sft
from data import loading
from data.tokenizer import Tokenizer
from model import GPT
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


SHARED = dict(batch=40, warmup=4)
CASES = [                                       # each flag of the stage is set in one of them, or in SHARED
    dict(),
    dict(epochs=2, batch=33, lr=1e-2, warmup=3, decay="linear", weight_decay=0.7, max_norm=0.2, evals=3,
         seed=5),
    dict(decay="constant", warmup=0, max_norm=0.0, evals=2, micro_batch=3, micro_tokens=100, batch=41),
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_the_stage_learns_and_logs_what_a_plain_loop_does(trained, settings):
    cfg, model, lines, about = trained(sft, init="out/sft", **SHARED | settings)
    plain, tokenizer = GPT.load("out/sft"), Tokenizer.load("out/sft")
    conversations, held_out = loading.load("demonstrations", loading.WORLD)
    expected = plainly.sft(cfg, plain, tokenizer, conversations, held_out)
    plainly.assert_same_lines(lines, expected)
    plainly.assert_same_weights(model, plain)
    assert about["held_out_loss"] == pytest.approx(plainly.sft_held_out(plain, tokenizer, held_out), abs=1e-6)


def test_a_new_model_has_the_shape_of_its_flags_and_the_datas_tokenizer(trained):
    cfg, model, _, _ = trained(sft, n_layer=2, n_head=4, n_embd=8, block_size=40, batch=200)
    shape = model.config
    assert (shape.n_layer, shape.n_head, shape.n_embd, shape.block_size) == (2, 4, 8, 40)
    assert shape.vocab_size == 1024 and shape.mlp == "gelu"
    assert Tokenizer.load(cfg.out).ranks == Tokenizer.load("out/world").ranks
