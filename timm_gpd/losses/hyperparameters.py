"""The hyperparameters of loss functions, as commands and configurations give them."""

import inspect
import math
from typing import Any, Callable, Dict

import torch

from ..errors import InputError

__all__ = ['check_hyperparameter', 'loss_defaults']


def loss_defaults(loss: Callable[..., torch.Tensor]) -> Dict[str, Any]:
    """Hyperparameters of a loss function: its arguments that have defaults.

    Args:
        loss: the function.

    Returns:
        Defaults by name.
    """
    parameters = inspect.signature(loss).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def check_hyperparameter(name: str, value: Any, default: Any) -> Any:
    """Checks a hyperparameter against the kind of its default.

    Args:
        name: its name, for the message.
        value: what was given; a switch may be text.
        default: its default.

    Returns:
        The value.

    Raises:
        InputError: if it is not of that kind.
    """
    if isinstance(default, bool):
        switches = {'true': True, 'false': False}
        if not isinstance(value, bool) and str(value).lower() not in switches:
            raise InputError(f'{name} must be true or false, but is {value!r}')
        return value if isinstance(value, bool) else switches[str(value).lower()]
    if isinstance(default, int):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f'{name} must be an integer of at least 1, but is {value!r}')
    elif not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f'{name} must be a number, but is {value!r}')
    elif name.endswith('temperature') and value <= 0:
        raise InputError(f'{name} must be more than 0, but is {value!r}')
    return value
