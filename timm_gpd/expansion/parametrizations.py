"""Weights that torch computes from other parameters before every forward: weight norm, spectral norm and others."""

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import UnsupportedModelError
from ..private_torch import pre_hooks_of

__all__ = ['refuse_parametrizations']

REMOVERS = {WeightNorm: 'remove_weight_norm', SpectralNorm: 'remove_spectral_norm'}


def refuse_parametrizations(student: nn.Module) -> None:
    """Refuses a student that has such weights, and says how they become parameters again.

    Args:
        student: a model of any kind.

    Raises:
        UnsupportedModelError: if a weight is parametrized.
    """
    for name, module in student.named_modules():
        found = None
        if parametrize.is_parametrized(module):
            key, *_ = module.parametrizations
            found = f'torch.nn.utils.parametrize.remove_parametrizations(module, {key!r})'
        for hook in pre_hooks_of(module):
            if type(hook) in REMOVERS:
                key, found = hook.name, f'torch.nn.utils.{REMOVERS[type(hook)]}(module, {hook.name!r})'
        if found:
            raise UnsupportedModelError(
                f'{type(student).__name__} cannot be widened: {key} of module {name or "(root)"!r} is computed by a '
                f'parametrization; make it a parameter first: {found}'
            )
