"""Where and in which precision a run computes."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Callable, Iterator, List, Optional, Sequence

import torch
import torch.nn as nn
from timm.layers import is_fast_norm, set_fast_norm
from timm.utils import NativeScaler

from ..errors import UsageError, first_line

__all__ = ['Compute', 'create_compute', 'fast_norm', 'import_device_modules']


@dataclass(frozen=True)
class Compute:
    """Where and in which precision a run computes.

    Attributes:
        device: of models and batches.
        autocast: gives the context of forward passes.
        loss_scaler: scales losses for half precision, or None.
        memory_format: of images and of models.
        dtype: of images and of models.
    """

    device: torch.device
    autocast: Callable[[], Any] = nullcontext
    loss_scaler: Optional[NativeScaler] = None
    memory_format: torch.memory_format = torch.contiguous_format
    dtype: torch.dtype = torch.float32

    def place(self, model: nn.Module) -> None:
        """Moves a model to the device, the dtype and the memory format, in place."""
        model.to(self.device, self.dtype).to(memory_format=self.memory_format)

    def prepare(self, *tensors: torch.Tensor) -> List[torch.Tensor]:
        """Moves a batch to the device, images (B, in_chans, H, W) also to the dtype and the memory format."""
        return [
            tensor.to(self.device, self.dtype, memory_format=self.memory_format)
            if tensor.dim() == 4
            else tensor.to(self.device)
            for tensor in tensors
        ]


def create_compute(
    device: str,
    amp: bool = False,
    amp_dtype: str = 'float16',
    channels_last: bool = False,
    model_dtype: Optional[str] = None,
) -> Compute:
    """Reads what ``--device``, ``--amp``, ``--amp-dtype``, ``--channels-last`` and ``--model-dtype`` say.

    Args:
        device: name of a torch device.
        amp: compute forward passes in mixed precision.
        amp_dtype: its lower precision, ``'float16'`` (losses are scaled) or ``'bfloat16'``.
        channels_last: keep images and models in that memory format.
        model_dtype: dtype of images and models, without ``amp`` (default: ``'float32'``).

    Returns:
        Device and precision.

    Raises:
        UsageError: if the device is not there, or models of half precision were to compute in mixed precision.
    """
    if amp and model_dtype not in (None, 'float32'):
        raise UsageError(f'--amp keeps weights in float32: leave out --model-dtype {model_dtype} or --amp')
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f'device {device} cannot be used: {first_line(error)} (try --device cpu)')
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if not amp:
        return Compute(found, memory_format=memory_format, dtype=getattr(torch, model_dtype or 'float32'))
    dtype = getattr(torch, amp_dtype)
    return Compute(
        found,
        autocast=lambda: torch.autocast(found.type, dtype),
        loss_scaler=NativeScaler(device=found.type) if dtype == torch.float16 else None,
        memory_format=memory_format,
    )


@contextmanager
def fast_norm(enable: bool) -> Iterator[None]:
    """Lets timm's normalisation layers, those that are created in it too, compute in half precision if ``enable``."""
    before = is_fast_norm()
    set_fast_norm(enable)
    try:
        yield
    finally:
        set_fast_norm(before)


def import_device_modules(names: Optional[Sequence[str]]) -> None:
    """Imports the modules that ``--device-modules`` names.

    Raises:
        UsageError: if one is not there.
    """
    for name in names or ():
        try:
            import_module(name)
        except ImportError as error:
            raise UsageError(f'{first_line(error)}: check --device-modules')
