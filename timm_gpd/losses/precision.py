"""How precisely losses compute."""

import torch

__all__ = ['in_whole_precision']


def in_whole_precision(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as float32: on a CPU autocast leaves it, and products of small numbers are 0 in it.

    Args:
        tensor: of any floating dtype.

    Returns:
        The tensor, or a copy in float32.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
