"""What an optimizer remembers of each parameter, brought from a dynamic teacher's tensors to its student's and back.

Slicing and replicating are the plan's, as of the parameters. What differs is scale: a state that is linear or quadratic
in gradients scales as they do. A student's tensor is ``multiplier * slice`` of the stored one, so its gradient is that
of the slice over ``multiplier``, which is 1 for ``scale='student'`` and the divisor for ``scale='teacher'``.
"""

from functools import partial
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import torch

from ..axes import TensorMap
from .branches import BranchedKernel
from .dynamic_teacher import DynamicTeacher
from .merge import inputs_last
from .shared_tensors import add_to_first_replicas

__all__ = ['State', 'replicate_states', 'slice_states']

# What an optimizer remembers of one parameter, by key: tensors of its shape, step counts, and whatever else.
State = Dict[str, Any]

_SMALLEST_GAMMA = 0.1  # what the gradient of a merged kernel is read off a branch's by, at least


def slice_states(
    dynamic_teacher: DynamicTeacher,
    states: Mapping[str, State],
    powers: Mapping[str, int],
) -> Dict[str, Optional[State]]:
    """States of the student's parameters, from those of the dynamic teacher's.

    A merged kernel has no state of its own. It gets that of the branch ``kxk``, whose gradient is gamma times the
    merged kernel's: exact as long as gamma stays as it is, and bounded where gamma is small.

    Args:
        dynamic_teacher: whose parameters the states are of; it says how they widen.
        states: by the dynamic teacher's names; tensors of a parameter's shape are one number for each of its entries.
        powers: the power of the gradient that each key of a state is of. Of other keys it is not known.

    Returns:
        New states by the student's names. None where one cannot be told: it has tensors of other shapes, or must be
        scaled and its power is not known.
    """
    result: Dict[str, Optional[State]] = {}
    for name, stored_name, kernel in _names(dynamic_teacher):
        tensor_map, multiplier = _map_of(dynamic_teacher, name)
        state: Optional[State] = states.get(stored_name, {})
        shape = tuple(dynamic_teacher.get_parameter(stored_name).shape)
        if kernel is not None and state is not None:
            state = _convert(state, shape, partial(_of_merged_kernel, kernel), powers, is_scaled=True)
            shape = kernel.shape
        if tensor_map is not None and state is not None:
            state = _convert(state, shape, partial(_slice, tensor_map, multiplier), powers, multiplier > 1)
        result[name] = _copy(state)
    return result


def replicate_states(
    dynamic_teacher: DynamicTeacher,
    states: Mapping[str, State],
    powers: Mapping[str, int],
) -> Dict[str, Optional[State]]:
    """States of the dynamic teacher's parameters, from those of its student's: what :func:`slice_states` undoes.

    Replica 0 goes on as the student. The gradients that the other replicas will get are smaller: as many replicas as
    there are share what the student's entry gets alone. So they begin with what they would have gathered. What is of no
    known power of the gradient, or a copy of weights as MADGRAD's and Lookahead's, has no replicas: these begin anew.

    Args:
        dynamic_teacher: made of the student whose states these are, with gammas as they start.
        states: by the student's names.
        powers: see :func:`slice_states`.

    Returns:
        New states by the dynamic teacher's names, of those that have a counterpart in the student; None where one
        begins anew. Branches beside the first one have none.
    """
    result: Dict[str, Optional[State]] = {}
    for name, stored_name, kernel in _names(dynamic_teacher):
        tensor_map, multiplier = _map_of(dynamic_teacher, name)
        state: Optional[State] = states.get(name, {})
        if tensor_map is not None and state is not None:
            balanced = dynamic_teacher.scale == 'balanced'
            change = partial(_replicate, tensor_map, multiplier, tensor_map.divisor if balanced else 1)
            state = _convert(state, tensor_map.shape, change, powers, is_scaled=True)
        if kernel is not None and state is not None:
            state = _convert(state, kernel.shape, lambda value, power: inputs_last(value), powers, is_scaled=False)
        result[stored_name] = _copy(state)
    return result


def _names(dynamic_teacher: DynamicTeacher) -> Iterator[Tuple[str, str, Optional[BranchedKernel]]]:
    """The student's name of each parameter, the stored tensor's, and the branches that it is the first of."""
    for name, _ in dynamic_teacher.wide.named_parameters():
        yield name, f'wide.{name}', None
    for owner, module in dynamic_teacher.branches.named_modules():
        if isinstance(module, BranchedKernel):
            prefix = f'{owner}.' if owner else ''
            yield f'{prefix}weight', f'branches.{prefix}kernel', module


def _map_of(dynamic_teacher: DynamicTeacher, name: str) -> Tuple[Optional[TensorMap], int]:
    """How a tensor widens, and what a slice of the stored one is multiplied by to be the student's."""
    tensor_map = dynamic_teacher.plan.tensors.get(name)
    return tensor_map, tensor_map.divisor if tensor_map is not None and dynamic_teacher.scale == 'teacher' else 1


def _convert(
    state: State,
    shape: Sequence[int],
    change: Callable[[torch.Tensor, int], torch.Tensor],
    powers: Mapping[str, int],
    is_scaled: bool,
) -> Optional[State]:
    """A state whose tensors are changed.

    Args:
        state: of a parameter of ``shape``. Numbers, and tensors that are one, stay.
        shape: what a tensor has that is one number for each entry.
        change: takes such a tensor and its power of the gradient, 0 where that is not known.
        powers: see :func:`slice_states`.
        is_scaled: whether the power decides.

    Returns:
        The state; None if it cannot be told.
    """
    result: State = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            if tuple(value.shape) != tuple(shape) or (is_scaled and key not in powers):
                return None
            value = change(value, powers.get(key, 0))
        result[key] = value
    return result


def _slice(tensor_map: TensorMap, multiplier: int, value: torch.Tensor, power: int) -> torch.Tensor:
    """Of a stored tensor's entries, those that are the student's."""
    return tensor_map.first_replica(value) / multiplier**power


def _replicate(
    tensor_map: TensorMap,
    multiplier: int,
    others_multiplier: int,
    value: torch.Tensor,
    power: int,
) -> torch.Tensor:
    """For every replica of each of the student's entries; their number divides all but the first."""
    whole = tensor_map.replicate(value * multiplier**power)
    is_student = torch.zeros_like(whole)
    add_to_first_replicas([is_student], [torch.ones_like(value)], [tensor_map])
    return torch.where(is_student > 0, whole, whole * (others_multiplier * value.numel() / whole.numel()) ** power)


def _of_merged_kernel(kernel: BranchedKernel, value: torch.Tensor, power: int) -> torch.Tensor:
    """Of the first branch's entries, shape (O, K, I), to the merged kernel's, shape (O, I, k, k)."""
    gamma = kernel.gamma[0].detach()
    gamma = gamma.abs().clamp(min=_SMALLEST_GAMMA).copysign(gamma)
    return (value / gamma[:, None, None] ** power).transpose(1, 2).reshape(kernel.shape)


def _copy(state: Optional[State]) -> Optional[State]:
    """A state that shares no memory with the one it was made from."""
    if state is None:
        return None
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
