"""Where the tensors of a dry run come from.

A parameter or buffer is an *own* tensor; one that was computed from some of them and from nothing else is *derived*.
Both carry channels that may have to widen. All other tensors are activations, which are as wide as what they met.
"""
from typing import Any, Dict, Iterator, NamedTuple, Optional, Tuple, TypeGuard

import torch

__all__ = ['from_parameters', 'is_own', 'mark_derived', 'mark_own', 'note_origin', 'sources', 'tensors_in']

_ORIGIN = 'gpd_origin'


class _Origin(NamedTuple):
    sources: Tuple[str, ...]
    is_own: bool


def mark_own(tensor: torch.Tensor, name: str) -> None:
    """Notes that a tensor is the parameter or buffer of that name."""
    setattr(tensor, _ORIGIN, _Origin((name,), True))


def mark_derived(tensor: torch.Tensor, names: Tuple[str, ...]) -> None:
    """Notes that a tensor was computed from the parameters and buffers of these names alone."""
    setattr(tensor, _ORIGIN, _Origin(names, False))


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


def note_origin(inputs: Any, output: Any) -> None:
    """Marks the output of a function as derived, where its inputs are own or derived tensors alone.

    Args:
        inputs: the arguments, nested tuples, lists and dicts of anything. Tensors of integers are indices and tell
            nothing.
        output: what the function returned, nested in the same way.
    """
    names: Dict[str, None] = {}  # a set that keeps its order
    for tensor in tensors_in(inputs):
        if from_parameters(tensor):
            names.update(dict.fromkeys(sources(tensor)))
        elif tensor.is_floating_point():
            return
    if names:
        for tensor in tensors_in(output):
            if not from_parameters(tensor):
                mark_derived(tensor, tuple(names))


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
