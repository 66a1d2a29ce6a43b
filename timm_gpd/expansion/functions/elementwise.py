"""Parameters and activations that are put together: entry by entry, or one beside the other."""
from typing import Callable, List, Sequence

import torch
from ...private_torch import tree_map_only

from ..traced import from_parameters, tensors_in
from ..widening import Widening
from .registry import Arguments, Named, Positional, watch_methods

Shapes = List[Sequence[int]]


@watch_methods(
    'add', 'radd', 'iadd', 'sub', 'rsub', 'isub', 'mul', 'rmul', 'imul', 'div', 'truediv', 'rtruediv', 'itruediv',
    'addcmul', 'where', 'maximum', 'minimum', 'lerp')
def elementwise(widening: Widening, args: Positional, kwargs: Named) -> Arguments:
    """Parameters that are added to or multiplied with wider activations: biases, scales, position embeddings."""
    def shapes_met(tensor: torch.Tensor, others: List[torch.Tensor]) -> Shapes:
        return [other.shape for other in others]

    return _widen_parameters(widening, args, kwargs, shapes_met)


@watch_methods('cat', 'concat')
def concatenation(widening: Widening, args: Positional, kwargs: Named) -> Arguments:
    """Tokens that are put beside wider ones: all axes but that of the concatenation are alike."""
    dim: int = kwargs['dim'] if 'dim' in kwargs else (args[1] if len(args) > 1 else 0)

    def shapes_met(tensor: torch.Tensor, others: List[torch.Tensor]) -> Shapes:
        shapes: Shapes = []
        for other in others:
            if other.dim() == tensor.dim():
                shape = list(other.shape)
                shape[dim] = tensor.shape[dim]
                shapes.append(shape)
        return shapes

    return _widen_parameters(widening, args, kwargs, shapes_met)


def _widen_parameters(
        widening: Widening,
        args: Positional,
        kwargs: Named,
        shapes_met: Callable[[torch.Tensor, List[torch.Tensor]], Shapes],
) -> Arguments:
    """Widens every own or derived tensor among the arguments to meet the shapes that the others have for it."""
    tensors = list(tensors_in((args, kwargs)))
    if len(tensors) < 2:
        return args, kwargs

    def fit(tensor: torch.Tensor) -> torch.Tensor:
        if not from_parameters(tensor):
            return tensor
        return widening.widen_to_meet(tensor, shapes_met(tensor, [other for other in tensors if other is not tensor]))

    return tree_map_only(torch.Tensor, fit, (args, kwargs))
