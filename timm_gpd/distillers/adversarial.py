"""Losses of an adversarial step, between what two models make of several views of the same images."""

from typing import Callable, Tuple

import torch

from ..errors import InputError
from ..losses import adaad_loss, dgad_loss, igdm_loss, needs_target
from ..losses.adversarial import VIEWS_OF
from ..losses.hyperparameters import loss_defaults
from .base import Distiller
from .feature_tap import ModelOutput

__all__ = ['DGAD', 'IGDM', 'AdaAD', 'AdversarialDistiller']


class AdversarialDistiller(Distiller):
    """A function of logits by view, and of the target if it asks for it.

    Attributes:
        loss: the function; what it has defaults of are the hyperparameters.
        views: the views that it reads.
    """

    loss: Callable[..., torch.Tensor]
    views: Tuple[str, ...]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.defaults, cls.needs_target = loss_defaults(cls.loss), needs_target(cls.loss)

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        if learner.views is None:
            raise InputError(
                f'{type(self).__name__} compares images that an attack has perturbed, and there is none: '
                'call setup_adversary(task, attack)'
            )
        rest = (target,) if self.needs_target else ()
        return self.loss(learner.views, teacher.views, *rest, **self.hyperparameters)


class AdaAD(AdversarialDistiller):
    """Probabilities on the perturbed images, :func:`timm_gpd.losses.adaad_loss`."""

    loss = staticmethod(adaad_loss)
    views = VIEWS_OF['adaad']


class DGAD(AdversarialDistiller):
    """Probabilities on whichever images the teacher is worth learning, :func:`timm_gpd.losses.dgad_loss`."""

    loss = staticmethod(dgad_loss)
    views = VIEWS_OF['dgad']


class IGDM(AdversarialDistiller):
    """Changes of logits along the perturbation, :func:`timm_gpd.losses.igdm_loss`."""

    loss = staticmethod(igdm_loss)
    views = VIEWS_OF['igdm']
