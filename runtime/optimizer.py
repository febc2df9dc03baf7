"""AdamW and the learning rate schedule."""
import math

import torch


def make_optimizer(model, lr, weight_decay=0.0, eps=1e-8):
    """AdamW (Loshchilov & Hutter 2019) for all trained parameters. Only matrices decay: a norm's scale or a
    bias pulled towards 0 would change what the layer computes without making it simpler."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), eps=eps, fused=True)
    for p in trained:           # AdamW makes these at its first step; made here, a checkpoint can fill them
        optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def schedule(step, total, warmup, shape):
    """The factor on the learning rate at a step, counted from 0: linear warm-up over `warmup` steps, because
    Adam's first steps rest on hardly any statistics; then "constant", or "linear" or "cosine" decay towards 0
    after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if shape == "constant":
        return 1.0
    if shape == "linear":
        return 1 - done
    return 0.5 + 0.5 * math.cos(math.pi * done)                 # cosine
