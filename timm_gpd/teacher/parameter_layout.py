"""Which names of a model stand for one parameter, and which parameters are trained."""

from typing import Dict, List, Mapping, NamedTuple

import torch
import torch.nn as nn

__all__ = ['ParameterLayout']


class ParameterLayout(NamedTuple):
    """A model's parameters by name, without their values.

    Attributes:
        names: the names of all slots of every parameter, by its first name. Tied parameters have several; a module
            under several names has its slots once.
        is_trained: whether it requires a gradient, by its first name.
    """

    names: Dict[str, List[str]]
    is_trained: Dict[str, bool]

    @classmethod
    def of(cls, model: nn.Module) -> 'ParameterLayout':
        """Reads a model's layout."""
        first: Dict[int, str] = {}
        names: Dict[str, List[str]] = {}
        is_trained: Dict[str, bool] = {}
        for owner, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                name = f'{owner}.{key}' if owner else key
                names.setdefault(first.setdefault(id(parameter), name), []).append(name)
                is_trained.setdefault(first[id(parameter)], parameter.requires_grad)
        return cls(names, is_trained)

    def under_all_names(self, tensors: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Tensors by every name that they have, from tensors by their first names."""
        return {alias: tensors[name] for name, aliases in self.names.items() for alias in aliases}

    def fill_slots(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """Puts copies of tensors, by their first names, into a model as its parameters. Returns the model."""
        owners = dict(model.named_modules())
        for name, aliases in self.names.items():
            if name not in tensors:
                continue
            parameter = nn.Parameter(
                tensors[name].detach().clone(memory_format=torch.contiguous_format), self.is_trained[name]
            )
            for alias in aliases:
                owner, _, key = alias.rpartition('.')
                owners[owner]._parameters[key] = parameter
        return model
