"""OFA-KD (arXiv 2310.19444): every stage of the learner predicts classes, which any teacher can teach."""

from typing import Any, List, Tuple

import torch
import torch.nn as nn
from timm.layers import SeparableConvNormAct, trunc_normal_

from ..losses import ofa_loss
from ..losses.hyperparameters import loss_defaults
from .base import Distiller
from .feature_tap import ModelOutput

__all__ = ['OFA']


class OFA(Distiller):
    """The sum of :func:`timm_gpd.losses.ofa_loss` over the learner's logits and those projected from its stages.

    A projector runs through the remaining stages as the learner does, in their widths and strides, with two separable
    convolutions for each (a 1x1 convolution after the last). The code published with the paper does so for CNNs, up to
    the width at the end, and uses transformer blocks for ViTs; here a ViT's patches are a map like any other.

    Hyperparameters: those of the loss.
    """

    learner_needs = frozenset({'stages'})
    defaults = loss_defaults(ofa_loss)

    def __init__(self, learner: ModelOutput, teacher: ModelOutput, **hyperparameters: Any) -> None:
        super().__init__(learner, teacher, **hyperparameters)
        stages = [(stage.shape[1], stage.shape[-1]) for stage in learner.stages]
        self.projectors = nn.ModuleList(
            [
                nn.Sequential(
                    *_remaining_stages(stages[index:]),
                    nn.AdaptiveAvgPool2d(1),
                    nn.Flatten(),
                    nn.Linear(stages[-1][0], learner.logits.shape[-1]),
                )
                for index in range(len(stages))
            ]
        )
        self.apply(_init_weights)

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        loss = ofa_loss(learner.logits, teacher.logits, target, **self.hyperparameters)
        for projector, stage in zip(self.projectors, learner.stages):
            loss = loss + ofa_loss(projector(stage), teacher.logits, target, **self.hyperparameters)
        return loss


def _remaining_stages(stages: List[Tuple[int, int]]) -> List[nn.Module]:
    """From the first of some stages, each given as channels and size, to the last."""
    if len(stages) == 1:
        return [nn.Conv2d(stages[0][0], stages[0][0], 1)]
    blocks: List[nn.Module] = []
    for (channels, size), (next_channels, next_size) in zip(stages, stages[1:]):
        blocks += [
            SeparableConvNormAct(channels, channels, stride=max(size // next_size, 1)),
            SeparableConvNormAct(channels, next_channels),
        ]
    return blocks


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
