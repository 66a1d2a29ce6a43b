"""Recurrent layers: LSTM, GRU and plain ones."""

from typing import Any, Tuple

import torch
import torch.nn as nn

from ...axes import AxisMap
from ..copies import blank
from ..widening import Widening
from .registry import stand_in, watch_module


@watch_module(nn.RNNBase)
def recurrent_layer(widening: Widening, name: str, module: Any, x: torch.Tensor) -> None:
    """Inputs are as wide as what arrives; the hidden state widens by the ratio. Gates are the rows' outer axis."""
    first = module.weight_ih_l0
    if not widening.is_new(first):
        return
    in_map = widening.axis_like(first, 'in', module.input_size, x.shape[-1], 'a recurrent layer')
    ratio = widening.out_axis(first, first.shape[0]).ratio
    for key, tensor in list(module._parameters.items()):
        axes = {axis: AxisMap.uniform(size, ratio) for axis, size in enumerate(tensor.shape)}
        if key.startswith('weight_ih_l0'):
            axes[1] = in_map
        widening.widen(tensor, axes, 1 if tensor.dim() > 1 else None)
    widening.set_sizes(
        name, input_size=x.shape[-1], hidden_size=ratio * module.hidden_size, proj_size=ratio * module.proj_size
    )


@stand_in(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def recurrent_outputs(
    x: torch.Tensor,
    state: Any,
    weights: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Tuple[torch.Tensor, ...]:
    """Blank outputs and states: the layers themselves go step by step, which takes long."""
    state = state if isinstance(state, tuple) else (state,)
    width = state[0].shape[-1] * (2 if bidirectional else 1)
    return (blank((*x.shape[:-1], width), x.dtype, x.device.type), *state)
