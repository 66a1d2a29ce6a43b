"""Losses that compare two models as they are, without parameters."""

from typing import Any, Callable

import torch

from ..losses import at_loss, dist_loss, dkd_loss, kd_loss, needs_target, nkd_loss, rkd_loss, rld_loss, wttm_loss
from ..losses.hyperparameters import loss_defaults
from .base import Distiller, deepest_pairs
from .feature_tap import ModelOutput

__all__ = ['AT', 'DIST', 'DKD', 'KD', 'NKD', 'RKD', 'RLD', 'WTTM', 'LogitsDistiller']


class LogitsDistiller(Distiller):
    """A function of two logits, and of the target if it asks for it.

    Attributes:
        loss: the function; what it has defaults of are the hyperparameters.
    """

    loss: Callable[..., torch.Tensor]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if 'loss' in vars(cls):  # else a base of others
            cls.defaults, cls.needs_target = loss_defaults(cls.loss), needs_target(cls.loss)

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        rest = (target,) if self.needs_target else ()
        return self.loss(self.compared(learner), self.compared(teacher), *rest, **self.hyperparameters)

    def compared(self, output: ModelOutput) -> Any:
        """What of a model's output the function takes.

        Args:
            output: the learner's or the teacher's.

        Returns:
            The logits, shape (B, num_classes).
        """
        return output.logits


class KD(LogitsDistiller):
    """Softened probabilities, :func:`timm_gpd.losses.kd_loss`."""

    loss = staticmethod(kd_loss)


class DKD(LogitsDistiller):
    """Target class and others apart, :func:`timm_gpd.losses.dkd_loss`."""

    loss = staticmethod(dkd_loss)


class NKD(LogitsDistiller):
    """The target class, weighted by the teacher, and the others, :func:`timm_gpd.losses.nkd_loss`."""

    loss = staticmethod(nkd_loss)


class RLD(LogitsDistiller):
    """What a teacher that errs is sure of, and the classes below the target, :func:`timm_gpd.losses.rld_loss`."""

    loss = staticmethod(rld_loss)


class WTTM(LogitsDistiller):
    """Probabilities of which the teacher's alone are softened, :func:`timm_gpd.losses.wttm_loss`."""

    loss = staticmethod(wttm_loss)


class DIST(LogitsDistiller):
    """Correlations of probabilities, :func:`timm_gpd.losses.dist_loss`."""

    loss = staticmethod(dist_loss)


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
