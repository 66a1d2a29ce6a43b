"""Batch norm with the statistics of all processes' images, for ``--sync-bn``."""

from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.distributed.nn.functional import all_reduce
from torch.overrides import TorchFunctionMode

__all__ = ['SynchronizedBatchNorm', 'synchronized_batch_norm']


class SynchronizedBatchNorm(TorchFunctionMode):
    """While it is active, whatever normalises over its batch normalises over the batches of all processes.

    A mode, not another class of layer: torch's has no CPU version, and students are extracted from what is trained.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Tuple[Any, ...] = (),
        kwargs: Optional[Dict[str, Any]] = None,
    ) -> Any:
        if func is F.batch_norm:
            return synchronized_batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def synchronized_batch_norm(
    x: torch.Tensor,
    running_mean: Optional[torch.Tensor],
    running_var: Optional[torch.Tensor],
    weight: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``F.batch_norm``, with mean and variance over all processes where it is of the batch.

    Args:
        x: shape (B, C, ...); B may differ between processes.
        running_mean: shape (C,), updated in place; or None.
        running_var: the same.
        weight: shape (C,), or None.
        bias: the same.
        training: whether statistics are the batch's.
        momentum: share of the new statistics in the running ones.
        eps: added to variances.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    dims = [0, *range(2, x.dim())]
    wide = x if x.dtype == torch.float64 else x.float()
    count = torch.full((1,), x.numel() / x.shape[1], dtype=wide.dtype, device=x.device)
    total, count = all_reduce(torch.cat([wide.sum(dims), count])).split([x.shape[1], 1])
    mean = total / count
    centred = wide - _per_channel(mean, x)
    var = all_reduce(centred.square().sum(dims)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var), momentum)
    y = centred * _per_channel((var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight, x)
    return (y if bias is None else y + _per_channel(bias, x)).to(x.dtype)


def _per_channel(tensor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return tensor.view(1, -1, *[1] * (x.dim() - 2))
