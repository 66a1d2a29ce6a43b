"""Convolutions and transposed convolutions."""

from typing import Dict, Optional

import torch.nn.functional as F

from ...axes import AxisMap
from ..widening import Widening
from .registry import Call, watch
from .weight import new_weight, widen_bias, widen_bias_of_tied_weight, widen_weight

CONV = ('input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'groups')
CONV_TRANSPOSE = ('input', 'weight', 'bias', 'stride', 'padding', 'output_padding', 'groups', 'dilation')


@watch(F.conv1d, F.conv2d, F.conv3d, names=CONV)
def convolution(widening: Widening, call: Call) -> None:
    """Depthwise convolutions get more groups; the groups of others stay, and each is wider."""
    weight, groups = new_weight(widening, call), call.get('groups', 1)
    if weight is None:
        widen_bias_of_tied_weight(widening, call, [1])
        return
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    actual = call['input'].shape[1 - weight.dim()]
    owner = widening.owner(weight)
    axes: Dict[int, AxisMap]
    sum_axis: Optional[int]
    if groups == inputs == outputs and groups > 1:
        # Nothing is summed over channels, so there is no divisor.
        out_map = widening.axis_like(weight, 'out', outputs, actual, 'a convolution')
        axes, sum_axis = {0: out_map}, None
        call['groups'] = actual
        widening.set_sizes(owner, groups=actual)
    else:
        out_map = widening.out_axis(weight, outputs)
        in_map = widening.axis_like(weight, 'in', weight.shape[1], actual // groups, 'a group of a convolution')
        axes, sum_axis = {0: out_map, 1: in_map}, 1
    widening.set_sizes(owner, in_channels=actual, out_channels=out_map.teacher_size)
    widen_weight(widening, call, weight, axes, sum_axis)
    widen_bias(widening, call, out_map)


@watch(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, names=CONV_TRANSPOSE)
def transposed_convolution(widening: Widening, call: Call) -> None:
    """The same with inputs first; the bias spans all groups, the weight's second axis one."""
    weight, groups = call['weight'], call.get('groups', 1)
    if not widening.is_new(weight):
        return
    inputs, outputs = weight.shape[0], weight.shape[1] * groups
    actual = call['input'].shape[1 - weight.dim()]
    owner = widening.owner(weight)
    in_map = widening.axis_like(weight, 'in', inputs, actual, 'a transposed convolution')
    axes: Dict[int, AxisMap]
    sum_axis: Optional[int]
    if groups == inputs == outputs and groups > 1:
        out_map, axes, sum_axis = in_map, {0: in_map}, None
        call['groups'] = actual
        widening.set_sizes(owner, groups=actual)
    else:
        out_map = widening.out_axis(weight, weight.shape[1])
        axes, sum_axis = {0: in_map, 1: out_map}, 0
    bias_map = out_map if out_map.size == outputs else widening.out_axis(weight, outputs)
    widening.set_sizes(owner, in_channels=actual, out_channels=bias_map.teacher_size)
    call['weight'] = widening.widen(weight, axes, sum_axis)
    widen_bias(widening, call, bias_map)
