"""Attention in random networks: classes that a rule describes, and one that none does."""

import random
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from random_blocks import Apply, block, parameter
from timm_gpd import Rule, register_rule


class Attention(nn.Module):
    """Attention of heads; a rule says what counts them."""

    def __init__(self, width: int, num_heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class UnruledAttention(Attention):
    """The same without the rule."""


def _head_dim(module: Attention) -> int:
    return module.qkv.out_features // (3 * module.num_heads)


register_rule(Attention, Rule(multiply=('num_heads',), blocks={'qkv.out': _head_dim, 'proj.in': _head_dim}))
register_rule(UnruledAttention, Rule())


@block('attention', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    return Attention(width, 2, fused=rng.random() < 0.5)


@block('attention without a rule', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    return UnruledAttention(width, 2, fused=rng.random() < 0.5)


@block("torch's attention", 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    attention = nn.MultiheadAttention(width, 2, batch_first=True, bias=rng.random() > 0.5)
    if rng.random() < 0.5:
        return Apply(lambda self, x: self.attention(query=x, key=x, value=x)[0], attention=attention)
    return Apply(lambda self, x: self.attention(x, x, x)[0], attention=attention)


@block('attention by einsum', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum('bnc,chd->bhnd', x, w) for w in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v)
        return torch.einsum('bhnd,hdo->bno', x, self.o)

    return Apply(forward, **{name: parameter(width, 2, 3) for name in 'qkv'}, o=parameter(2, 3, width))
