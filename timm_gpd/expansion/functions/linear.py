"""Linear layers and embeddings."""

import torch.nn.functional as F

from ..traced import channel_block, is_own, sources
from ..widening import Widening
from .registry import Call, watch
from .weight import (
    check_divisor,
    check_kept,
    new_weight,
    widen_bias,
    widen_bias_of_tied_weight,
    widen_weight,
)


@watch(F.linear, names=('input', 'weight', 'bias'))
def linear(widening: Widening, call: Call) -> None:
    """Inputs are as wide as what arrives; outputs widen by the ratio."""
    weight = new_weight(widening, call)
    if weight is None:
        widen_bias_of_tied_weight(widening, call, [1])
        return
    outputs, inputs = weight.shape
    actual = call['input'].shape[-1]
    in_map = widening.axis_like(weight, 'in', inputs, actual, 'a linear layer', channel_block(call['input']))
    out_map = widening.out_axis(weight, outputs)
    widening.set_sizes(widening.owner(weight), in_features=actual, out_features=out_map.teacher_size)
    widen_weight(widening, call, weight, {0: out_map, 1: in_map}, 1)
    widen_bias(widening, call, out_map)


@watch(F.embedding, names=('input', 'weight'))
def embedding(widening: Widening, call: Call) -> None:
    """The entries stay, their vectors widen by the ratio."""
    weight = call['weight']
    if widening.is_new(weight):
        axis_map = widening.out_axis(weight, weight.shape[1])
        widening.set_sizes(widening.owner(weight), embedding_dim=axis_map.teacher_size)
        call['weight'] = widening.widen(weight, {1: axis_map})
    elif is_own(weight):
        check_kept(widening, sources(weight)[0], 0, 'its rows are looked up by number')
        check_divisor(widening, sources(weight)[0], [])
