"""Losses of an adversarial step, between what two models make of several views of the same images."""

from typing import Dict, Tuple

import torch

from ..errors import InputError
from ..losses import adaad_loss, dgad_loss, igdm_loss
from ..losses.adversarial import VIEWS_OF
from .feature_tap import ModelOutput
from .plain import LogitsDistiller

__all__ = ['DGAD', 'IGDM', 'AdaAD', 'AdversarialDistiller']


class AdversarialDistiller(LogitsDistiller):
    """A function of logits by view, and of the target if it asks for it.

    Attributes:
        views: the views that it reads.
    """

    views: Tuple[str, ...]

    def compared(self, output: ModelOutput) -> Dict[str, torch.Tensor]:
        """What of a model's output the function takes.

        Args:
            output: the learner's or the teacher's.

        Returns:
            Logits by view, each of shape (B, num_classes).

        Raises:
            InputError: if no attack has perturbed the images.
        """
        if output.views is None:
            raise InputError(
                f'{type(self).__name__} compares images that an attack has perturbed, and there is none: '
                'call setup_adversary(task, attack)'
            )
        return output.views


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
