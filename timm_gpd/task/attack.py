"""Attacks on images: perturbations within a ball around each pixel that raise a loss."""

from dataclasses import dataclass
from typing import Callable, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..distillers.feature_tap import model_name
from ..errors import InputError, check_number
from ..expansion.images import input_shape

__all__ = ['ATTACKS', 'Attack', 'create_attack']

ATTACKS = ('pgd', 'fgsm')


@dataclass(frozen=True)
class Attack:
    """Perturbs images, of pixels from 0 to 1 that were normalised since, by at most ``eps`` each (L-infinity).

    PGD (arXiv 1706.06083) starts anywhere in the ball and takes ``steps`` steps by the sign of the gradient, each back
    into the ball and into [0, 1]; its perturbation is the last. FGSM (arXiv 1412.6572) takes one step of ``eps`` from
    the image. Both work on normalised images, within bounds that are normalised alike.

    Attributes:
        kind: ``'pgd'`` or ``'fgsm'``.
        mean: of each channel, that images are normalised with; one for all, or one for each.
        std: the same, their standard deviation.
        eps: radius of the ball, in the unit of pixels from 0 to 1.
        step: length of a step of PGD, in the same unit.
        steps: how many PGD takes.
    """

    kind: str
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    eps: float = 8 / 255
    step: float = 2 / 255
    steps: int = 10

    def __post_init__(self) -> None:
        if self.kind not in ATTACKS:
            raise InputError(f'an attack is one of {", ".join(ATTACKS)}, but not {self.kind!r}')
        for name in ('eps', 'step'):
            check_number(f'{name} of an attack', getattr(self, name))
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f'{name} of an attack must be above 0 and at most 1, but is {getattr(self, name)!r}')
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise InputError(f'steps of an attack must be an integer of at least 1, but is {self.steps!r}')

    def __call__(self, objective: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        """Looks for a perturbation that makes a loss large.

        Args:
            objective: a scalar loss of images. Of one that is a mean or a sum over them, each image has its own.
            images: normalised, shape (B, in_chans, H, W). A pixel that is outside [0, 1], as an erased one may be,
                moves inwards or not at all.

        Returns:
            Images of the same shape, without history. PGD draws where it starts from torch's generator of their device.
        """
        images = images.detach()
        eps, step = self._scaled(self.eps, images), self._scaled(self.step, images)
        black, white = self.normalize(images.new_zeros(())), self.normalize(images.new_ones(()))
        low = torch.maximum(images - eps, torch.minimum(black, images))
        high = torch.minimum(images + eps, torch.maximum(white, images))
        found, steps = images, 1
        if self.kind == 'pgd':
            found, steps = torch.clamp(images + (2 * torch.rand_like(images) - 1) * eps, low, high), self.steps
        for _ in range(steps):
            found = found.detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(objective(found), found)
            found = found.detach() + (step if self.kind == 'pgd' else eps) * gradient.sign()
            found = torch.clamp(found, low, high)
        return found

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels from 0 to 1 as models get them.

        Args:
            pixels: shape (B, in_chans, H, W), or a scalar.

        Returns:
            The same, normalised; of a scalar shape (1, channels, 1, 1).
        """
        return (pixels - self._per_channel(self.mean, pixels)) / self._per_channel(self.std, pixels)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels of normalised images.

        Args:
            images: shape (B, in_chans, H, W).

        Returns:
            A tensor of the same shape, from 0 to 1.
        """
        return images * self._per_channel(self.std, images) + self._per_channel(self.mean, images)

    def _scaled(self, distance: float, images: torch.Tensor) -> torch.Tensor:
        return distance / self._per_channel(self.std, images)

    @staticmethod
    def _per_channel(values: Sequence[float], images: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)


def create_attack(
    model: nn.Module,
    kind: str = 'pgd',
    eps: float = 8 / 255,
    step: float = 2 / 255,
    steps: int = 10,
    mean: Optional[Sequence[float]] = None,
    std: Optional[Sequence[float]] = None,
) -> Attack:
    """An attack on images that are normalised as a model takes them.

    Args:
        model: timm model, whose ``pretrained_cfg`` tells mean and standard deviation.
        kind: see :class:`Attack`.
        eps: the same.
        step: the same.
        steps: the same.
        mean: what to take instead of the model's.
        std: the same.

    Returns:
        The attack.

    Raises:
        InputError: if nobody tells mean and deviation, they are of other channels, or an argument is out of range.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    mean, std = (cfg.get(key) if given is None else given for key, given in (('mean', mean), ('std', std)))
    if mean is None or std is None:
        raise InputError(
            f'{model_name(model)} does not say how its images are normalised, and an attack on pixels from 0 to 1 must '
            'know: give mean and std'
        )
    channels = input_shape(model)[0]
    for name, values in (('mean', mean), ('std', std)):
        if len(values) not in (1, channels):
            raise InputError(f'{name} has {len(values)} values, and images have {channels} channels')
    return Attack(kind, tuple(map(float, mean)), tuple(map(float, std)), eps, step, steps)
