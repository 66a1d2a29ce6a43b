"""The memory that training steps take at their peak."""

import ctypes
import gc
from typing import Callable

import torch
import torch.nn as nn


def peak_memory(step: Callable[[], None], device: torch.device, steps: int = 3) -> int:
    """Bytes at the peak of a few steps: tensors that are held between steps, and what a step adds (Linux, or CUDA)."""
    step()  # compiles, which is not part of a step
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    else:
        gc.collect()
        held = _held_bytes()
        ctypes.CDLL(None).malloc_trim(0)
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')  # starts the peak again
        others = _resident('VmRSS') - held
    for _ in range(steps):
        step()
    return torch.cuda.max_memory_allocated() if device.type == 'cuda' else _resident('VmHWM') - others


def _held_bytes() -> int:
    """Bytes of all tensors that have values, views counted once."""
    tensors = (item for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter))
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.device.type == 'cpu'
    }
    return sum(storages.values())


def _resident(field: str) -> int:
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
