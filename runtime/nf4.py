"""QLoRA (Dettmers et al. 2023): adapters are trained beside frozen matrices in 4 bits."""
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from model import Linear


class NF4(nn.Module):
    """A frozen matrix in 4.13 bits per number: NF4 (Dettmers et al. 2023, section 3). Calling it gives the
    matrix in float32.

    The weights of a network are roughly normally distributed. So the 16 levels are quantiles of a normal
    distribution, and each is used about equally often (appendix E). Each block of 64 numbers is divided by
    its largest absolute value (its scale), and of each number only the index of the nearest level is kept. In
    float32 the scales would take 0.5 bits per number, so they too are kept in 8 bits: less their mean, in
    groups of 256 with a spread each, as float8."""

    def __init__(self, W):
        super().__init__()
        self.shape = W.shape
        blocks = in_groups(W.detach().float(), 64)
        scales = blocks.abs().amax(1, keepdim=True)
        levels = nf4_levels().to(W.device)
        index = torch.bucketize(blocks / scales.clamp(min=1e-30), (levels[1:] + levels[:-1]) / 2)
        index = index.to(torch.uint8).flatten()
        mean = scales.mean()
        groups = in_groups(scales - mean, 256)
        spread = groups.abs().amax(1, keepdim=True).clamp(min=1e-30) / 448          # float8's largest number
        small = (groups / spread).to(torch.float8_e4m3fn).view(torch.uint8)
        for name, x in (("index", index[::2] * 16 + index[1::2]), ("scales", small), ("spread", spread),
                        ("mean", mean)):
            setattr(self, name, nn.Parameter(x, requires_grad=False))

    def forward(self):
        scales = (self.scales.view(torch.float8_e4m3fn).float() * self.spread).flatten() + self.mean
        blocks = F.embedding(self.index.int(), pairs_of_levels(self.index.device)).view(-1, 64)
        return (blocks * scales[:len(blocks), None]).flatten()[:math.prod(self.shape)].view(self.shape)


def nf4_levels():
    """16 quantiles of the normal distribution, scaled to -1 .. 1: 7 below 0, 0 itself, 8 above."""
    def quantiles(n):       # the outermost lies half a step from the end, whose quantile would be infinite
        return torch.special.ndtri(torch.linspace(1 - (1 / 30 + 1 / 32) / 2, 0.5, n + 1, dtype=torch.float64))
    levels = torch.cat([-quantiles(7)[:-1], quantiles(8).flip(0)])
    return (levels / levels.max()).float()


@functools.cache
def pairs_of_levels(device):
    """(256, 2): the two numbers that each byte stands for. They are copied to a device once, because a GPU
    waits for each copy."""
    return torch.cartesian_prod(nf4_levels(), nf4_levels()).to(device)


def in_groups(x, n):
    """The numbers of x as rows of n, the last row filled up with 0."""
    return F.pad(x.flatten(), (0, -x.numel() % n)).view(-1, n)


class TimesNF4(torch.autograd.Function):
    """x·Wᵀ + b for an NF4 W. The backward pass unpacks W again: keeping it in float32 until then would cost
    the memory that 4 bits have saved."""

    @staticmethod
    def forward(ctx, x, W, b):
        ctx.W = W
        return F.linear(x, W().to(x.dtype), b)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.W().to(gradient.dtype), None, None


class PackedLinear(Linear):
    """A Linear whose W is an NF4."""

    def forward(self, x):
        y = TimesNF4.apply(x, self.nf4, self.bias)
        return y + F.linear(self.scale * F.linear(x, self.A), self.B) if self.scale else y

    @property
    def weight(self):
        return self.nf4()

    def merge(self):
        """Become an ordinary Linear again, whose W is W + (α/r)·B·A."""
        W = self.nf4()
        del self.nf4
        self.__class__ = Linear
        self.weight = nn.Parameter(W)
        self.merge()


def pack_layer(layer):
    """Keep a Linear's W in 4 bits from now on, frozen."""
    layer.nf4, layer.weight = NF4(layer.weight), None
    layer.__class__ = PackedLinear


def pack(model):
    """pack_layer for all layers of a GPT's blocks."""
    for module in model.blocks.modules():
        if isinstance(module, Linear):
            pack_layer(module)
