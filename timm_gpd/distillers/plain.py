"""Losses that compare two models as they are, without parameters."""

import torch

from ..losses import at_loss, dist_loss, dkd_loss, kd_loss, rkd_loss
from ..losses.hyperparameters import loss_defaults
from .base import Distiller, deepest_pairs
from .feature_tap import ModelOutput

__all__ = ['AT', 'DIST', 'DKD', 'KD', 'RKD']


class KD(Distiller):
    """Softened probabilities, :func:`timm_gpd.losses.kd_loss`."""

    defaults = loss_defaults(kd_loss)

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        return kd_loss(learner.logits, teacher.logits, **self.hyperparameters)


class DKD(Distiller):
    """Target class and others apart, :func:`timm_gpd.losses.dkd_loss`."""

    defaults = loss_defaults(dkd_loss)

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        return dkd_loss(learner.logits, teacher.logits, target, **self.hyperparameters)


class DIST(Distiller):
    """Correlations of probabilities, :func:`timm_gpd.losses.dist_loss`."""

    defaults = loss_defaults(dist_loss)

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        return dist_loss(learner.logits, teacher.logits, **self.hyperparameters)


class RKD(Distiller):
    """Distances and angles between embeddings of a batch, :func:`timm_gpd.losses.rkd_loss`."""

    learner_needs = teacher_needs = frozenset({'embedding'})
    defaults = loss_defaults(rkd_loss)

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        return rkd_loss(learner.embedding, teacher.embedding, **self.hyperparameters)


class AT(Distiller):
    """Spatial attention of every stage, :func:`timm_gpd.losses.at_loss`.

    The weight is the paper's (Sec. 4.1): 1000 over the number of pixels and images, which the loss is a mean over.
    """

    learner_needs = teacher_needs = frozenset({'stages'})
    defaults = loss_defaults(at_loss)
    weight = 1000.0

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        return at_loss(*deepest_pairs(learner.stages, teacher.stages), **self.hyperparameters)
