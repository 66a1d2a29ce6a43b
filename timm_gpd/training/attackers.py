"""What attacks a model that is validated: the package's own attack, or another package's."""

import argparse
from functools import partial
from importlib import import_module
from typing import Any, Callable, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import UsageError
from ..task import Attack
from .student import InputConfig

__all__ = ['Attacker', 'create_attacker']

# Perturbs images, shape (B, in_chans, H, W), normalised, for a model and class indices, shape (B,).
Attacker = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def create_attacker(args: argparse.Namespace, model: nn.Module, config: InputConfig) -> Optional[Attacker]:
    """What ``--adv`` and ``--adv-package`` name.

    Args:
        args: arguments of ``validate.py``.
        model: timm model, which may tell how its images are normalised.
        config: how they are.

    Returns:
        The attacker; None without ``--adv``.

    Raises:
        UsageError: if neither the arguments nor the model tell, or the package is not installed.
    """
    if not args.adv:
        return None
    known = getattr(model, 'pretrained_cfg', None) or {}
    for key in ('mean', 'std'):  # timm's loader takes ImageNet's where nobody says
        if getattr(args, key) is None and known.get(key) is None:
            raise UsageError(
                f'{args.model} does not say by which {key} its images are normalised, and --adv attacks pixels from 0 '
                f'to 1: give --{key}'
            )
    attack = Attack(args.adv, tuple(config.mean), tuple(config.std), args.adv_eps, args.adv_step, args.adv_steps)
    if args.adv_package is None:
        return partial(_attack, attack)
    try:
        package: Any = import_module(args.adv_package)
    except ImportError:
        raise UsageError(f'--adv-package {args.adv_package} is not installed: install it, or leave that out')
    return partial(_attack_by, package, args.seed, attack)


def _attack_by(
    package: Any,
    seed: int,
    attack: Attack,
    model: nn.Module,
    images: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """By a package that takes pixels from 0 to 1, and a model of them."""
    pixels, of_pixels = attack.pixels(images).clamp(0, 1), _OfPixels(model, attack).eval()
    if package.__name__ == 'autoattack':
        ensemble = package.AutoAttack(
            of_pixels,
            norm='Linf',
            eps=attack.eps,
            seed=seed,
            verbose=False,
            version='standard',
            device=pixels.device,
        )
        return attack.normalize(ensemble.run_standard_evaluation(pixels, target, bs=len(pixels)))
    if attack.kind == 'fgsm':
        return attack.normalize(package.FGSM(of_pixels, eps=attack.eps)(pixels, target))
    pgd = package.PGD(of_pixels, eps=attack.eps, alpha=attack.step, steps=attack.steps, random_start=True)
    return attack.normalize(pgd(pixels, target))


class _OfPixels(nn.Module):
    def __init__(self, model: nn.Module, attack: Attack) -> None:
        super().__init__()
        self.model, self.attack = model, attack

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(self.attack.normalize(pixels))


def _attack(attack: Attack, model: nn.Module, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return attack(lambda x: F.cross_entropy(model(x), target, reduction='sum'), images)
