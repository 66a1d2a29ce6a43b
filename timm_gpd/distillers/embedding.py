"""Distillers of embeddings: the learner's is projected where its width differs from the teacher's."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from ..losses import embed_loss, nd_loss, rsd_loss, target_classes
from ..losses.hyperparameters import loss_defaults
from .base import Distiller
from .feature_tap import ModelOutput

__all__ = ['ND', 'RSD', 'Embed', 'Feature']


class Feature(Distiller):
    """Mean squared error of embeddings, as in timm's feature distillation."""

    learner_needs = teacher_needs = frozenset({'embedding'})

    def __init__(self, learner: ModelOutput, teacher: ModelOutput, **hyperparameters: Any) -> None:
        super().__init__(learner, teacher, **hyperparameters)
        width, teacher_width = learner.embedding.shape[-1], teacher.embedding.shape[-1]
        self.projection = nn.Identity() if width == teacher_width else nn.Linear(width, teacher_width)

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.projection(learner.embedding), teacher.embedding.detach())


class Embed(Feature):
    """Places and distances of embeddings, :func:`timm_gpd.losses.embed_loss`.

    ``reuse_classifier`` is read by the task, see :func:`timm_gpd.task.reused_classifier.with_reused_classifier`.
    """

    defaults = {**loss_defaults(embed_loss), 'reuse_classifier': False}

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        distance_weight = self.hyperparameters['distance_weight']
        return embed_loss(self.projection(learner.embedding), teacher.embedding, distance_weight)


class ND(Distiller):
    """Norm and direction of embeddings, :func:`timm_gpd.losses.nd_loss`, with the projection of KD++'s code.

    The paper computes the teacher's class centres before training. Here they are the mean over all training images seen
    so far, of all processes, which converges to the same; a mixed image counts for its most probable class.
    """

    learner_needs = teacher_needs = frozenset({'embedding'})

    def __init__(self, learner: ModelOutput, teacher: ModelOutput, **hyperparameters: Any) -> None:
        super().__init__(learner, teacher, **hyperparameters)
        width, teacher_width = learner.embedding.shape[-1], teacher.embedding.shape[-1]
        if width == teacher_width:
            self.projection = nn.Identity()
        else:
            linear = nn.Linear(width, teacher_width)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.normal_(linear.bias, std=0.01)
            self.projection = nn.Sequential(nn.BatchNorm1d(width), nn.Dropout(0.5), linear)
        num_classes = learner.logits.shape[-1]
        self.register_buffer('class_centers', torch.zeros(num_classes, teacher_width))
        self.register_buffer('class_counts', torch.zeros(num_classes))

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        if self.training:
            self._count(teacher.embedding, target_classes(target, learner.logits))
        return nd_loss(self.projection(learner.embedding), teacher.embedding, self.class_centers, target)

    @torch.no_grad()
    def _count(self, embedding: torch.Tensor, classes: torch.Tensor) -> None:
        sums = torch.zeros_like(self.class_centers).index_add_(0, classes, embedding.to(self.class_centers.dtype))
        counts = torch.zeros_like(self.class_counts).index_add_(
            0, classes, torch.ones_like(classes, dtype=self.class_counts.dtype)
        )
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        self.class_counts += counts
        self.class_centers += (sums - counts.unsqueeze(1) * self.class_centers) / self.class_counts.clamp(
            min=1
        ).unsqueeze(1)


class RSD(Distiller):
    """Cross-correlations of embeddings, :func:`timm_gpd.losses.rsd_loss`, with the projector of its code.

    The learner's embedding always goes through it, also where widths agree: what must be like the teacher's is what it
    makes of the embedding, which is left free. Batches are those of one process.
    """

    learner_needs = teacher_needs = frozenset({'embedding'})
    defaults = loss_defaults(rsd_loss)

    def __init__(self, learner: ModelOutput, teacher: ModelOutput, **hyperparameters: Any) -> None:
        super().__init__(learner, teacher, **hyperparameters)
        width, teacher_width = learner.embedding.shape[-1], teacher.embedding.shape[-1]
        self.projection = nn.Sequential(
            nn.Linear(width, 2 * width, bias=False),
            nn.BatchNorm1d(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, teacher_width, bias=False),
        )

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        return rsd_loss(self.projection(learner.embedding), teacher.embedding, **self.hyperparameters)
