"""The dry run: the student's forward, where nothing is computed and every torch function is seen on the way in."""

from typing import Any, Callable, Dict, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from ..errors import UnsupportedModelError, first_line
from ..private_torch import tree_map_only
from .copies import first_input
from .functions import find_handler, find_stand_in, handle_module
from .images import blank_images
from .traced import mark_channels, mark_images, note_origin
from .widening import Widening

__all__ = ['dry_run']


_FUNCTION = 'gpd_function'  # attribute of an error: the torch function that raised it

# Layers and the axis of their outputs, from the end, that holds channels.
CHANNEL_AXES = {
    F.linear: -1,
    F.conv1d: -2,
    F.conv2d: -3,
    F.conv3d: -4,
    F.conv_transpose1d: -2,
    F.conv_transpose2d: -3,
    F.conv_transpose3d: -4,
}


def dry_run(widening: Widening, shape: Tuple[int, int, int]) -> None:
    """Runs a student without values, and widens what meets something wider.

    Args:
        widening: the student; rules have been applied to it.
        shape: ``(channels, height, width)`` of the images, in pixels.

    Raises:
        UnsupportedModelError: if the forward fails once parts of it are wider.
    """
    for name, module in widening.modules.items():
        module.register_forward_pre_hook(_enter(widening, name), with_kwargs=True)
        module.register_forward_hook(_leave(widening))
    _forward(widening, shape, training=False)
    if widening.unmet_parameters():
        # Auxiliary heads and the like run in training only.
        try:
            _forward(widening, shape, training=True)
        except UnsupportedModelError:
            if widening.unmet_parameters():
                raise


def _forward(widening: Widening, shape: Tuple[int, int, int], training: bool) -> None:
    widening.model.train(training)
    widening.running = ['']
    x = blank_images(widening.model, shape, widening.device)
    mark_images(x)
    try:
        with torch.no_grad(), _Watch(widening):
            widening.model(x)
    except UnsupportedModelError:
        raise
    except Exception as error:
        function = getattr(error, _FUNCTION, None)
        raise widening.unsupported(
            (f'{function}: ' if function else '') + f'{type(error).__name__}: {first_line(error)}'
        )


def _enter(widening: Widening, name: str) -> Callable:
    def pre_hook(module: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        widening.running.append(name)
        handle_module(widening, name, module, first_input(args, kwargs))

    return pre_hook


def _leave(widening: Widening) -> Callable:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        widening.running.pop()

    return hook


class _Watch(TorchFunctionMode):
    """Hands every torch function to its handler before it is called, and notes what is computed from parameters."""

    def __init__(self, widening: Widening) -> None:
        super().__init__()
        self.widening = widening

    def __torch_function__(self, func: Callable, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, self._present, (args, kwargs or {}))
        handler = find_handler(func, args, kwargs)
        if handler is not None:
            args, kwargs = handler(self.widening, args, kwargs)
        try:
            output = find_stand_in(func)(*args, **kwargs)
        except Exception as error:
            setattr(error, _FUNCTION, resolve_name(func) or getattr(func, '__name__', repr(func)))
            raise
        note_origin(func, args, kwargs, output)
        if func in CHANNEL_AXES:
            mark_channels(output, CHANNEL_AXES[func])
        return output

    def _present(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor where the others are, and as wide as it is by now: a forward may have read it before it widened."""
        if tensor.device.type != self.widening.device:
            return tensor.to(self.widening.device)
        return self.widening.current(tensor)
