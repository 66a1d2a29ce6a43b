"""The merge of a convolution's branches into one kernel, in weight space (OREPA, arXiv 2204.00826, Sec. 3).

:func:`merge_branches` computes what :func:`merge_plainly` says, in a form that is several times as fast.

Dimensions: O outputs, G groups, I inputs of a group, K = k * k places, P patterns, M the depthwise multiplier. A branch
that is not there is None.
"""

import math
from typing import List, Optional, Tuple, Union

import torch
import torch.nn.functional as F

from ..axes import TensorMap
from .plain_operators import has_second_derivatives, needs_plain_operators
from .shared_tensors import add_to_first_replicas

__all__ = ['inputs_last', 'merge_branches', 'merge_plainly', 'mix_inputs']

KERNEL_FORMAT = torch.channels_last  # of kernels and gradients while they are merged: inputs are last in memory


def merge_branches(
    shape: Tuple[int, ...],
    memory_format: torch.memory_format,
    tensor_map: Optional[TensorMap],
    *branches: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Merges the branches of one convolution, once for both models. Differentiable.

    Args:
        shape: of the kernel, (O, I, k, k).
        memory_format: of what is returned.
        tensor_map: how the student's kernel widens to the teacher's. Without one both are the same.
        *branches: the tensors that :func:`merge_plainly` takes, in its order.

    Returns:
        The teacher's kernel, of the given shape, and the student's: first replicas of it, times the map's divisor.
    """
    merge = merge_plainly if needs_plain_operators() else _Merge.apply
    merged = merge(shape, memory_format, tensor_map, *branches)
    return (merged, merged) if tensor_map is None else merged


def merge_plainly(
    shape: Tuple[int, ...],
    memory_format: torch.memory_format,
    tensor_map: Optional[TensorMap],
    kernel_OKI: torch.Tensor,
    gamma_O: torch.Tensor,
    mixed_OKI: Optional[torch.Tensor] = None,
    mixed_gamma_O: Optional[torch.Tensor] = None,
    patterns_OKP: Optional[torch.Tensor] = None,
    pattern_gamma_OP: Optional[torch.Tensor] = None,
    pointwise_OPI: Optional[torch.Tensor] = None,
    pw_OMI: Optional[torch.Tensor] = None,
    pw_gamma_O: Optional[torch.Tensor] = None,
    dw_GMKI: Optional[torch.Tensor] = None,
) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
    """The merge as it is defined: the sum of the branches, each times its gamma, in whatever order in memory.

    What the fast merge is tested against, and what runs where that cannot: for second derivatives, in forward mode and
    in ``torch.func`` transforms.

    Returns:
        The teacher's kernel, or with ``tensor_map`` the teacher's and the student's.
    """
    sum_OKI = torch.einsum('oki,o->oki', kernel_OKI, gamma_O)
    if mixed_OKI is not None:
        sum_OKI = sum_OKI + torch.einsum('oki,o->oki', mixed_OKI, mixed_gamma_O)
    if patterns_OKP is not None:
        sum_OKI = sum_OKI + torch.einsum('okp,op,opi->oki', patterns_OKP, pattern_gamma_OP, pointwise_OPI)
    if pw_OMI is not None:
        pw_GOMI, gamma_GO = _split_groups(pw_OMI, dw_GMKI), _split_groups(pw_gamma_O, dw_GMKI)
        sum_OKI = sum_OKI + torch.einsum('gomi,go,gmki->goki', pw_GOMI, gamma_GO, dw_GMKI).flatten(0, 1)
    merged = sum_OKI.transpose(1, 2).unflatten(2, shape[2:])
    if tensor_map is None:
        return merged
    return merged, tensor_map.first_replica(merged) * tensor_map.divisor


def mix_inputs(kernel_OKI: torch.Tensor, mix_GII: torch.Tensor) -> torch.Tensor:
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
    """:func:`merge_plainly`, and its gradients, in tiles of outputs that stay in a processor's cache.

    Small sums, over P and M, are made term by term: in tiles that is nearly as fast as matrix products, and
    ``torch.compile`` fuses it with all else that reads a tile.
    """

    @staticmethod
    def forward(
        ctx,
        shape: Tuple[int, ...],
        memory_format: torch.memory_format,
        tensor_map: Optional[TensorMap],
        kernel_OKI: torch.Tensor,
        gamma_O: torch.Tensor,
        mixed_OKI: Optional[torch.Tensor],
        mixed_gamma_O: Optional[torch.Tensor],
        patterns_OKP: Optional[torch.Tensor],
        pattern_gamma_OP: Optional[torch.Tensor],
        pointwise_OPI: Optional[torch.Tensor],
        pw_OMI: Optional[torch.Tensor],
        pw_gamma_O: Optional[torch.Tensor],
        dw_GMKI: Optional[torch.Tensor],
    ):
        ctx.shape, ctx.tensor_map = shape, tensor_map
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            kernel_OKI,
            gamma_O,
            mixed_OKI,
            mixed_gamma_O,
            patterns_OKP,
            pattern_gamma_OP,
            pointwise_OPI,
            pw_OMI,
            pw_gamma_O,
            dw_GMKI,
        )
        tiles = _row_tiles(kernel_OKI, dw_GMKI)
        merged = None
        if len(tiles) > 1:
            merged = torch.empty(shape, dtype=kernel_OKI.dtype, device=kernel_OKI.device, memory_format=memory_format)
        for rows in tiles:
            sum_OKI = kernel_OKI[rows] * gamma_O[rows, None, None]
            if mixed_OKI is not None:
                sum_OKI.addcmul_(mixed_OKI[rows], mixed_gamma_O[rows, None, None])
            if patterns_OKP is not None:
                scaled_OKP = patterns_OKP[rows] * pattern_gamma_OP[rows, None]
                for pattern_OK, pointwise_OI in zip(scaled_OKP.unbind(2), pointwise_OPI[rows].unbind(1)):
                    sum_OKI.addcmul_(pattern_OK[..., None], pointwise_OI[:, None])
            if pw_OMI is not None:
                sum_GOKI = _split_groups(sum_OKI, dw_GMKI)
                pw_GOMI = _split_groups(pw_OMI[rows] * pw_gamma_O[rows, None, None], dw_GMKI)
                for pw_GOI, dw_GKI in zip(pw_GOMI.unbind(2), dw_GMKI.unbind(1)):
                    sum_GOKI.addcmul_(pw_GOI[:, :, None], dw_GKI[:, None])
            tile = sum_OKI.transpose(1, 2).unflatten(2, shape[2:])
            if merged is None:
                merged = _reorder(tile, memory_format)
            else:
                merged[rows] = tile
        if tensor_map is None:
            return merged
        return merged, tensor_map.first_replica(merged) * tensor_map.divisor

    @staticmethod
    def backward(ctx, grad: Optional[torch.Tensor], student_grad: Optional[torch.Tensor] = None):
        (
            kernel_OKI,
            gamma_O,
            mixed_OKI,
            mixed_gamma_O,
            patterns_OKP,
            pattern_gamma_OP,
            pointwise_OPI,
            pw_OMI,
            pw_gamma_O,
            dw_GMKI,
        ) = ctx.saved_tensors
        if has_second_derivatives():
            return None, None, None, *_merge_backward_plainly(ctx, grad, student_grad)
        grads = [
            None if tensor is None or tensor is patterns_OKP else torch.empty_like(tensor)
            for tensor in ctx.saved_tensors[:-1]
        ]
        (
            kernel_grad,
            gamma_grad,
            mixed_grad,
            mixed_gamma_grad,
            _,
            pattern_gamma_grad,
            pointwise_grad,
            pw_grad,
            pw_gamma_grad,
        ) = grads
        if grad is None:
            grad = kernel_OKI.new_zeros(()).expand(ctx.shape)
        grad_OKI = _sum_gradients(grad, student_grad, ctx.tensor_map)
        dw_grad = None
        if dw_GMKI is not None:
            dw_grad = _dw_gradient(*(_split_groups(tensor, dw_GMKI) for tensor in (grad_OKI, pw_OMI, pw_gamma_O)))
        for rows in _row_tiles(kernel_OKI, dw_GMKI):
            tile_OKI = grad_OKI[rows]
            gamma_grad[rows] = _dot_rows(tile_OKI, kernel_OKI[rows])
            torch.mul(tile_OKI, gamma_O[rows, None, None], out=kernel_grad[rows])
            if mixed_OKI is not None:
                mixed_gamma_grad[rows] = _dot_rows(tile_OKI, mixed_OKI[rows])
                torch.mul(tile_OKI, mixed_gamma_O[rows, None, None], out=mixed_grad[rows])
            if patterns_OKP is not None:
                product_OPI = torch.bmm(patterns_OKP[rows].transpose(1, 2), tile_OKI)
                pattern_gamma_grad[rows] = _dot_rows(product_OPI.flatten(0, 1), pointwise_OPI[rows].flatten(0, 1)).view(
                    product_OPI.shape[:2]
                )
                torch.mul(product_OPI, pattern_gamma_OP[rows, :, None], out=pointwise_grad[rows])
            if pw_OMI is not None:
                grad_GOKI = _split_groups(tile_OKI, dw_GMKI)
                pw_grad_GOMI = _split_groups(pw_grad[rows], dw_GMKI).zero_()
                for grad_GOI, dw_GMI in zip(grad_GOKI.unbind(2), dw_GMKI.unbind(2)):
                    pw_grad_GOMI.addcmul_(grad_GOI[:, :, None], dw_GMI[:, None])
                pw_gamma_grad[rows] = _dot_rows(pw_grad[rows], pw_OMI[rows])
                pw_grad[rows] *= pw_gamma_O[rows, None, None]
        return None, None, None, *grads, dw_grad


def _merge_backward_plainly(
    ctx,
    grad: Optional[torch.Tensor],
    student_grad: Optional[torch.Tensor],
) -> List[Optional[torch.Tensor]]:
    """Gradients of :func:`merge_plainly`, as functions that have derivatives themselves."""
    branches = ctx.saved_tensors
    merged = merge_plainly(ctx.shape, KERNEL_FORMAT, ctx.tensor_map, *branches)
    merged = (merged,) if ctx.tensor_map is None else merged
    given = [(kernel, grad) for kernel, grad in zip(merged, (grad, student_grad)) if grad is not None]
    wanted = [i for i, tensor in enumerate(branches) if tensor is not None and tensor.requires_grad]
    found = torch.autograd.grad(
        [kernel for kernel, _ in given],
        [branches[i] for i in wanted],
        [grad for _, grad in given],
        create_graph=True,
        allow_unused=True,
    )
    gradients: List[Optional[torch.Tensor]] = [None] * len(branches)
    for i, gradient in zip(wanted, found):
        gradients[i] = gradient
    return gradients


def _sum_gradients(
    grad: torch.Tensor,
    student_grad: Optional[torch.Tensor],
    tensor_map: Optional[TensorMap],
) -> torch.Tensor:
    """Gradient of the merged kernel, as the teacher's and as the student's: a new tensor, shape (O, K, I)."""
    total = _reorder(grad, KERNEL_FORMAT)
    if student_grad is not None:
        add_to_first_replicas([total], [student_grad * tensor_map.divisor], [tensor_map])
    return inputs_last(total)


def inputs_last(kernel: torch.Tensor) -> torch.Tensor:
    """(O, I, k, k) -> (O, K, I), a view."""
    return kernel.flatten(2).transpose(1, 2)


@torch.library.custom_op('timm_gpd::reorder', mutates_args=())
def _copy_in_order(kernel: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """A copy in another order. An operator of its own: what is fused with such a copy is not vectorised."""
    return kernel.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@_copy_in_order.register_fake
def _(kernel: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return torch.empty_like(kernel, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _reorder(kernel: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    return _copy_in_order(kernel, memory_format == torch.channels_last)


_TILE = 2**20  # entries; a few tensors of that size fit a CPU's caches


def _row_tiles(kernel_OKI: torch.Tensor, dw_GMKI: Optional[torch.Tensor]) -> List[slice]:
    """Slices of the outputs. One on a GPU and compiled, where it gains nothing, and for ``dw_pw`` of several groups."""
    rows = outputs = len(kernel_OKI)
    one_group = dw_GMKI is None or len(dw_GMKI) == 1
    if one_group and kernel_OKI.device.type == 'cpu' and not torch.compiler.is_compiling():
        rows = 2 ** int(math.log2(max(1, _TILE * outputs // kernel_OKI.numel())))
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


def _dw_gradient(grad_GOKI: torch.Tensor, pw_GOMI: torch.Tensor, gamma_GO: torch.Tensor) -> torch.Tensor:
    """Sum over O of the scaled products of ``pw`` and the merged kernel's gradient, shape (G, M, K, I)."""
    if torch.compiler.is_compiling():
        # In steps of a few outputs, which a cache holds while one loop forms the sums of all places.
        steps = (-1, math.gcd(pw_GOMI.shape[1], 32))
        scaled_GOMI = pw_GOMI * gamma_GO[..., None, None]
        return torch.stack(
            [
                (grad_GOI[:, :, None] * scaled_GOMI).unflatten(1, steps).sum(2).sum(1)
                for grad_GOI in grad_GOKI.unbind(2)
            ],
            dim=2,
        )
    # As many outputs at once as a cache holds the products of; these are added up last. A GPU wants few calls instead.
    (groups, outputs, places, inputs), multiplier = grad_GOKI.shape, pw_GOMI.shape[2]
    entries = _TILE if grad_GOKI.device.type == 'cpu' else 16 * _TILE
    rows = max(1, min(outputs, entries // (groups * multiplier * places * inputs)))
    sums_GOMKI = grad_GOKI.new_zeros(groups, rows, multiplier, places, inputs)
    for grad, pw, gamma in zip(grad_GOKI.split(rows, 1), pw_GOMI.split(rows, 1), gamma_GO.split(rows, 1)):
        sums_GOMKI[:, : grad.shape[1]].addcmul_((pw * gamma[..., None, None])[:, :, :, None], grad[:, :, None])
    return sums_GOMKI.sum(1)
