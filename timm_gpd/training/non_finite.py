"""Losses and gradients that are NaN or infinite: found before the update that they would spoil."""

from typing import Any, Dict, Iterable, Tuple

import torch
from torch.nn.utils import get_total_norm

from ..errors import NamedError
from ..losses import check_finite

__all__ = ['POLICIES', 'NonFiniteError', 'are_finite', 'name_non_finite']

POLICIES = ('stop', 'skip', 'rewind')  # the run, the update, or back to the last checkpoint


class NonFiniteError(NamedError, FloatingPointError):
    """A loss or a gradient is NaN or infinite. The weights are those of before."""

    exit_code = 3


def are_finite(gradients: Iterable[torch.Tensor]) -> bool:
    """Whether gradients are numbers, all of them.

    Args:
        gradients: tensors of any shapes, on one device, for which is waited.
    """
    return bool(get_total_norm(gradients, norm_type=float('inf')).isfinite())


def name_non_finite(terms: Dict[str, torch.Tensor], named_parameters: Iterable[Tuple[str, Any]]) -> str:
    """Says what is NaN or infinite: terms of the loss, or else the first gradient.

    Args:
        terms: scalars by name, the loss among them.
        named_parameters: of what is trained, with their gradients.

    Returns:
        A message without its end.
    """
    try:
        check_finite({name: value for name, value in terms.items() if name != 'loss'} or terms)
        check_finite({'loss': terms['loss']})
    except FloatingPointError as error:
        return str(error)
    for name, parameter in named_parameters:
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f'the gradient of {name} is not finite: lower the learning rate, or clip gradients'
    return 'a loss or a gradient is not finite in another process'
