"""Where and in which precision a run computes."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Callable, List, Optional

import torch
import torch.nn as nn
from timm.utils import NativeScaler

from ..errors import UsageError, first_line

__all__ = ['Compute', 'create_compute']


@dataclass(frozen=True)
class Compute:
    """Where and in which precision a run computes.

    Attributes:
        device: of models and batches.
        autocast: gives the context of forward passes.
        loss_scaler: scales losses for half precision, or None.
        memory_format: of images and of models.
    """

    device: torch.device
    autocast: Callable[[], Any] = nullcontext
    loss_scaler: Optional[NativeScaler] = None
    memory_format: torch.memory_format = torch.contiguous_format

    def place(self, model: nn.Module) -> None:
        """Moves a model to the device and into the memory format, in place."""
        model.to(self.device).to(memory_format=self.memory_format)

    def prepare(self, *tensors: torch.Tensor) -> List[torch.Tensor]:
        """Moves a batch to the device, images (B, in_chans, H, W) into the memory format."""
        return [
            tensor.to(self.device, memory_format=self.memory_format if tensor.dim() == 4 else torch.preserve_format)
            for tensor in tensors
        ]


def create_compute(
    device: str,
    amp: bool = False,
    amp_dtype: str = 'float16',
    channels_last: bool = False,
) -> Compute:
    """Reads what ``--device``, ``--amp``, ``--amp-dtype`` and ``--channels-last`` say.

    Args:
        device: name of a torch device.
        amp: compute forward passes in mixed precision.
        amp_dtype: its lower precision, ``'float16'`` (losses are scaled) or ``'bfloat16'``.
        channels_last: keep images and models in that memory format.

    Returns:
        Device and precision.

    Raises:
        UsageError: if the device is not there.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f'device {device} cannot be used: {first_line(error)} (try --device cpu)')
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if not amp:
        return Compute(found, memory_format=memory_format)
    dtype = getattr(torch, amp_dtype)
    return Compute(
        found,
        autocast=lambda: torch.autocast(found.type, dtype),
        loss_scaler=NativeScaler(device=found.type) if dtype == torch.float16 else None,
        memory_format=memory_format,
    )
