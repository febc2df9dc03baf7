"""Random ragged arrays in float64, tiny networks, and how near two tensors must be."""
import math

import pytest
import torch

from model import GPT, GPTConfig

B, T = 5, 9
seeds = pytest.mark.parametrize("seed", range(8))


def near(a, b):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def ragged(seed, n):
    """n arrays (B, T) in float64 and a mask: a prompt, an answer of its own length,
    sometimes a second turn."""
    torch.manual_seed(seed)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        start = int(torch.randint(1, T - 1, ()))
        end = int(torch.randint(start + 1, T + 1, ()))
        mask[b, start:end] = True
        if end - start > 3 and b % 2:
            mask[b, start + 1:start + 3] = False                # somebody else speaks in between
    return *torch.randn(n, B, T).double(), mask


def dirt(x, mask, junk=30.0):
    """x with other numbers outside the mask."""
    return torch.where(mask, x, torch.randn_like(x) * junk)


def spoilt(x, mask, junk):
    return torch.where(mask, x, torch.full_like(x, junk))


def tiny(head, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=13, block_size=T, n_layer=1, n_head=2, n_embd=8), head).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def nll(gap):
    """−log σ(gap)."""
    return math.log1p(math.exp(-gap))
