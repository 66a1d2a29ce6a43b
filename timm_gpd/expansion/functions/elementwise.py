"""Parameters and activations that are put together: entry by entry, or one beside the other."""

from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch

from ...private_torch import TO_COPY, OpOverload, TorchDispatchMode, tree_leaves, tree_map_only
from ..traced import from_parameters, tensors_in
from ..widening import Widening
from .registry import Arguments, Call, Named, Positional, forms, watch, watch_call, watch_where

Shapes = List[Sequence[int]]

# Operators that work entry by entry and that torch does not mark so.
ALSO_POINTWISE = {torch.ops.aten.rsub, torch.ops.aten.floor_divide, torch.ops.aten.copy_}
# Operators that change no shape, or only broadcast.
NEUTRAL = {TO_COPY, torch.ops.aten.expand, torch.ops.aten.clone, torch.ops.aten.alias}
_KNOWN: Dict[Tuple[Callable, int], bool] = {}


def is_elementwise(function: Callable, args: Positional, kwargs: Named) -> bool:
    """Whether a function combines a parameter with other tensors entry by entry.

    Told by what it does: it is called once on small tensors without values, and torch says of the operators that it
    is made of if they work entry by entry. So all names of a function are one: ``torch.mul``, ``torch.multiply``,
    ``*``, ``*=``, ``Tensor.__rmul__``.

    Args:
        function: a torch function.
        args: its arguments.
        kwargs: its arguments by name.
    """
    tensors = list(tensors_in((args, kwargs)))
    if len(tensors) < 2 or not any(map(from_parameters, tensors)):
        return False
    key = (function, len(tensors))
    if key not in _KNOWN:
        _KNOWN[key] = _runs_pointwise(function, args, kwargs)
    return _KNOWN[key]


def _runs_pointwise(function: Callable, args: Positional, kwargs: Named) -> bool:
    args, kwargs = tree_map_only(
        torch.Tensor, lambda tensor: torch.empty(2, 3, dtype=tensor.dtype, device='meta'), (args, kwargs)
    )
    with _Operators() as operators:
        try:
            function(*args, **kwargs)
        except Exception:  # it does not take tensors of any shape
            return False
    pointwise = [
        torch.Tag.pointwise in operator.tags or operator.overloadpacket in ALSO_POINTWISE
        for operator in operators.called
        if operator.overloadpacket not in NEUTRAL
    ]
    return bool(pointwise) and all(pointwise)


class _Operators(TorchDispatchMode):
    """Takes down which operators run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.called: List[OpOverload] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func)
        return func(*args, **(kwargs or {}))


@watch_where(is_elementwise)
@watch_call(torch.broadcast_tensors)
def elementwise(widening: Widening, args: Positional, kwargs: Named) -> Arguments:
    """Parameters that are added to or multiplied with wider activations: biases, scales, position embeddings."""

    def shapes_met(tensor: torch.Tensor, others: List[torch.Tensor]) -> Shapes:
        return [other.shape for other in others]

    return _widen_parameters(widening, args, kwargs, shapes_met)


@watch_call(torch.cat, torch.concat, torch.concatenate)
def concatenation(widening: Widening, args: Positional, kwargs: Named) -> Arguments:
    """Tokens that are put beside wider ones: all axes but that of the concatenation are alike."""
    dim: int = next((kwargs[key] for key in ('dim', 'axis') if key in kwargs), args[1] if len(args) > 1 else 0)

    def shapes_met(tensor: torch.Tensor, others: List[torch.Tensor]) -> Shapes:
        shapes: Shapes = []
        for other in others:
            if other.dim() == tensor.dim():
                shape = list(other.shape)
                shape[dim] = tensor.shape[dim]
                shapes.append(shape)
        return shapes

    return _widen_parameters(widening, args, kwargs, shapes_met)


@watch_call(torch.stack)
def stacking(widening: Widening, args: Positional, kwargs: Named) -> Arguments:
    """Tensors of one shape that are put side by side on a new axis."""
    return elementwise(widening, args, kwargs)


@watch_call(*forms('expand', 'broadcast_to'))
def expansion(widening: Widening, args: Positional, kwargs: Named) -> Arguments:
    """A parameter that is repeated to a shape which is given in numbers; -1 leaves an axis as it is."""
    if args and from_parameters(args[0]):
        sizes = [size for size in tree_leaves((args[1:], kwargs)) if type(size) is int]
        if widening.mismatch(args[0].shape, sizes):
            args = (widening.widen_to_meet(args[0], [sizes]), *args[1:])
    return args, kwargs


@watch(*forms('expand_as'), names=('input', 'other'))
def expansion_as(widening: Widening, call: Call) -> None:
    """A parameter that is repeated to the shape of something wider."""
    if from_parameters(call['input']) and widening.mismatch(call['input'].shape, call['other'].shape):
        call['input'] = widening.widen_to_meet(call['input'], [call['other'].shape])


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
