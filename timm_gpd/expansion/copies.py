"""Copies of a model whose tensors are exchanged on the way: no tensor is copied only to be thrown away."""

import copy
from collections import OrderedDict
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from ..plan import ExpansionPlan
from ..private_torch import forget_flat_weights, list_flat_weights

__all__ = [
    'INPUT_DIVISOR',
    'blank',
    'blank_copy',
    'copy_detached',
    'copy_model',
    'first_input',
    'forget_computed_tensors_',
    'parameterless_copy',
    'plain_copy',
    'wide_copy',
]

INPUT_DIVISOR = 'gpd_input_divisor'  # attribute of a layer of a wide model: what its input is divided by


def copy_model(model: nn.Module, substitute: Callable[[str, torch.Tensor], torch.Tensor]) -> nn.Module:
    """A deep copy with other tensors. Ties are kept; what modules have computed and kept in evaluation mode is not.

    Args:
        model: the model, whatever it has run on. It is not modified.
        substitute: ``substitute(name, tensor)`` is what stands for a parameter or buffer; its shape may differ.

    Returns:
        The copy, every module in its own mode.
    """
    memo: Dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = nn.Parameter(substitute(name, parameter), requires_grad=parameter.requires_grad)
    for name, buffer in model.named_buffers():
        memo[id(buffer)] = substitute(name, buffer)
    for module in model.modules():  # most have ten lists of hooks that are empty: half of the time goes into them
        memo.update((id(value), OrderedDict()) for value in vars(module).values() if _is_empty(value))
    return forget_computed_tensors_(copy_detached(model, memo))


def _is_empty(value: Any) -> bool:
    return type(value) is OrderedDict and not value


def copy_detached(value: Any, memo: Optional[Dict[int, Any]] = None) -> Any:
    """``copy.deepcopy`` that detaches tensors which were computed with gradients, wherever they are kept."""
    with _DetachedCopies():
        return copy.deepcopy(value, memo)


@torch.no_grad()
def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy, on memory of its own.

    Args:
        model: the model, whatever it has run on. It is not modified.

    Returns:
        The copy, see :func:`copy_model`.
    """
    return copy_model(model, lambda name, tensor: tensor.detach().clone())


class _DetachedCopies(TorchFunctionMode):
    """Lets ``deepcopy`` take tensors that were computed with gradients, which refuse it."""

    def __torch_function__(self, func: Callable, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def forget_computed_tensors_(model: nn.Module) -> nn.Module:
    """Lets modules drop what they have computed from their parameters and kept in evaluation mode, in place.

    They do so when they are set to train, as parameters are about to change then: LeViT's attention biases, for one.

    Args:
        model: a model of any kind.

    Returns:
        The same model, every module in its own mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode
    return model


def blank(shape: Sequence[int], dtype: torch.dtype, device: str = 'meta') -> torch.Tensor:
    """A tensor that takes no memory.

    Args:
        shape: its shape.
        dtype: its dtype.
        device: ``'meta'`` or another.

    Returns:
        On the meta device a tensor without values; elsewhere one zero that is in every place. Not to be written to.
    """
    return torch.zeros((), dtype=dtype, device=device).expand(tuple(shape))


def blank_copy(model: nn.Module, device: str = 'meta') -> nn.Module:
    """A copy that allocates nothing.

    Args:
        model: the model.
        device: where the copy is to be.

    Returns:
        The copy; every tensor is :func:`blank`.
    """
    return copy_model(model, lambda name, tensor: blank(tensor.shape, tensor.dtype, device))


@torch.no_grad()
def wide_copy(
    student: nn.Module,
    plan: ExpansionPlan,
    expand: Callable[[str, torch.Tensor], torch.Tensor],
) -> nn.Module:
    """The student's class with a plan applied: wider tensors, and the attributes that count them.

    Args:
        student: the model that was planned for.
        plan: its plan.
        expand: ``expand(name, tensor)`` is the teacher's tensor for the student's, of shape
            ``plan.tensors[name].teacher_shape``.

    Returns:
        The wide model.
    """
    wide = copy_model(student, expand)
    modules = dict(wide.named_modules())
    for name, changes in plan.attributes.items():
        for attribute, (_, value) in changes.items():
            setattr(modules[name], attribute, value)
    for name, ratio in plan.divided_inputs.items():
        setattr(modules[name], INPUT_DIVISOR, ratio)
        modules[name].register_forward_pre_hook(_InputDivision(), with_kwargs=True)
    return wide


def first_input(args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
    """The first of the arguments that a module is called with, by position or by name; None if there is none."""
    return args[0] if args else next(iter(kwargs.values()), None)


class _InputDivision:
    """A forward pre-hook that divides a layer's input. A class, so that the teacher can be pickled."""

    def __call__(
        self,
        module: nn.Module,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
    ) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        divisor = getattr(module, INPUT_DIVISOR)
        if args:
            return (args[0] / divisor, *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: kwargs[name] / divisor}


@torch.no_grad()
def parameterless_copy(model: nn.Module) -> nn.Module:
    """A copy without parameters.

    Args:
        model: the model.

    Returns:
        The copy. It has its own buffers, and an empty slot for every parameter, to be filled whenever it runs.
    """
    buffers = {name for name, _ in model.named_buffers()}
    bare = copy_model(
        model, lambda name, tensor: tensor.clone() if name in buffers else torch.empty_like(tensor, device='meta')
    )
    for module in bare.modules():
        for key in module._parameters:
            module._parameters[key] = None
        if isinstance(module, nn.RNNBase):
            module.register_forward_pre_hook(_list_weights)
            module.register_forward_hook(_forget_weights)
    return bare


def _list_weights(module: nn.RNNBase, inputs: Any) -> None:
    """A recurrent layer runs on a list of its weights, which it does not renew where they were None before."""
    list_flat_weights(module)


def _forget_weights(module: nn.RNNBase, inputs: Any, output: Any) -> None:
    """The weights of one run are computed: kept in the list, they would hold its graph and forbid deep copies."""
    forget_flat_weights(module)
