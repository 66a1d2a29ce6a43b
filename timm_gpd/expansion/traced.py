"""Where the tensors of a dry run come from.

A parameter or buffer is an *own* tensor; one that was computed from some of them and from nothing else is *derived*.
Both carry channels that may have to widen. All other tensors are activations, which are as wide as what they met.
"""

import math
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, TypeGuard

import torch

from ..private_torch import is_view, tree_map_only

__all__ = [
    'Axes',
    'channel_block',
    'from_parameters',
    'is_own',
    'mark_channels',
    'mark_derived',
    'mark_images',
    'mark_own',
    'mark_wide',
    'note_origin',
    'shows_narrow_images',
    'sources',
    'tensors_in',
    'view_axes',
]

_ORIGIN = 'gpd_origin'
_WIDE = 'gpd_wide'
_CHANNELS = 'gpd_channels'

# Of a view: which axis of the parameter each axis is; None where it is one of one entry, or of equal ones.
Axes = Tuple[Optional[int], ...]


class _Origin(NamedTuple):
    sources: Tuple[str, ...]
    is_own: bool
    axes: Optional[Axes]


class _Channels(NamedTuple):
    axis: int
    block: int


def mark_own(tensor: torch.Tensor, name: str) -> None:
    """Notes that a tensor is the parameter or buffer of that name."""
    setattr(tensor, _ORIGIN, _Origin((name,), True, tuple(range(tensor.dim()))))


def mark_derived(tensor: torch.Tensor, names: Tuple[str, ...], axes: Optional[Axes] = None) -> None:
    """Notes that a tensor was computed from the parameters and buffers of these names alone.

    Args:
        tensor: the tensor.
        names: its sources.
        axes: which axes of its only source its axes are, where it is a view of that.
    """
    setattr(tensor, _ORIGIN, _Origin(names, False, axes))


def mark_images(tensor: torch.Tensor) -> None:
    """Notes that a tensor is what the student is given. They are not wider than they were."""
    setattr(tensor, _WIDE, False)


def mark_wide(tensor: torch.Tensor) -> None:
    """Notes that a tensor is wider than the student's, or was computed from one that is."""
    setattr(tensor, _WIDE, True)


def shows_narrow_images(tensor: torch.Tensor) -> bool:
    """Whether a tensor was computed from the images, and from nothing that is wider than the student's."""
    return getattr(tensor, _WIDE, None) is False


def from_parameters(tensor: Any) -> TypeGuard[torch.Tensor]:
    """Whether something is an own or a derived tensor."""
    return isinstance(tensor, torch.Tensor) and _origin(tensor) is not None


def is_own(tensor: Any) -> TypeGuard[torch.Tensor]:
    """Whether something is a parameter or buffer itself."""
    return isinstance(tensor, torch.Tensor) and (_origin(tensor) or _Origin((), False)).is_own


def sources(tensor: torch.Tensor) -> Tuple[str, ...]:
    """Names of the parameters and buffers that an own or derived tensor is, or was computed from."""
    origin = _origin(tensor)
    return origin.sources if origin is not None else ()


def mark_channels(tensor: torch.Tensor, axis: int) -> None:
    """Notes which axis of a layer's output, counted from the end, holds channels."""
    setattr(tensor, _CHANNELS, _Channels(axis, 1))


def channel_block(tensor: torch.Tensor) -> int:
    """How many entries of every channel lie side by side on the last axis; more than 1 where maps were flattened."""
    channels = getattr(tensor, _CHANNELS, None)
    return channels.block if channels is not None else 1


def _note_channels(inputs: List[torch.Tensor], output: torch.Tensor) -> None:
    """Follows the channel axis through functions that leave it where it is, and through ``x.flatten(1)``."""
    for tensor in inputs:
        channels = getattr(tensor, _CHANNELS, None)
        if channels is None or output is tensor or tensor.dim() < -channels.axis:
            continue
        flattened = (tensor.shape[0], tensor.shape[1:].numel()) if tensor.dim() > 2 else None
        if flattened == output.shape:
            block = math.prod(tensor.shape[tensor.dim() + channels.axis + 1 :])
            setattr(output, _CHANNELS, _Channels(-1, channels.block * block))
        elif output.dim() == tensor.dim() and (not is_view(output) or output.stride() == tensor.stride()):
            setattr(output, _CHANNELS, channels)  # views in other strides may have axes in another order


def view_axes(tensor: torch.Tensor) -> Optional[Axes]:
    """Which axis of a parameter each axis of an own tensor, or of a transposed one, is; None of any other tensor."""
    origin = _origin(tensor)
    return origin.axes if origin is not None else None


def note_origin(function: Callable, args: Tuple[Any, ...], kwargs: Dict[str, Any], output: Any) -> None:
    """Marks the output of a function as derived, where its inputs are own or derived tensors alone, and as wide.

    Args:
        function: what was called.
        args: its arguments, nested tuples, lists and dicts of anything. Tensors of integers are indices and tell
            nothing.
        kwargs: its arguments by name.
        output: what it returned, nested in the same way.
    """
    inputs, outputs = list(tensors_in((args, kwargs))), list(tensors_in(output))
    for tensor in outputs:
        _note_channels(inputs, tensor)
    known = [getattr(tensor, _WIDE) for tensor in inputs if hasattr(tensor, _WIDE)]
    if known:
        for tensor in outputs:
            setattr(tensor, _WIDE, any(known))
    names: Dict[str, None] = {}  # a set that keeps its order
    for tensor in inputs:
        if from_parameters(tensor):
            names.update(dict.fromkeys(sources(tensor)))
        elif tensor.is_floating_point():
            return
    if names:
        for tensor in outputs:
            if not from_parameters(tensor):
                mark_derived(tensor, tuple(names))
        if len(inputs) == 1 and output is not inputs[0] and isinstance(output, torch.Tensor) and not is_own(output):
            mark_derived(output, tuple(names), _axes_of_view(function, args, kwargs, inputs[0]))


def _axes_of_view(
    function: Callable,
    args: Tuple[Any, ...],
    kwargs: Dict[str, Any],
    tensor: torch.Tensor,
) -> Optional[Axes]:
    """Which axes of a parameter the output's are, if the function only orders, adds, drops and repeats axes.

    It is called once more on a tensor without values whose axes are told by their strides.
    """
    known = view_axes(tensor)
    if known is None:
        return None
    stand_in = torch.empty(tensor.shape, dtype=tensor.dtype, device='meta')
    try:
        output = function(
            *tree_map_only(torch.Tensor, lambda _: stand_in, args),
            **tree_map_only(torch.Tensor, lambda _: stand_in, kwargs),
        )
    except Exception:  # it needs values
        return None
    if not isinstance(output, torch.Tensor) or not (output is stand_in or is_view(output)):
        return None
    places = {
        (size, stride): axis for axis, (size, stride) in enumerate(zip(stand_in.shape, stand_in.stride())) if size > 1
    }
    axes = tuple(
        known[places[size, stride]] if (size, stride) in places else None if size == 1 or stride == 0 else -1
        for size, stride in zip(output.shape, output.stride())
    )
    return axes if -1 not in axes and len(axes) - axes.count(None) == len(places) else None


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)


def _origin(tensor: torch.Tensor) -> Optional[_Origin]:
    return getattr(tensor, _ORIGIN, None)
