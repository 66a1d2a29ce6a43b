"""Which convolutions of a dynamic teacher have branches, and how these start."""

from typing import Dict, Mapping, Optional, Sequence, Tuple

import torch.nn as nn

from ..axes import TensorMap
from .branches import BranchedKernel, cosine_prior, is_branchable

__all__ = ['branch_convolutions']


def branch_convolutions(
    wide: nn.Module,
    tensor_maps: Mapping[str, TensorMap],
    is_trained: Mapping[str, bool],
    kinds: Sequence[str],
    scale: str,
) -> Tuple[nn.Module, Dict[str, BranchedKernel]]:
    """Moves every trained kernel that can have branches among its branches, and leaves its slot empty.

    Args:
        wide: the dynamic teacher's wide model; it is changed.
        tensor_maps: how its parameters widened, by name.
        is_trained: whether they require gradients, by name.
        kinds: kinds of branch, from :func:`timm_gpd.teacher.branches.branch_kinds`; with one there is nothing to do.
        scale: see :func:`timm_gpd.expand`.

    Returns:
        A module that holds the branched kernels under the names of their convolutions, and the branched kernels by the
        names of the weights that they stand for.
    """
    root, branched = nn.Module(), {}
    for name, module in wide.named_modules() if len(kinds) > 1 else ():
        weight = f'{name}.weight' if name else 'weight'
        if is_branchable(module) and is_trained.get(weight):
            branched[weight] = _branch(module, tensor_maps.get(weight), kinds, scale)
            _add_submodule(root, name, branched[weight])
            module._parameters['weight'] = None
    return root, branched


def _branch(conv: nn.Conv2d, tensor_map: Optional[TensorMap], kinds: Sequence[str], scale: str) -> BranchedKernel:
    outputs, _, size, _ = conv.weight.shape
    axes = {} if tensor_map is None else dict(tensor_map.axes)
    # Replicas share the student's channel's pattern, or its slice would hold only every r-th frequency.
    prior = axes[0].replicate(cosine_prior(axes[0].size, size), 0) if 0 in axes else cosine_prior(outputs, size)
    # Other weights than the prior are drawn for every replica, which tells replicas apart as gammas move. Their size is
    # that of a student's, divided by the divisor as inverse reparameterization does.
    divisor = 1 if tensor_map is None else tensor_map.divisor
    gain = divisor ** (0.5 if scale == 'student' else -0.5)
    return BranchedKernel(conv.weight, conv.groups, kinds, prior, gain)


def _add_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    """Adds a module under a dotted name, with empty modules on the way."""
    *path, key = name.split('.')
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    root.add_module(key, module)
