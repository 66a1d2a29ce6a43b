"""What images a model takes."""

import math
from typing import Any, Callable, Iterator, Optional, Tuple

import torch
import torch.nn as nn

from .copies import blank, blank_copy

__all__ = [
    'SMALL_IMAGES',
    'accepted_input_shape',
    'blank_images',
    'error_with',
    'has_record',
    'input_shape',
    'run_on_small_images',
]

SMALL_IMAGES = (64, 56, 96, 128)  # pixels: enough for a check wherever a model accepts one of them
CHANNELS = (3, 1, 4, 2)  # of images, where a model has no record


def input_shape(model: nn.Module) -> Tuple[int, int, int]:
    """What images a timm model was made for, by its own records.

    Args:
        model: a model of any kind; without records the channels of its first convolution, or 3, and 224 x 224 pixels
            are taken for granted.

    Returns:
        ``(channels, height, width)`` in pixels.
    """
    config = getattr(model, 'pretrained_cfg', None) or {}
    channels, height, width = config.get('input_size') or (_first_channels(model), 224, 224)
    for module in model.modules():
        img_size = getattr(module, 'img_size', None)
        if img_size is not None:  # what the instance was made for; its config only knows the default
            height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
            break
    return getattr(model, 'in_chans', None) or channels, height, width


def _first_channels(model: nn.Module) -> int:
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)


def blank_images(model: nn.Module, shape: Tuple[int, int, int], device: str = 'meta') -> torch.Tensor:
    """Two images without values.

    Args:
        model: the model that they are for.
        shape: ``(channels, height, width)`` in pixels.
        device: ``'meta'`` or another.

    Returns:
        A tensor of shape ``(2, channels, height, width)`` and the model's dtype, which takes no memory.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return blank((2, *shape), dtype, device)


def run_on_small_images(
    run: Callable[[torch.Tensor], Any],
    model: nn.Module,
    shape: Optional[Tuple[int, int, int]],
    batch: int,
) -> Tuple[torch.Tensor, Any]:
    """Runs a function on random images that are as small as it accepts.

    Args:
        run: takes images, shape (B, in_chans, H, W).
        model: the model that they are for; they have its dtype and device.
        shape: ``(channels, height, width)`` in pixels that it accepts, if known.
        batch: number B of images.

    Returns:
        The images, and what the function returned.

    Raises:
        Exception: what the function raised for images of that shape.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    channels, height, width = shape or accepted_input_shape(model) or input_shape(model)
    sizes = [(min(size, height), min(size, width)) for size in SMALL_IMAGES] + [(height, width)]
    for size in sizes:
        x = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = x.to(parameter)
        try:
            return x, run(x)
        except Exception as failure:
            error = failure
    raise error


def has_record(model: nn.Module) -> bool:
    """Whether a model says how many channels its images have, as timm's do."""
    return bool(getattr(model, 'in_chans', None) or (getattr(model, 'pretrained_cfg', None) or {}).get('input_size'))


def accepted_input_shape(model: nn.Module, device: str = 'meta') -> Optional[Tuple[int, int, int]]:
    """An input shape that a model's forward accepts: its own, or the first that runs without values.

    Some classes bake ``img_size`` into a table and keep no record of it. The search may take many forward passes:
    ``plan.input_shape`` has its result.

    Args:
        model: a model of any kind. It is not modified.
        device: where it is tried, ``'meta'``, or ``'cpu'`` with its recorded size alone.

    Returns:
        ``(channels, height, width)`` in pixels; None if no shape runs.
    """
    channels, *recorded = input_shape(model)
    copy = blank_copy(model, device).eval()
    sizes = _sizes(*recorded) if device == 'meta' else [recorded]
    shapes = (
        (number, height, width)
        for height, width in sizes
        for number in ((channels,) if has_record(model) else dict.fromkeys((channels, *CHANNELS)))
    )
    return next((shape for shape in shapes if error_with(copy, shape, device) is None), None)


def error_with(model: nn.Module, shape: Tuple[int, int, int], device: str = 'meta') -> Optional[Exception]:
    """What a model raises when it is given blank images of a shape ``(channels, height, width)``, or None."""
    try:
        with torch.no_grad():
            model(blank_images(model, shape, device))
    except Exception as error:
        return error
    return None


def _sizes(height: int, width: int) -> Iterator[Tuple[int, int]]:
    yield height, width
    for step in (32, 28, 16):
        for size in range(step, 1025, step):
            yield size, size
    sides = range(32, 513, 32)
    rectangles = ((height, width) for height in sides for width in sides if height != width)
    # The simplest aspect ratios first: 1:2 and 2:1, 1:3, 2:3, ...
    yield from sorted(rectangles, key=lambda size: sum(size) // math.gcd(*size))
