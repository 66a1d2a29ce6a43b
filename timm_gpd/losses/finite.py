"""Which terms of a loss are not finite."""

from typing import Mapping

import torch

__all__ = ['check_finite']


def check_finite(terms: Mapping[str, torch.Tensor]) -> None:
    """Waits for scalar loss terms and names those that are not finite. One synchronisation with the device.

    Args:
        terms: scalar tensors by name.

    Raises:
        FloatingPointError: if a term is NaN or infinite.
    """
    values = dict(zip(terms, torch.stack([term.detach().float() for term in terms.values()]).tolist()))
    broken = [f'{name} is {value}' for name, value in values.items() if not abs(value) < float('inf')]
    if broken:
        raise FloatingPointError(
            f'{", ".join(broken)}: lower the learning rate or the weight of that loss, or clip gradients'
        )
