"""Multi-branch convolution kernels that merge in weight space, so a convolution still runs only once.

The kinds of branch are those of OREPA (arXiv 2204.00826, Sec. 3; after DBB, arXiv 2103.13425) without its
normalisation: a dynamic teacher starts as its student's function, so its first branch has scale 1 and the others 0
(channel-branch reparameterization, Sec. 3.3 of arXiv 2410.04140). Nothing here knows about models.
"""
import math
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..axes import TensorMap
from .shared_tensors import add_to_first_replicas

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
    """One convolution's branches, the first of them a plain kernel, and the kernel that all of them merge into.

    With o an output channel, i an input channel of its group, and s a branch's scale for that output channel, the
    branches add to the merged kernel W[o, i]:

    - ``kxk``: s K[o, i], the kernel that it starts from
    - ``avg``: s A[o, i] times the mean over k x k
    - ``freq``: s B[o, i] times a fixed cosine pattern of channel o
    - ``1x1_kxk``: s sum_t V[o, t] (1 + D)[i, t], a 1x1 of as many outputs t as inputs, then a k x k
    - ``1x1``: s C[o, i] at the centre
    - ``dw_pw``: s sum_m P[o, m, i] Q[m, i], a depthwise k x k of 8 outputs for every input, then a 1x1

    As in OREPA, D is learned beside a fixed identity, so that weight decay pulls that 1x1 towards the identity; every
    other parameter decays towards 0, scales included.

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
        self.kinds = tuple(kinds)
        self.groups = groups
        self.shape = tuple(kernel.shape)
        outputs, group_inputs, size, _ = kernel.shape
        patterns = {'avg': torch.full_like(prior, 1 / size ** 2), 'freq': prior, '1x1': torch.zeros_like(prior)}
        patterns['1x1'][:, size // 2, size // 2] = 1
        self.patterned = tuple(kind for kind in self.kinds if kind in _PATTERNED)

        # Inputs are last in memory: long enough to compute with, as k * k is not. No tensor has four dimensions, or
        # Module.to would reorder it for channels_last.
        self.kernel = nn.Parameter(kernel.new_empty(outputs, size ** 2, group_inputs))
        self.scale = nn.Parameter(kernel.new_empty(len(self.kinds), outputs))
        self.restart(kernel)
        if self.patterned:
            self.register_buffer('patterns', torch.stack(
                [patterns[kind].flatten(1) for kind in self.patterned], dim=2).to(kernel))  # (O, k * k, patterns)
            self.pointwise = _kaiming(kernel, (outputs, len(self.patterned), group_inputs), group_inputs, gain)
        if '1x1_kxk' in self.kinds:
            self.mix = nn.Parameter(kernel.new_zeros(groups, group_inputs, group_inputs))
            self.register_buffer('identity', torch.eye(group_inputs).to(kernel), persistent=False)
            self.mixed_kernel = _kaiming(kernel, (outputs, size ** 2, group_inputs), group_inputs * size ** 2, gain)
        if 'dw_pw' in self.kinds:
            self.dw = _kaiming(kernel, (groups * _DW_MULTIPLIER, size ** 2, group_inputs), size ** 2)
            self.pw = _kaiming(kernel, (outputs, _DW_MULTIPLIER, group_inputs), group_inputs * _DW_MULTIPLIER, gain)

    @torch.no_grad()
    def restart(self, kernel: torch.Tensor) -> None:
        """Takes a kernel of shape (O, I / groups, k, k) at scale 1, and other branches at 0, so that it is the sum."""
        self.kernel.copy_(_inputs_last(kernel))
        self.scale.zero_()
        self.scale[0] = 1

    def forward(
            self,
            factor: float = 1.0,
            tensor_map: Optional[TensorMap] = None,
            memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Merges all branches, once for both models. Differentiable once.

        Args:
            factor: what the merged kernel is multiplied by, to be the teacher's.
            tensor_map: how the student's kernel widens to the teacher's. Without one both are the same.
            memory_format: of what is returned: the images' that it convolves.

        Returns:
            The teacher's kernel, shape (O, I / groups, k, k), and the student's: first replicas of it, times the map's
            factor.
        """
        scale = dict(zip(self.kinds, self.scale * factor))
        mixed = pattern_scale = patterns = pointwise = pw = dw = None
        if '1x1_kxk' in self.kinds:
            mixed = _mix(self.mixed_kernel, self.identity + self.mix)
        if self.patterned:
            pattern_scale = torch.stack([scale[kind] for kind in self.patterned], dim=1)
            patterns, pointwise = self.patterns, self.pointwise
        if 'dw_pw' in self.kinds:
            pw, dw = self.pw, self.dw.unflatten(0, (self.groups, _DW_MULTIPLIER))
        merged = _Merge.apply(
            self.shape, memory_format, tensor_map, self.kernel, scale['kxk'], mixed, scale.get('1x1_kxk'),
            patterns, pattern_scale, pointwise, pw, scale.get('dw_pw'), dw)
        return (merged, merged) if tensor_map is None else merged

    def extra_repr(self) -> str:
        return f'{self.shape}, groups={self.groups}, kinds={self.kinds}'


def _mix(kernel_OKI: torch.Tensor, mix_GII: torch.Tensor) -> torch.Tensor:
    """Kernels behind a 1x1 convolution: sum over t of kernel[o, k, t] mix[g, i, t], for every output o of group g.

    It is a 1x1 convolution itself, of kernels as images: on some processors 20 % faster than as a matrix product.
    """
    outputs, places, inputs = kernel_OKI.shape
    groups = len(mix_GII)
    rows = math.gcd(outputs // groups, 64)  # of an image: convolutions of few places are slower
    # Channels last: for one group a view.
    images = kernel_OKI.view(groups, -1, rows, places, inputs).permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)
    mixed = F.conv2d(images, mix_GII.flatten(0, 1)[..., None, None], groups=groups)
    return mixed.unflatten(1, (groups, inputs)).permute(1, 0, 3, 4, 2).reshape(kernel_OKI.shape)


class _Merge(torch.autograd.Function):
    """Sum of the branches, and its gradients, in blocks of outputs that stay in a processor's cache.

    Dimensions: O outputs, G groups, I inputs of a group, K = k * k places, P patterns, M the depthwise multiplier. A
    branch that is not there is None. Small sums, over P and M, are made term by term: in blocks that is nearly as fast
    as matrix products, and ``torch.compile`` fuses it with all else that reads a block.
    """

    @staticmethod
    def forward(
            ctx,
            shape: Tuple[int, ...],
            memory_format: torch.memory_format,
            tensor_map: Optional[TensorMap],
            kernel_OKI: torch.Tensor,
            scale_O: torch.Tensor,
            mixed_OKI: Optional[torch.Tensor],
            mixed_scale_O: Optional[torch.Tensor],
            patterns_OKP: Optional[torch.Tensor],
            pattern_scale_OP: Optional[torch.Tensor],
            pointwise_OPI: Optional[torch.Tensor],
            pw_OMI: Optional[torch.Tensor],
            pw_scale_O: Optional[torch.Tensor],
            dw_GMKI: Optional[torch.Tensor],
    ):
        ctx.shape, ctx.tensor_map = shape, tensor_map
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            kernel_OKI, scale_O, mixed_OKI, mixed_scale_O, patterns_OKP, pattern_scale_OP, pointwise_OPI,
            pw_OMI, pw_scale_O, dw_GMKI)
        blocks = _row_blocks(kernel_OKI, dw_GMKI)
        merged = None
        if len(blocks) > 1:
            merged = torch.empty(shape, dtype=kernel_OKI.dtype, device=kernel_OKI.device, memory_format=memory_format)
        for rows in blocks:
            sum_OKI = kernel_OKI[rows] * scale_O[rows, None, None]
            if mixed_OKI is not None:
                sum_OKI.addcmul_(mixed_OKI[rows], mixed_scale_O[rows, None, None])
            if patterns_OKP is not None:
                scaled_OKP = patterns_OKP[rows] * pattern_scale_OP[rows, None]
                for pattern_OK, pointwise_OI in zip(scaled_OKP.unbind(2), pointwise_OPI[rows].unbind(1)):
                    sum_OKI.addcmul_(pattern_OK[..., None], pointwise_OI[:, None])
            if pw_OMI is not None:
                sum_GOKI = _split_groups(sum_OKI, dw_GMKI)
                pw_GOMI = _split_groups(pw_OMI[rows] * pw_scale_O[rows, None, None], dw_GMKI)
                for pw_GOI, dw_GKI in zip(pw_GOMI.unbind(2), dw_GMKI.unbind(1)):
                    sum_GOKI.addcmul_(pw_GOI[:, :, None], dw_GKI[:, None])
            block = sum_OKI.transpose(1, 2).unflatten(2, shape[2:])
            if merged is None:
                merged = _reorder(block, memory_format == torch.channels_last)
            else:
                merged[rows] = block
        if tensor_map is None:
            return merged
        return merged, tensor_map.first_replica(merged) * tensor_map.divisor

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Optional[torch.Tensor], student_grad: Optional[torch.Tensor] = None):
        (kernel_OKI, scale_O, mixed_OKI, mixed_scale_O, patterns_OKP, pattern_scale_OP, pointwise_OPI,
         pw_OMI, pw_scale_O, dw_GMKI) = ctx.saved_tensors
        grads = [
            None if tensor is None or tensor is patterns_OKP else torch.empty_like(tensor)
            for tensor in ctx.saved_tensors[:-1]]
        (kernel_grad, scale_grad, mixed_grad, mixed_scale_grad, _, pattern_scale_grad, pointwise_grad,
         pw_grad, pw_scale_grad) = grads
        if grad is None:
            grad = kernel_OKI.new_zeros(()).expand(ctx.shape)
        grad_OKI = _sum_gradients(grad, student_grad, ctx.tensor_map)
        dw_grad = None
        if dw_GMKI is not None:
            dw_grad = _dw_gradient(*(_split_groups(tensor, dw_GMKI) for tensor in (grad_OKI, pw_OMI, pw_scale_O)))
        for rows in _row_blocks(kernel_OKI, dw_GMKI):
            block_OKI = grad_OKI[rows]
            scale_grad[rows] = _dot_rows(block_OKI, kernel_OKI[rows])
            torch.mul(block_OKI, scale_O[rows, None, None], out=kernel_grad[rows])
            if mixed_OKI is not None:
                mixed_scale_grad[rows] = _dot_rows(block_OKI, mixed_OKI[rows])
                torch.mul(block_OKI, mixed_scale_O[rows, None, None], out=mixed_grad[rows])
            if patterns_OKP is not None:
                product_OPI = torch.bmm(patterns_OKP[rows].transpose(1, 2), block_OKI)
                pattern_scale_grad[rows] = _dot_rows(
                    product_OPI.flatten(0, 1), pointwise_OPI[rows].flatten(0, 1)).view(product_OPI.shape[:2])
                torch.mul(product_OPI, pattern_scale_OP[rows, :, None], out=pointwise_grad[rows])
            if pw_OMI is not None:
                grad_GOKI = _split_groups(block_OKI, dw_GMKI)
                pw_grad_GOMI = _split_groups(pw_grad[rows], dw_GMKI).zero_()
                for grad_GOI, dw_GMI in zip(grad_GOKI.unbind(2), dw_GMKI.unbind(2)):
                    pw_grad_GOMI.addcmul_(grad_GOI[:, :, None], dw_GMI[:, None])
                pw_scale_grad[rows] = _dot_rows(pw_grad[rows], pw_OMI[rows])
                pw_grad[rows] *= pw_scale_O[rows, None, None]
        return None, None, None, *grads, dw_grad


def _sum_gradients(
        grad: torch.Tensor,
        student_grad: Optional[torch.Tensor],
        tensor_map: Optional[TensorMap],
) -> torch.Tensor:
    """Gradient of the merged kernel, as the teacher's and as the student's: a new tensor, shape (O, K, I)."""
    total = _reorder(grad, channels_last=True)
    if student_grad is not None:
        add_to_first_replicas([total], [student_grad * tensor_map.divisor], [tensor_map])
    return _inputs_last(total)


def _inputs_last(kernel: torch.Tensor) -> torch.Tensor:
    """(O, I, k, k) -> (O, K, I), a view."""
    return kernel.flatten(2).transpose(1, 2)


@torch.library.custom_op('timm_gpd::reorder', mutates_args=())
def _reorder(kernel: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """A copy in another order. An operator of its own: what is fused with such a copy is not vectorised."""
    return kernel.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@_reorder.register_fake
def _(kernel: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return torch.empty_like(kernel, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


_BLOCK = 2 ** 20  # entries; a few tensors of that size fit a CPU's caches


def _row_blocks(kernel_OKI: torch.Tensor, dw_GMKI: Optional[torch.Tensor]) -> List[slice]:
    """Slices of the outputs. One on a GPU and compiled, where it gains nothing, and for ``dw_pw`` of several groups."""
    rows = outputs = len(kernel_OKI)
    one_group = dw_GMKI is None or len(dw_GMKI) == 1
    if one_group and kernel_OKI.device.type == 'cpu' and not torch.compiler.is_compiling():
        rows = 2 ** int(math.log2(max(1, _BLOCK * outputs // kernel_OKI.numel())))
    return [slice(start, start + rows) for start in range(0, outputs, rows)]


def _split_groups(tensor: torch.Tensor, dw_GMKI: torch.Tensor) -> torch.Tensor:
    """(G * O, ...) -> (G, O, ...)"""
    return tensor.unflatten(0, (len(dw_GMKI), -1))


def _dot_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Scalar products of corresponding rows, shape (rows,)."""
    a, b = a.flatten(1), b.flatten(1)
    if torch.compiler.is_compiling():
        return (a * b).sum(1)
    # As the transpose of a row, a column is what bmm is fast with.
    return torch.bmm(a[:, None], b[:, None].to(a.dtype).transpose(1, 2)).flatten()


def _dw_gradient(grad_GOKI: torch.Tensor, pw_GOMI: torch.Tensor, scale_GO: torch.Tensor) -> torch.Tensor:
    """Sum over O of the scaled products of ``pw`` and the merged kernel's gradient, shape (G, M, K, I)."""
    if torch.compiler.is_compiling():
        # In steps of a few outputs, which a cache holds while one loop forms the sums of all places.
        steps = (-1, math.gcd(pw_GOMI.shape[1], 32))
        scaled_GOMI = pw_GOMI * scale_GO[..., None, None]
        return torch.stack([
            (grad_GOI[:, :, None] * scaled_GOMI).unflatten(1, steps).sum(2).sum(1)
            for grad_GOI in grad_GOKI.unbind(2)], dim=2)
    # As many outputs at once as a cache holds the products of; these are added up last. A GPU wants few calls instead.
    (groups, outputs, places, inputs), multiplier = grad_GOKI.shape, pw_GOMI.shape[2]
    block = _BLOCK if grad_GOKI.device.type == 'cpu' else 16 * _BLOCK
    rows = max(1, min(outputs, block // (groups * multiplier * places * inputs)))
    sums_GOMKI = grad_GOKI.new_zeros(groups, rows, multiplier, places, inputs)
    for grad, pw, scale in zip(grad_GOKI.split(rows, 1), pw_GOMI.split(rows, 1), scale_GO.split(rows, 1)):
        sums_GOMKI[:, :grad.shape[1]].addcmul_((pw * scale[..., None, None])[:, :, :, None], grad[:, :, None])
    return sums_GOMKI.sum(1)


def _kaiming(like: torch.Tensor, shape: Sequence[int], fan_in: int, gain: float = 1.0) -> nn.Parameter:
    """Kaiming's uniform initialisation for ReLU, which OREPA starts every branch from, times ``gain``."""
    return nn.Parameter(like.new_empty(shape).uniform_(-1, 1) * (gain * math.sqrt(6 / fan_in)))
