"""Classes that stand in for a student's class in the teacher, where it computes with a number that it does not store.

A substitute is the same function on the student's own tensors. Being a class, it is still data in a plan.
"""

from typing import Callable

import torch
from timm.layers import SimpleNorm, SimpleNorm2d
from timm.models.edgenext import SplitTransposeBlock

from .context import RuleContext
from .rule import Rule, register_rule


class AlignedSplitTransposeBlock(SplitTransposeBlock):
    """EdgeNeXt's block with its splits at multiples of its stored width.

    ``torch.chunk`` rounds up: 88 channels in 3 are 30 + 30 + 28, but twice as many are 59 + 59 + 58.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, C, H, W) to the same shape."""
        *parts, last = x.split(self.width, dim=1)
        mixed, carry = [], 0
        for part, conv in zip(parts, self.convs):
            carry = conv(part + carry)
            mixed.append(carry)
        y = torch.cat([*mixed, last], dim=1)

        B, C, H, W = y.shape
        y = y.flatten(2).transpose(1, 2)
        if self.pos_embd is not None:
            y = y + self.pos_embd((B, H, W)).reshape(B, -1, H * W).transpose(1, 2)
        y = y + self.drop_path(self.gamma_xca * self.xca(self.norm_xca(y)))
        y = self.mlp(self.norm(y.reshape(B, H, W, C)))
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ReplicatedSimpleNorm(SimpleNorm):
    """Divides by the unbiased standard deviation of the student: n replicas of C channels have n (C - 1) freedoms."""

    replicas = 1
    dim = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., C) to the same shape."""
        x = x * torch.rsqrt(x.var(dim=self.dim, correction=self.replicas, keepdim=True) + self.eps)
        if self.weight is None:
            return x
        return x * self.weight.view(-1, *[1] * (-1 - self.dim))


class ReplicatedSimpleNorm2d(ReplicatedSimpleNorm, SimpleNorm2d):
    """The same for (B, C, H, W)."""

    dim = -3


def align_splits(rule: RuleContext) -> None:
    """Replaces the class."""
    rule.set('__class__', AlignedSplitTransposeBlock)


def count_freedoms(substitute: type) -> Callable[[RuleContext], None]:
    """Code of a rule that replaces the class by one that counts the replicas."""

    def code(rule: RuleContext) -> None:
        rule.set('__class__', substitute)
        rule.set('replicas', rule.ratio)

    return code


register_rule(SplitTransposeBlock, Rule(multiply=('width',), code=align_splits))
register_rule(SimpleNorm, Rule(code=count_freedoms(ReplicatedSimpleNorm)))
register_rule(SimpleNorm2d, Rule(code=count_freedoms(ReplicatedSimpleNorm2d)))
