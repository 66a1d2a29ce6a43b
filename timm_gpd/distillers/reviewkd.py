"""ReviewKD (arXiv 2104.09044): deep stages of the learner help to imitate the teacher's shallow ones."""

from typing import Any, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..losses import hcl_loss
from .base import Distiller, deepest_pairs
from .feature_tap import ModelOutput

__all__ = ['ReviewKD']


class ReviewKD(Distiller):
    """Residual learning with attention based fusion (Sec. 3.2) and the hierarchical context loss (Sec. 3.3).

    The levels are the stages and, as the deepest, the embedding. Stages are what timm offers, after the activation; the
    code published with the paper takes the teacher's before it.

    Hyperparameters: ``mid_channels``, the width in which levels are fused, at most that of the learner's embedding.
    """

    learner_needs = teacher_needs = frozenset({'stages', 'embedding'})
    defaults = {'mid_channels': 512}

    def __init__(self, learner: ModelOutput, teacher: ModelOutput, **hyperparameters: Any) -> None:
        super().__init__(learner, teacher, **hyperparameters)
        levels, teacher_levels = deepest_pairs(_levels(learner), _levels(teacher))
        mid_channels = min(self.hyperparameters['mid_channels'], levels[-1].shape[1])
        self.fusions = nn.ModuleList(
            [
                Fusion(level.shape[1], mid_channels, teacher_level.shape[1], fuse=level is not levels[-1])
                for level, teacher_level in zip(levels, teacher_levels)
            ]
        )

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        levels, teacher_levels = deepest_pairs(_levels(learner), _levels(teacher))
        imitations: List[torch.Tensor] = []
        residual = None
        for fusion, level, teacher_level in reversed(list(zip(self.fusions, levels, teacher_levels))):
            imitation, residual = fusion(level, residual, teacher_level.shape[-2:])
            imitations.insert(0, imitation)
        return hcl_loss(imitations, teacher_levels)


class Fusion(nn.Module):
    """Mixes one level with what came from the deeper ones, and projects the mixture to a level of the teacher.

    Args:
        in_channels: the level's width.
        mid_channels: width of the mixture.
        out_channels: width of the teacher's level.
        fuse: whether there are deeper levels.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(in_channels, mid_channels, 1, bias=False), nn.BatchNorm2d(mid_channels))
        self.attention = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid()) if fuse else None
        self.expand = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        for conv in (self.reduce[0], self.expand[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(
        self,
        x: torch.Tensor,
        residual: Optional[torch.Tensor],
        size: Tuple[int, int],
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Imitation of the teacher's level, and what the next shallower level receives, both of the given size."""
        x = self.reduce(x)
        if self.attention is not None:
            share = self._shares(x, residual)
            x = x * share[:, :1] + _resized(residual, x.shape[-2:]) * share[:, 1:]
        x = _resized(x, size)
        return self.expand(x), x

    def _shares(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What attention gives to both, shape (B, 2, H, W): that of one stacked on the other, resized.

        Both are large, so they are not stacked, and a 1x1 convolution comes to the same before resizing as after it.
        """
        conv, sigmoid = self.attention
        of_x, of_residual = conv.weight.chunk(2, 1)
        return sigmoid(F.conv2d(x, of_x, conv.bias) + _resized(F.conv2d(residual, of_residual), x.shape[-2:]))


def _resized(x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode='nearest')


def _levels(output: ModelOutput) -> List[torch.Tensor]:
    return [*output.stages, output.embedding[:, :, None, None]]
