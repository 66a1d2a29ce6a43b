"""Losses that compare two models as they are, without parameters."""

import torch

from ..losses import at_loss, dist_loss, dkd_loss, kd_loss, nkd_loss, rkd_loss, rld_loss, wttm_loss
from ..losses.hyperparameters import loss_defaults
from .base import Distiller, deepest_pairs
from .feature_tap import ModelOutput

__all__ = ['AT', 'DIST', 'DKD', 'KD', 'NKD', 'RKD', 'RLD', 'WTTM']


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


class NKD(Distiller):
    """The target class, weighted by the teacher, and the others, :func:`timm_gpd.losses.nkd_loss`."""

    defaults = loss_defaults(nkd_loss)

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        return nkd_loss(learner.logits, teacher.logits, target, **self.hyperparameters)


class RLD(Distiller):
    """What a teacher that errs is sure of, and the classes below the target, :func:`timm_gpd.losses.rld_loss`."""

    defaults = loss_defaults(rld_loss)

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        return rld_loss(learner.logits, teacher.logits, target, **self.hyperparameters)


class WTTM(Distiller):
    """Probabilities of which the teacher's alone are softened, :func:`timm_gpd.losses.wttm_loss`."""

    defaults = loss_defaults(wttm_loss)

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        return wttm_loss(learner.logits, teacher.logits, **self.hyperparameters)


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
