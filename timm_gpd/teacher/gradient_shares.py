"""How much of the teacher's gradient goes into the entries that are the student's, too."""

from typing import Dict, List, Mapping, Sequence

import torch

from ..axes import TensorMap
from .plain_operators import has_second_derivatives, needs_plain_operators
from .shared_tensors import first_replica_mask, multiply_first_replicas

__all__ = ['scale_gradients_of_first_replicas']


def scale_gradients_of_first_replicas(
    teacher: Mapping[str, torch.Tensor],
    tensor_maps: Mapping[str, TensorMap],
    factors: Mapping[str, float],
) -> Dict[str, torch.Tensor]:
    """The teacher's tensors as they are, whose gradients are multiplied on the way back.

    Args:
        teacher: tensors by name, in the teacher's shapes.
        tensor_maps: how they widen; one without axes is the student's whole tensor.
        factors: of the gradients of the entries that are first replicas, where that is not 1.

    Returns:
        Tensors of the same values.
    """
    result, names = dict(teacher), [name for name, factor in factors.items() if factor != 1]
    if names:
        scale = _scale_plainly if needs_plain_operators() else _ScaleGradients.apply
        tensors = [teacher[name] for name in names]
        scaled = scale([tensor_maps[name] for name in names], [factors[name] for name in names], *tensors)
        result.update(zip(names, scaled))
    return result


def _scale_plainly(
    tensor_maps: Sequence[TensorMap],
    factors: Sequence[float],
    *tensors: torch.Tensor,
) -> List[torch.Tensor]:
    """What :class:`_ScaleGradients` computes, in operators that any transform knows."""
    # A constant, and a zero with a gradient.
    return [
        tensor.detach() + (tensor - tensor.detach()) * first_replica_mask(tensor.detach(), tensor_map, factor)
        for tensor, tensor_map, factor in zip(tensors, tensor_maps, factors)
    ]


class _ScaleGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor_maps: Sequence[TensorMap], factors: Sequence[float], *tensors: torch.Tensor):
        ctx.tensor_maps, ctx.factors = tensor_maps, factors
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads):
        given = [i for i, grad in enumerate(grads) if grad is not None]
        tensor_maps, factors = ([values[i] for i in given] for values in (ctx.tensor_maps, ctx.factors))
        result = list(grads)
        if has_second_derivatives():
            for i, tensor_map, factor in zip(given, tensor_maps, factors):
                result[i] = grads[i] * first_replica_mask(grads[i].detach(), tensor_map, factor)
        else:
            scaled = [grads[i].clone() for i in given]  # a gradient may be another tensor's as well
            multiply_first_replicas(scaled, factors, tensor_maps)
            for i, grad in zip(given, scaled):
                result[i] = grad
        return None, None, *result
