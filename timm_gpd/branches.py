"""Multi-branch convolution kernels that merge in weight space, so a convolution still runs only once.

The kinds of branch are those of OREPA (arXiv 2204.00826, Sec. 3; after DBB, arXiv 2103.13425) without its
normalisation: a dynamic teacher starts as its student's function, so its first branch has scale 1 and the others 0
(channel-branch reparameterization, Sec. 3.3 of arXiv 2410.04140). Nothing here knows about models.
"""
import math
from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn

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
        raise ValueError(f'num_branches must be a positive integer of at most {most}, but is {num_branches!r}')
    if branches is None:
        return BRANCH_KINDS[:num_branches]
    kinds = (branches,) if isinstance(branches, str) else tuple(branches)
    if kinds[:1] != BRANCH_KINDS[:1] or len(set(kinds)) < len(kinds) or not set(kinds) <= set(BRANCH_KINDS):
        raise ValueError(
            f'branches must be kxk followed by different ones of {", ".join(BRANCH_KINDS[1:])}, but is {branches!r}')
    if num_branches not in (1, len(kinds)):
        raise ValueError(f'num_branches is {num_branches} and branches names {len(kinds)}: give one of them')
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
    wave = torch.where(wave.abs() < 1e-9, 0., wave)
    rows, columns = wave[:, :, None], wave[:, None, :]
    return torch.where(over_rows[:, None, None], rows, columns).expand(-1, size, size).clone()


class BranchedKernel(nn.Module):
    """The branches beside one convolution's kernel, and the kernel that all of them merge into.

    With o an output channel, i an input channel of its group, and s a branch's scale for that output channel, the
    branches add to the merged kernel W[o, i]:

    - ``kxk``: s K[o, i], the kernel that :meth:`forward` is given
    - ``avg``: s A[o, i] times the mean over k x k
    - ``freq``: s B[o, i] times a fixed cosine pattern of channel o
    - ``1x1_kxk``: s sum_t V[o, t] (1 + D)[t, i], a 1x1 of as many outputs as inputs, then a k x k
    - ``1x1``: s C[o, i] at the centre
    - ``dw_pw``: s sum_m P[i, o, m] Q[i, m], a depthwise k x k of 8 outputs for every input, then a 1x1

    As in OREPA, D is learned beside a fixed identity, so that weight decay pulls that 1x1 towards the identity; every
    other parameter decays towards 0, scales included.

    Args:
        kernel: the convolution's kernel, shape (O, I / groups, k, k): gives shape, dtype and device, and is not kept.
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
        self.kinds = tuple(kinds)
        self.groups = groups
        self.shape = tuple(kernel.shape)
        outputs, group_inputs, size, _ = kernel.shape
        inputs = group_inputs * groups
        patterns = {'avg': torch.full_like(prior, 1 / size ** 2), 'freq': prior, '1x1': torch.zeros_like(prior)}
        patterns['1x1'][:, size // 2, size // 2] = 1
        self.patterned = tuple(kind for kind in self.kinds if kind in _PATTERNED)

        self.scale = nn.Parameter(kernel.new_zeros(len(self.kinds), outputs))
        self.reset_scale()
        if self.patterned:
            self.register_buffer('patterns', torch.stack(
                [patterns[kind].flatten(1) for kind in self.patterned], dim=1).to(kernel))  # (O, patterns, k * k)
            self.pointwise = _kaiming(kernel, (outputs, group_inputs, len(self.patterned)), group_inputs, gain)
        if '1x1_kxk' in self.kinds:
            self.mix = nn.Parameter(kernel.new_zeros(groups, group_inputs, group_inputs))
            self.register_buffer('identity', torch.eye(group_inputs).to(kernel), persistent=False)
            self.mixed_kernel = _kaiming(kernel, self.shape, group_inputs * size ** 2, gain)
            # Inputs last in memory: their product with the 1x1 is then one matrix product without any transposition.
            self.mixed_kernel.data = self.mixed_kernel.data.contiguous(memory_format=torch.channels_last)
        if 'dw_pw' in self.kinds:
            self.dw = _kaiming(kernel, (inputs, _DW_MULTIPLIER, size ** 2), size ** 2)
            self.pw = _kaiming(
                kernel, (inputs, outputs // groups, _DW_MULTIPLIER), group_inputs * _DW_MULTIPLIER, gain)

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Gives the kernel itself scale 1 and every other branch 0: what is merged is the kernel."""
        self.scale.zero_()
        self.scale[0] = 1

    def forward(self, kernel: torch.Tensor) -> torch.Tensor:
        """Merges all branches with the kernel. Differentiable.

        Args:
            kernel: shape (O, I / groups, k, k).

        Returns:
            The merged kernel, of the same shape.
        """
        kernels = {'kxk': kernel.flatten(2)}
        if '1x1_kxk' in self.kinds:
            kernels['1x1_kxk'] = self._mix_inputs()
        if 'dw_pw' in self.kinds:
            kernels['dw_pw'] = self._depthwise_then_pointwise()
        merged = _ScaledSum.apply(self._scales(kernels), *kernels.values())
        if self.patterned:
            patterns = self._scales(self.patterned).t()[..., None] * self.patterns
            merged.baddbmm_(self.pointwise, patterns)
        return merged.view(self.shape)

    def _scales(self, kinds: Sequence[str]) -> torch.Tensor:
        """Scales of some of the branches, shape (len(kinds), O)."""
        return torch.stack([self.scale[self.kinds.index(kind)] for kind in kinds])

    def _mix_inputs(self) -> torch.Tensor:
        """Kernels whose inputs are mixed by the 1x1, shape (O, I / groups, k * k); inputs last in memory."""
        outputs, group_inputs, *_ = self.shape
        kernels = self.mixed_kernel.permute(0, 2, 3, 1).reshape(self.groups, -1, group_inputs)
        return torch.bmm(kernels, self.identity + self.mix).view(outputs, -1, group_inputs).transpose(1, 2)

    def _depthwise_then_pointwise(self) -> torch.Tensor:
        """Shape (O, I / groups, k * k)."""
        outputs, group_inputs, *_ = self.shape
        product = torch.bmm(self.pw, self.dw).view(self.groups, group_inputs, outputs // self.groups, -1)
        return product.transpose(1, 2).contiguous().view(outputs, group_inputs, -1)

    def extra_repr(self) -> str:
        return f'{self.shape}, groups={self.groups}, kinds={self.kinds}'


class _ScaledSum(torch.autograd.Function):
    """sum_j scales[j, o] kernels[j][o, i, p], where a kernel may lie in memory in an order of its own.

    What has to change its order is read through once, and gradients are made in the order of their kernels, so that
    the matrix products before and behind need no copies.
    """

    @staticmethod
    def forward(ctx, scales: torch.Tensor, *kernels: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scales, *kernels)
        first, *others = zip(kernels, scales[..., None, None])
        merged = torch.mul(*first)
        for kernel, scale in others:
            in_order = kernel.stride() == merged.stride()
            merged.addcmul_(kernel if in_order else torch.empty_like(merged).copy_(kernel), scale)
        return merged

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        scales, *kernels = ctx.saved_tensors
        scale_grads, kernel_grads = [], []
        for kernel, scale in zip(kernels, scales[..., None, None]):
            in_order = grad.stride() == kernel.stride()
            ordered = grad if in_order else torch.empty_like(kernel).copy_(grad)
            scale_grads.append((ordered * kernel).sum((1, 2)))
            kernel_grads.append(ordered * scale if in_order else ordered.mul_(scale))
        return torch.stack(scale_grads), *kernel_grads


def _kaiming(like: torch.Tensor, shape: Sequence[int], fan_in: int, gain: float = 1.0) -> nn.Parameter:
    """Kaiming's uniform initialisation for ReLU, which OREPA starts every branch from, times ``gain``."""
    return nn.Parameter(like.new_empty(shape).uniform_(-1, 1) * (gain * math.sqrt(6 / fan_in)))
