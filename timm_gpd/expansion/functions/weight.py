"""Weights of layers, some of which are computed from a parameter (weight standardisation) before a layer uses them."""

import math
from dataclasses import replace
from typing import Mapping, Optional, Sequence

import torch

from ...axes import AxisMap
from ..traced import from_parameters, is_own, sources, view_axes
from ..widening import Widening
from .registry import Call

__all__ = [
    'check_divisor',
    'check_kept',
    'new_weight',
    'widen_bias',
    'widen_bias_of_tied_weight',
    'widen_view',
    'widen_weight',
]


def new_weight(widening: Widening, call: Call) -> Optional[torch.Tensor]:
    """The parameter that a layer's weight is, or is computed from entry by entry; None where it has been widened."""
    weight = call['weight']
    if not from_parameters(weight):
        return None
    if view_axes(weight) is not None:
        return weight if sources(weight)[0] not in widening.met else None
    return next(
        (
            widening.tensor(source)
            for source in sources(weight)
            if source not in widening.tensors and widening.tensor(source).shape == weight.shape
        ),
        None,
    )


def widen_weight(
    widening: Widening,
    call: Call,
    parameter: torch.Tensor,
    axes: Mapping[int, AxisMap],
    sum_axis: Optional[int],
) -> None:
    """Widens a layer's weight, in the call and in the student.

    A weight that is computed (weight standardisation) may not be divided by way of its parameter, so the input is
    divided instead; this takes for granted that it is computed alike from every replica.

    Args:
        widening: the student in the dry run.
        call: arguments of the layer's function.
        parameter: what :func:`new_weight` found.
        axes: axis -> how it is replicated.
        sum_axis: the axis that the layer sums over, one of ``axes``; None for depthwise kernels.

    Raises:
        UnsupportedModelError: if the weight is computed from a parameter of another module.
    """
    weight = call['weight']
    if parameter is weight:
        call['weight'] = widen_view(widening, parameter, axes, sum_axis)
        return
    name = widening.owner(parameter)
    if name != widening.running[-1]:
        raise widening.unsupported(f'a weight is computed from {sources(parameter)[0]}, of another module')
    for source in sources(weight):
        other = widening.tensor(source)
        if other.dim() == parameter.dim():
            widening.widen(
                other,
                {
                    axis: axis_map
                    for axis, axis_map in axes.items()
                    if other is parameter or other.shape[axis] == axis_map.size > 1
                },
            )
    if sum_axis is not None and axes[sum_axis].ratio > 1:
        widening.divided_inputs[name] = axes[sum_axis].ratio
    wide = widening.tensor(sources(parameter)[0])
    call['weight'] = widening.derived(wide.shape, weight)


def widen_bias(widening: Widening, call: Call, out_map: AxisMap) -> None:
    """Widens a layer's bias like its outputs."""
    bias = call.get('bias')
    if is_own(bias):
        call['bias'] = widening.widen(bias, {0: out_map})
    elif from_parameters(bias):
        call['bias'] = widening.widen_to_meet(bias, [(out_map.teacher_size,)])


def widen_bias_of_tied_weight(widening: Widening, call: Call, summed: Sequence[int]) -> None:
    """A weight that another layer has widened already leaves this layer's bias to be widened like its outputs.

    Args:
        widening: the student in the dry run.
        call: arguments of the layer's function.
        summed: the weight's axes that the layer sums over.

    Raises:
        UnsupportedModelError: if this layer needs another divisor than the first one did.
    """
    weight, bias = call['weight'], call.get('bias')
    order = view_axes(weight) if from_parameters(weight) else None
    if order is None:
        return
    check_divisor(widening, sources(weight)[0], [order[axis] for axis in summed])
    if is_own(bias) and widening.is_new(bias) and sources(weight)[0] in widening.tensors:
        axes = dict(widening.tensors[sources(weight)[0]].axes)
        call['bias'] = widening.widen(bias, {0: axes[order[0]]} if order[0] in axes else {})


def widen_view(
    widening: Widening,
    tensor: torch.Tensor,
    axes: Mapping[int, AxisMap],
    sum_axis: Optional[int] = None,
) -> torch.Tensor:
    """:meth:`Widening.widen` of an own tensor, or of one whose axes are in another order, by the axes that it has.

    Raises:
        UnsupportedModelError: if an axis that is wider is one along which the parameter is repeated.
    """
    (first,) = sources(tensor)
    order = view_axes(tensor)
    if any(order[axis] is None and axis_map.ratio > 1 for axis, axis_map in axes.items()):
        raise widening.unsupported(f'{first} is repeated along an axis that is wider')
    wide = widening.widen(
        widening.tensor(first),
        {order[axis]: axis_map for axis, axis_map in axes.items()},
        None if sum_axis is None else order[sum_axis],
    )
    if is_own(tensor):
        return wide
    return widening.derived(
        [size if axis is None else wide.shape[axis] for axis, size in zip(order, tensor.shape)], tensor
    )


def check_divisor(widening: Widening, name: str, summed: Sequence[int]) -> None:
    """Checks that a tensor which was met before is divided by what a sum over some of its axes needs.

    Notes where that is another sum than before.

    Raises:
        UnsupportedModelError: if it is not.
    """
    if name in widening.tensors and name not in widening.ruled:
        axes, divisor = dict(widening.tensors[name].axes), widening.tensors[name].divisor
        wide = [axis for axis in summed if axis in axes]
        needed = math.prod(axes[axis].ratio for axis in wide)
        if needed != divisor:
            raise widening.unsupported(
                f'{name} has to be divided by {needed} here, and by {divisor} where it was met before'
            )
        if needed > 1 and wide != [widening.tensors[name].sum_axis]:
            known = widening.tensors[name]
            aliases = [alias for alias, tensor_map in widening.tensors.items() if tensor_map is known]
            widening.tensors.update(dict.fromkeys(aliases, replace(known, has_other_sums=True)))


def check_kept(widening: Widening, name: str, axis: int, why: str) -> None:
    """Checks that an axis of a tensor which was met before was not wider.

    Raises:
        UnsupportedModelError: if it was, with the reason why it may not be.
    """
    if name in widening.tensors and axis in dict(widening.tensors[name].axes):
        raise widening.unsupported(f'axis {axis} of {name} was wider where it was met before, but {why}')
