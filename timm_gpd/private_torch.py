"""Names of torch that are not part of its public API, all in one place. Checked with torch 2.14.1.

Each is here because the public API has no way to the same thing; ``tests/test_private_names.py`` fails with its name
when a version of torch changes it.
"""

from typing import List, Sequence, Union

import torch
import torch._dynamo.config
import torch._inductor.config
import torch.nn as nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    'BatchNorm',
    'COMPILED_CALL',
    'HOOK_TABLES',
    'InstanceNorm',
    'MODULE_ATTRIBUTES',
    'OpOverload',
    'TO_COPY',
    'TorchDispatchMode',
    'add_each_',
    'can_trace_backward',
    'compiles_writing_operators',
    'forget_flat_weights',
    'has_active_transforms',
    'has_forward_mode',
    'is_replica',
    'is_view',
    'keeps_compiled_layouts',
    'list_flat_weights',
    'multiply_each',
    'pre_hooks_of',
    'set_keep_compiled_layouts',
    'trace_backward',
    'tree_leaves',
    'tree_map_only',
    'uncompiled',
]

# What all batch norms, and all instance norms, are instances of, whatever their number of dimensions.
BatchNorm = nn.modules.batchnorm._BatchNorm
InstanceNorm = nn.modules.instancenorm._InstanceNorm

# Where a module keeps what ``module.compile()`` has made of its call.
COMPILED_CALL = '_compiled_call_impl'

# Attributes that every module has: parameters, buffers, submodules, the mode, and tables of hooks.
MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)
HOOK_TABLES = tuple(sorted(name for name in MODULE_ATTRIBUTES if name.endswith('_hooks')))

TO_COPY = torch.ops.aten._to_copy  # what a change of dtype or device is


def multiply_each(tensors: Sequence[torch.Tensor], by: Union[Sequence[float], torch.Tensor]) -> List[torch.Tensor]:
    """Products of tensors with numbers, or with one tensor, in few calls."""
    return torch._foreach_mul(list(tensors), by)


def add_each_(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> None:
    """Adds tensors to others of the same shapes, in place and in few calls."""
    torch._foreach_add_(list(tensors), list(others))


def can_trace_backward() -> bool:
    """Whether ``torch.compile`` traces a backward pass within a forward pass."""
    return getattr(torch._dynamo.config, 'trace_autograd_ops', False)


def trace_backward() -> None:
    """Lets ``torch.compile`` trace a backward pass within a forward pass, where this torch can."""
    if hasattr(torch._dynamo.config, 'trace_autograd_ops'):
        torch._dynamo.config.trace_autograd_ops = True


def compiles_writing_operators() -> bool:
    """Whether Inductor compiles custom operators that write into lists of tensors.

    That of torch 2.8 and 2.10 loses some and ends with a KeyError. The setting came later, in torch 2.14.
    """
    return hasattr(torch._dynamo.config, 'trace_autograd_ops')


def keeps_compiled_layouts() -> bool:
    """Whether Inductor leaves the layout of convolutions as it is."""
    return not torch._inductor.config.layout_optimization


def set_keep_compiled_layouts(keep: bool) -> None:
    """Lets Inductor leave the layout of convolutions as it is, or choose it."""
    torch._inductor.config.layout_optimization = not keep


def has_active_transforms() -> bool:
    """Whether this runs inside a transform of ``torch.func``, such as ``vmap`` or ``jvp``."""
    return torch._C._are_functorch_transforms_active()


def has_forward_mode() -> bool:
    """Whether this runs inside ``torch.autograd.forward_ad.dual_level``."""
    return torch.autograd.forward_ad._current_level >= 0


def list_flat_weights(module: nn.RNNBase) -> None:
    """Renews the list of weights that a recurrent layer runs on."""
    module._init_flat_weights()


def forget_flat_weights(module: nn.RNNBase) -> None:
    """Empties the list of weights that a recurrent layer runs on."""
    module._flat_weights = [None] * len(module._flat_weights)


def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd takes a tensor for a view of another one."""
    return tensor._is_view()


def is_replica(module: nn.Module) -> bool:
    """Whether a module is one of those that ``nn.DataParallel`` makes for a forward pass on several devices."""
    return getattr(module, '_is_replica', False)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile(module)`` returns; any other module itself."""
    original = getattr(module, '_orig_mod', None)
    return original if isinstance(original, nn.Module) else module


def pre_hooks_of(module: nn.Module) -> List[object]:
    """What a module calls before its forward pass."""
    return list(module._forward_pre_hooks.values())
