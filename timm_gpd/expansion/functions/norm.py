"""Norms, and PReLU: tensors with one entry for each channel of the input."""

from typing import Any, Sequence

import torch
import torch.nn.functional as F

from ...private_torch import InstanceNorm
from ..traced import from_parameters, is_own
from ..widening import Widening
from .registry import Call, watch, watch_module

STATISTICS = ('running_mean', 'running_var', 'weight', 'bias')


@watch(F.batch_norm, names=('input', *STATISTICS, 'training', 'momentum', 'eps'))
def batch_norm(widening: Widening, call: Call) -> None:
    """Running statistics and weights are as wide as the input's channels."""
    _widen_like_channels(widening, call, STATISTICS, 'num_features')


@watch(F.instance_norm, names=('input', *STATISTICS, 'use_input_stats', 'momentum', 'eps'))
def instance_norm(widening: Widening, call: Call) -> None:
    """The same as batch norm."""
    _widen_like_channels(widening, call, STATISTICS, 'num_features')


@watch_module(InstanceNorm)
def instance_norm_layer(widening: Widening, name: str, module: Any, x: Any) -> None:
    """The layer compares its input with ``num_features`` before it calls the function."""
    widening.set_sizes(name, num_features=x.shape[1])


@watch(F.group_norm, names=('input', 'num_groups', 'weight', 'bias', 'eps'))
def group_norm(widening: Widening, call: Call) -> None:
    """Groups stay, and each is wider."""
    _widen_like_channels(widening, call, ('weight', 'bias'), 'num_channels')


@watch(F.prelu, torch.Tensor.prelu, names=('input', 'weight'))
def prelu(widening: Widening, call: Call) -> None:
    """A slope for each channel; a single one serves all."""
    if call['weight'].numel() > 1:
        _widen_like_channels(widening, call, ('weight',), 'num_parameters')


def _widen_like_channels(widening: Widening, call: Call, keys: Sequence[str], size_name: str) -> None:
    actual = call['input'].shape[1]
    for key in keys:
        tensor = call.get(key)
        if is_own(tensor):
            axis_map = widening.axis_like(tensor, 'out', tensor.shape[0], actual, 'a norm')
            widening.set_sizes(widening.owner(tensor), **{size_name: actual})
            call[key] = widening.widen(tensor, {0: axis_map})
        elif from_parameters(tensor):
            call[key] = widening.widen_to_meet(tensor, [(actual,)])


@watch(F.layer_norm, names=('input', 'normalized_shape', 'weight', 'bias', 'eps'))
def layer_norm(widening: Widening, call: Call) -> None:
    """The normalised axes are the input's last ones."""
    shape = call['normalized_shape']
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    actual = tuple(call['input'].shape[-len(shape) :])
    for key in ('weight', 'bias'):
        tensor = call.get(key)
        if is_own(tensor) and tuple(tensor.shape) == shape:
            call[key] = widening.widen(
                tensor,
                {
                    axis: widening.axis_like(tensor, 'out', shape[axis], actual[axis], 'a norm')
                    for axis in range(len(shape))
                },
            )
        elif from_parameters(tensor):
            call[key] = widening.widen_to_meet(tensor, [actual])
    if actual != shape:
        name = widening.running[-1]
        before: Any = getattr(widening.modules[name], 'normalized_shape', None)
        if before is not None:
            widening.set_attribute(name, 'normalized_shape', type(before)(actual))
        call['normalized_shape'] = actual


@watch(F.rms_norm, names=('input', 'normalized_shape', 'weight', 'eps'))
def rms_norm(widening: Widening, call: Call) -> None:
    """The same as layer norm, without a bias."""
    layer_norm(widening, call)
