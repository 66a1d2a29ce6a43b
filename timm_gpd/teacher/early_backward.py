"""A backward pass that runs as soon as its loss is there, so that its activations are gone when the next model runs.

A sum of losses may be differentiated one by one where no loss needs the graph of another: the dynamic teacher's does
not need the student, and the student's takes the teacher's logits as constants. What is left of the first loss is its
gradients, which join the backward pass of the sum. Memory then is that of one model's activations at a time.
"""
from typing import Any, Callable, Dict, Iterable, List, Mapping, Tuple

import torch
from torch.autograd.function import once_differentiable

from ..private_torch import can_trace_backward, multiply_each

__all__ = ['backward_early']


def backward_early(
        run: Callable[[Mapping[str, torch.Tensor]], Dict[str, torch.Tensor]],
        tensors: Dict[str, torch.Tensor],
        parameters: Iterable[torch.Tensor] = (),
) -> Tuple[Dict[str, torch.Tensor], Callable[[], torch.Tensor]]:
    """Runs a function that ends in a loss, and the backward pass of that loss.

    Where that is not possible the function only runs, and the rest comes with the backward pass of the sum, as usual:
    in float16 autocast, as the scale of the gradients is not known before; where no gradients are asked for; and
    compiled without :func:`timm_gpd.private_torch.trace_backward`.

    Args:
        run: takes ``tensors`` and returns tensors by name, of which ``'loss'`` is a scalar.
        tensors: it is emptied, so that tensors that nothing else holds are freed by the backward pass.
        parameters: what else ``run`` computes with that wants gradients.

    Returns:
        What ``run`` returned, detached; and a function that makes a scalar 0 whose gradients are those of the loss,
        to add to another loss. Called after the other's forward pass, it makes these gradients the first of the
        backward pass, and what they add up with is complete as early as it can be. It can be differentiated once.
    """
    # Tied tensors come under several names.
    wanted = {id(tensor): tensor for tensor in (*tensors.values(), *parameters) if tensor.requires_grad}
    early = torch.is_grad_enabled() and bool(wanted) and _is_possible(next(iter(wanted.values())).device.type)
    if early:
        stand_ins = [_StandIn.apply(tensor) for tensor in wanted.values()]
        sources = [_edge(tensor) for tensor in wanted.values()]
    del wanted
    tensors, emptied = dict(tensors), tensors
    emptied.clear()
    result = run(tensors)
    del tensors
    loss = result['loss']
    result = {name: tensor.detach() for name, tensor in result.items()}
    if not early:
        return result, lambda: loss - loss.detach()
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, sources, allow_unused=True)
    used = [i for i, gradient in enumerate(gradients) if gradient is not None]
    gradients, stand_ins = [gradients[i] for i in used], [stand_ins[i] for i in used]
    value = result['loss']  # not the loss, which would keep its graph until it is asked for
    return result, lambda: _KnownGradients.apply(value, gradients, *stand_ins)


def _is_possible(device_type: str) -> bool:
    if torch.compiler.is_compiling() and not can_trace_backward():
        return False
    return not (torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16)


def _edge(tensor: torch.Tensor) -> Any:
    """A tensor's place in the graph, which keeps no memory; compiled, the tensor: the compiler knows when to free."""
    return tensor if torch.compiler.is_compiling() else torch.autograd.graph.get_gradient_edge(tensor)


class _StandIn(torch.autograd.Function):
    """A tensor's shape and history, without its memory."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor):
        return tensor.new_empty(()).expand_as(tensor)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad


class _KnownGradients(torch.autograd.Function):
    """A scalar 0 whose gradients are there already.

    It is not the loss: compiled, that may be one tensor with an equal one that has no gradient.
    """

    @staticmethod
    def forward(ctx, loss: torch.Tensor, gradients: List[torch.Tensor], *sources: torch.Tensor):
        ctx.gradients = gradients
        return torch.zeros_like(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        # A pass over all gradients, and on a CPU one worth sparing, as the factor is 1 where nothing is accumulated.
        if torch.compiler.is_compiling() or grad.device.type != 'cpu' or grad.item() != 1:
            gradients = multiply_each(gradients, grad)
        return None, None, *gradients
