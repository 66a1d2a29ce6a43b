"""Multi-branch convolution kernels that merge in weight space, so a convolution still runs only once.

The kinds of branch are those of OREPA (arXiv 2204.00826, Sec. 3; after DBB, arXiv 2103.13425) without its
normalisation: a dynamic teacher starts as its student's function, so its first branch has gamma 1 and the others 0
(channel-branch reparameterization, Sec. 3.3 of arXiv 2410.04140). Nothing here knows about models.
"""

import math
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..axes import TensorMap
from ..errors import InputError
from .merge import inputs_last, merge_branches, mix_inputs

__all__ = ['BRANCH_KINDS', 'BranchedKernel', 'branch_kinds', 'cosine_prior', 'is_branchable']

BRANCH_KINDS = ('kxk', 'avg', 'freq', '1x1_kxk', '1x1', 'dw_pw')
_PATTERNED = ('avg', 'freq', '1x1')  # a 1x1 weight times one fixed spatial pattern per output channel
_DW_MULTIPLIER = 8


def branch_kinds(num_branches: int, branches: Optional[Sequence[str]] = None) -> Tuple[str, ...]:
    """The kinds of branch that a pair of arguments asks for.

    Args:
        num_branches: takes the first so many of ``BRANCH_KINDS``.
        branches: names them instead; starts with ``'kxk'``, the kernel that is there already.

    Raises:
        ValueError: if a number or name is out of range, or the two disagree.
    """
    most = len(BRANCH_KINDS)
    if not isinstance(num_branches, int) or isinstance(num_branches, bool) or not 1 <= num_branches <= most:
        raise InputError(f'num_branches must be a positive integer of at most {most}, but is {num_branches!r}')
    if branches is None:
        return BRANCH_KINDS[:num_branches]
    kinds = tuple(branches) if isinstance(branches, (list, tuple)) else (branches,)
    if kinds[:1] != BRANCH_KINDS[:1] or len(set(kinds)) < len(kinds) or not set(kinds) <= set(BRANCH_KINDS):
        raise InputError(
            f'branches must be kxk followed by different ones of {", ".join(BRANCH_KINDS[1:])}, but is {branches!r}'
        )
    if num_branches not in (1, len(kinds)):
        raise InputError(f'num_branches is {num_branches} and branches names {len(kinds)}: give one of them')
    return kinds


def is_branchable(module: nn.Module) -> bool:
    """Whether a module is a 2d convolution whose kernel is square, odd and larger than 1."""
    if not isinstance(module, nn.Conv2d):
        return False
    height, width = module.kernel_size
    return height == width > 1 and height % 2 == 1


def cosine_prior(channels: int, size: int) -> torch.Tensor:
    """OREPA's fixed frequency patterns: half of the channels vary over rows, the others over columns.

    Args:
        channels: number of output channels C.
        size: kernel size k.

    Returns:
        Shape (C, k, k), float64.
    """
    index = torch.arange(channels, dtype=torch.float64)
    over_rows = index < channels / 2
    frequency = 1 + torch.where(over_rows, index, index - channels / 2)
    position = torch.arange(size, dtype=torch.float64) + 0.5
    wave = torch.cos(math.pi / size * frequency[:, None] * position)
    # Zeros of the cosine come out as 1e-16: as patterns of nothing, whose gradients are denormal numbers.
    wave = torch.where(wave.abs() < 1e-9, 0.0, wave)
    rows, columns = wave[:, :, None], wave[:, None, :]
    return torch.where(over_rows[:, None, None], rows, columns).expand(-1, size, size).clone()


class BranchedKernel(nn.Module):
    """One convolution's branches, the first of them a plain kernel, and the kernel that all of them merge into.

    With o an output channel, i an input channel of its group, and g a branch's gamma for that output channel, the
    branches add to the merged kernel W[o, i]:

    - ``kxk``: g K[o, i], the kernel that it starts from
    - ``avg``: g A[o, i] times the mean over k x k
    - ``freq``: g B[o, i] times a fixed cosine pattern of channel o
    - ``1x1_kxk``: g sum_t V[o, t] (1 + D)[i, t], a 1x1 of as many outputs t as inputs, then a k x k
    - ``1x1``: g C[o, i] at the centre
    - ``dw_pw``: g sum_m P[o, m, i] Q[m, i], a depthwise k x k of 8 outputs for every input, then a 1x1

    As in OREPA, D is learned beside a fixed identity, so that weight decay pulls that 1x1 towards the identity; every
    other parameter decays towards 0, gammas included. Gammas were named ``scale`` before; such states load.

    Args:
        kernel: the convolution's kernel, shape (O, I / groups, k, k).
        groups: the convolution's groups.
        kinds: see :func:`branch_kinds`.
        prior: patterns of ``freq``, shape (O, k, k).
        gain: the weights that make the branches' outputs are initialised as OREPA's, times this.
    """

    def __init__(
        self,
        kernel: torch.Tensor,
        groups: int,
        kinds: Sequence[str],
        prior: torch.Tensor,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_rename_gammas)
        self.kinds = tuple(kinds)
        self.groups = groups
        self.shape = tuple(kernel.shape)
        outputs, group_inputs, size, _ = kernel.shape
        patterns = {'avg': torch.full_like(prior, 1 / size**2), 'freq': prior, '1x1': torch.zeros_like(prior)}
        patterns['1x1'][:, size // 2, size // 2] = 1
        self.patterned = tuple(kind for kind in self.kinds if kind in _PATTERNED)

        # Inputs are last in memory: long enough to compute with, as k * k is not. No tensor has four dimensions, or
        # Module.to would reorder it for channels_last.
        self.kernel = nn.Parameter(kernel.new_empty(outputs, size**2, group_inputs))
        self.gamma = nn.Parameter(kernel.new_empty(len(self.kinds), outputs))
        self.restart(kernel)
        if self.patterned:
            self.register_buffer(
                'patterns', torch.stack([patterns[kind].flatten(1) for kind in self.patterned], dim=2).to(kernel)
            )  # (O, k * k, patterns)
            self.pointwise = _kaiming(kernel, (outputs, len(self.patterned), group_inputs), group_inputs, gain)
        if '1x1_kxk' in self.kinds:
            self.mix = nn.Parameter(kernel.new_zeros(groups, group_inputs, group_inputs))
            self.register_buffer('identity', torch.eye(group_inputs).to(kernel), persistent=False)
            self.mixed_kernel = _kaiming(kernel, (outputs, size**2, group_inputs), group_inputs * size**2, gain)
        if 'dw_pw' in self.kinds:
            self.dw = _kaiming(kernel, (groups * _DW_MULTIPLIER, size**2, group_inputs), size**2)
            self.pw = _kaiming(kernel, (outputs, _DW_MULTIPLIER, group_inputs), group_inputs * _DW_MULTIPLIER, gain)

    @torch.no_grad()
    def restart(self, kernel: torch.Tensor) -> None:
        """Takes a kernel of shape (O, I / groups, k, k) at gamma 1, and other branches at 0, so that it is the sum."""
        self.kernel.copy_(inputs_last(kernel))
        self.gamma.zero_()
        self.gamma[0] = 1

    def forward(
        self,
        multiplier: float = 1.0,
        tensor_map: Optional[TensorMap] = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Merges all branches, once for both models. Differentiable.

        Args:
            multiplier: what the sum of the branches is multiplied by to be the teacher's kernel.
            tensor_map: how the student's kernel widens to the teacher's. Without one both are the same.
            memory_format: of what is returned: the images' that it convolves.

        Returns:
            The teacher's kernel, shape (O, I / groups, k, k), and the student's: first replicas of it, times the map's
            divisor.
        """
        gamma = dict(zip(self.kinds, self.gamma * multiplier))
        mixed = pattern_gamma = patterns = pointwise = pw = dw = None
        if '1x1_kxk' in self.kinds:
            mixed = mix_inputs(self.mixed_kernel, self.identity + self.mix)
        if self.patterned:
            pattern_gamma = torch.stack([gamma[kind] for kind in self.patterned], dim=1)
            patterns, pointwise = self.patterns, self.pointwise
        if 'dw_pw' in self.kinds:
            pw, dw = self.pw, self.dw.unflatten(0, (self.groups, _DW_MULTIPLIER))
        return merge_branches(
            self.shape,
            memory_format,
            tensor_map,
            self.kernel,
            gamma['kxk'],
            mixed,
            gamma.get('1x1_kxk'),
            patterns,
            pattern_gamma,
            pointwise,
            pw,
            gamma.get('dw_pw'),
            dw,
        )

    def extra_repr(self) -> str:
        return f'{self.shape}, groups={self.groups}, kinds={self.kinds}'


def _rename_gammas(module: nn.Module, state_dict: Dict[str, Any], prefix: str, *others: Any) -> None:
    """Before a state is loaded: gammas by the name that they had."""
    if f'{prefix}scale' in state_dict:
        state_dict[f'{prefix}gamma'] = state_dict.pop(f'{prefix}scale')


def _kaiming(like: torch.Tensor, shape: Sequence[int], fan_in: int, gain: float = 1.0) -> nn.Parameter:
    """Kaiming's uniform initialisation for ReLU, which OREPA starts every branch from, times ``gain``."""
    return nn.Parameter(like.new_empty(shape).uniform_(-1, 1) * (gain * math.sqrt(6 / fan_in)))
