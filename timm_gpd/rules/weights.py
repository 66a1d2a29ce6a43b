"""Rules of modules that compute a weight, or hold one in another shape."""

from ..axes import AxisMap
from .context import RuleContext
from .rule import Rule, register_rule


def mixture_of_kernels(rule: RuleContext) -> None:
    """Every expert's kernel is one row, flattened from (outputs, inputs of a group, height, width)."""
    conv, ratio = rule.module, rule.ratio
    outputs, inputs, *kernel = conv.weight_shape
    area = kernel[0] * kernel[1]
    rule.set('in_channels', conv.in_channels * ratio)
    rule.set('out_channels', outputs * ratio)
    axes = [(1, AxisMap.uniform(outputs * inputs * area, ratio, inputs * area))]
    if inputs == 1:
        rule.set('groups', conv.groups * ratio)
    else:
        axes.append((1, AxisMap.uniform(outputs * ratio * inputs * area, ratio, area)))
    rule.widen('weight', axes, sum_axis=None if inputs == 1 else 1)
    rule.set('weight_shape', (outputs * ratio, inputs if inputs == 1 else inputs * ratio, *kernel))


register_rule('timm.layers.cond_conv2d.CondConv2d', Rule(params={'bias': 1}, code=mixture_of_kernels))
register_rule('timm.models._efficientnet_blocks.CondConvResidual', Rule(keep=('routing_fn',)))
