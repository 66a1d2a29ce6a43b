"""Running a module on parameters that it does not own."""

import copy
from collections import deque
from functools import partial
from types import MethodType
from typing import Any, Dict, Mapping, Optional

import torch
import torch.nn as nn
from torch.func import functional_call

from ..private_torch import COMPILED_CALL, HOOK_TABLES, MODULE_ATTRIBUTES, list_flat_weights

__all__ = ['call_with_parameters', 'memory_format_of']


def call_with_parameters(
    model: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    attributes: Optional[Mapping[str, Mapping[str, Any]]] = None,
) -> Any:
    """The model's output for ``x`` with other tensors in the place of its parameters.

    What runs is a twin: a copy of the module tree that shares everything with the model but its parameters. So the
    model never holds a computed tensor, even if a run fails, keeps one in an attribute or happens beside another; and
    where gradient checkpointing runs parts of the model again in the backward pass, they see these tensors again. What
    a module writes to its attributes while it runs is gone afterwards; what it writes into its buffers stays.

    Args:
        model: any module; its own parameters stay as they are.
        parameters: tensors by name, tied ones under every name; buffers among them are written to in their stead.
        x: images, shape (B, in_chans, H, W).
        attributes: module name -> attribute -> what it is meanwhile.

    Returns:
        What the model returns for ``x``.

    Raises:
        RuntimeError: if it is compiled and ``attributes`` are given.
    """
    if torch.compiler.is_compiling():  # a compiler traces this, and no twins
        if attributes:
            raise RuntimeError('a ratio between student and dynamic teacher runs uncompiled: leave out torch.compile')
        return functional_call(model, parameters, (x,), tie_weights=False)
    return _Twins(model, parameters, attributes or {}).root(x)


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """What convolutions of images (B, in_chans, H, W) take kernels in without reordering them."""
    is_channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


_ATOMS = frozenset((bool, int, float, str, type(None), torch.Size))  # most attributes: what cannot hold a module


class _Twins:
    """Twins of all modules of a model, on given parameters and buffers, and with given attributes."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, torch.Tensor],
        attributes: Mapping[str, Mapping[str, Any]],
    ) -> None:
        named = list(model.named_modules(remove_duplicate=False))
        self.modules = {id(module): module for _, module in named}
        self.twins: Dict[int, nn.Module] = {}
        self.root = self.twin_of(model)
        owners = {name: self.twins[id(module)] for name, module in named}
        for name, tensor in parameters.items():
            path, _, key = name.rpartition('.')
            if key in owners[path]._buffers:
                owners[path]._buffers = {**owners[path]._buffers, key: tensor}
            else:
                owners[path]._parameters[key] = tensor
        for path, changes in attributes.items():
            for key, value in changes.items():
                setattr(owners[path], key, value)
        for twin in self.twins.values():
            if isinstance(twin, nn.RNNBase):
                list_flat_weights(twin)

    def twin_of(self, module: nn.Module) -> nn.Module:
        if id(module) in self.twins:
            return self.twins[id(module)]
        twin = self.twins[id(module)] = object.__new__(type(module))
        state = dict(module.__dict__)
        state['_parameters'] = dict(module._parameters)
        state['_modules'] = {
            key: child if child is None else self.twin_of(child) for key, child in module._modules.items()
        }
        state.pop(COMPILED_CALL, None)  # of the module alone
        for key in state.keys() - MODULE_ATTRIBUTES:
            if type(state[key]) not in _ATOMS:
                state[key] = self.twin_value(state[key])
        for key in HOOK_TABLES:  # they may be methods of modules, too; most modules have none
            if state.get(key):
                state[key] = self.twin_value(state[key])
        object.__setattr__(twin, '__dict__', state)  # a module's own is for parameters and modules
        return twin

    def twin_value(self, value: Any) -> Any:
        """What stands for an attribute: containers are copied, and modules of the model in them are twins."""
        if isinstance(value, nn.Module):
            return self.twin_of(value) if id(value) in self.modules else value
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.twin_value(value.__self__))
        if type(value) is partial:
            return partial(self.twin_value(value.func), *self.twin_value(value.args), **self.twin_value(value.keywords))
        if isinstance(value, dict):
            copied = copy.copy(value)
            copied.update({key: self.twin_value(item) for key, item in value.items()})
            return copied
        if isinstance(value, list):
            return [self.twin_value(item) for item in value]
        if type(value) is tuple:
            return tuple(self.twin_value(item) for item in value)
        if isinstance(value, tuple) and hasattr(value, '_fields'):  # a named one
            return type(value)(*map(self.twin_value, value))
        if isinstance(value, deque):
            return deque(map(self.twin_value, value), value.maxlen)
        return copy.copy(value) if isinstance(value, set) else value
