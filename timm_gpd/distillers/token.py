"""Distillation by a token of its own (arXiv 2012.12877): the token's classifier learns from the teacher."""

from typing import Any

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..losses import kd_loss
from .base import Distiller
from .feature_tap import ModelOutput

__all__ = ['TOKEN_KINDS', 'Token']

TOKEN_KINDS = ('soft', 'hard')


class Token(Distiller):
    """What timm calls token distillation, of models with a distillation token.

    The logits of the token learn from the teacher, and those of the class, which are the learner's while it trains,
    from the target. In evaluation mode such a model gives the mean of both.

    Args:
        learner: output of the model that learns.
        teacher: output of the static teacher on the same images.
        kind: ``'soft'``, :func:`timm_gpd.losses.kd_loss`, or ``'hard'``, the cross-entropy with the teacher's most
            probable class.
        hyperparameters: those of ``defaults`` that differ; ``'hard'`` has no temperature.
    """

    learner_needs = frozenset({'token'})
    defaults = {'temperature': 4.0}

    def __init__(
        self,
        learner: ModelOutput,
        teacher: ModelOutput,
        kind: str = 'soft',
        **hyperparameters: Any,
    ) -> None:
        super().__init__(learner, teacher, **hyperparameters)
        self.kind = kind

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        if learner.token is None:
            raise InputError('the loss token compares what a model with a distillation token gives in training mode')
        if self.kind == 'hard':
            return F.cross_entropy(learner.token, teacher.logits.argmax(-1))
        return kd_loss(learner.token, teacher.logits, **self.hyperparameters)
