"""Matrix products with a parameter: ``x @ W``, ``W @ x``, ``torch.einsum`` and their kind.

Each is a sum of products over axes that have labels, as in ``torch.einsum``. A label that an activation has too tells
how wide the parameter's axis is; one that the output lacks is summed over, so the parameter is divided.
"""

from typing import Any, Dict, Hashable, List, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ...axes import AxisMap
from ..traced import from_parameters, shows_narrow_images, sources, view_axes
from ..widening import Widening
from .registry import Arguments, Call, Named, Positional, forms, watch, watch_call
from .weight import check_divisor, widen_view

Labels = List[Hashable]


@watch(*forms('matmul', 'mm', 'bmm', 'mv', 'dot', 'vdot'), torch.Tensor.__matmul__, names=('input', 'other'))
def matrix_product(widening: Widening, call: Call) -> None:
    """Of matrices, vectors, or batches of them."""
    pair = [call['input'], call['other']]
    labels, output = _label_matrices(*(tensor.dim() for tensor in pair))
    call['input'], call['other'] = _widen_operands(widening, pair, labels, output)


@watch(*forms('addmm', 'baddbmm', 'addmv', 'addbmm'), names=('input', 'first', 'second'))
def matrix_product_and_sum(widening: Widening, call: Call) -> None:
    """The same, to which something is added."""
    first, second = (
        next(name for name in names if name in call)
        for names in (('first', 'mat1', 'batch1', 'mat'), ('second', 'mat2', 'batch2', 'vec'))
    )
    pair = [call[first], call[second]]
    labels, output = _label_matrices(*(tensor.dim() for tensor in pair))
    call[first], call[second] = pair = _widen_operands(widening, pair, labels, output)
    if from_parameters(call['input']):
        sizes = _sizes(pair, labels)
        call['input'] = widening.widen_to_meet(call['input'], [[sizes[label] for label in output]])


@watch(*forms('outer', 'ger'), names=('input', 'other'))
def outer_product(widening: Widening, call: Call) -> None:
    """Of two vectors: nothing is summed over."""
    name = 'other' if 'other' in call else 'vec2'
    call['input'], call[name] = _widen_operands(widening, [call['input'], call[name]], [['i'], ['j']], ['i', 'j'])


@watch(F.bilinear, names=('input1', 'input2', 'weight', 'bias'))
def bilinear(widening: Widening, call: Call) -> None:
    """A sum over both inputs' last axes."""
    names = ('input1', 'input2', 'weight')
    batch: Labels = [('batch', axis) for axis in range(call['input1'].dim() - 1)]
    labels = [[*batch, 'i'], [*batch, 'j'], ['o', 'i', 'j']]
    weight, new = call['weight'], widening.is_new(call['weight'])
    call.update(zip(names, _widen_operands(widening, [call[name] for name in names], labels, [*batch, 'o'])))
    if new:
        outputs, inputs1, inputs2 = call['weight'].shape
        widening.set_sizes(widening.owner(weight), in1_features=inputs1, in2_features=inputs2, out_features=outputs)
    if from_parameters(call.get('bias')):
        call['bias'] = widening.widen_to_meet(call['bias'], [call['weight'].shape[:1]])


@watch_call(torch.einsum)
def einsum(widening: Widening, args: Positional, kwargs: Named) -> Arguments:
    """Whatever its equation says."""
    equation, *operands = args
    nested = len(operands) == 1 and isinstance(operands[0], (tuple, list))
    operands = list(operands[0]) if nested else operands
    if not any(map(from_parameters, operands)):
        return args, kwargs
    if not isinstance(equation, str):
        raise widening.unsupported('torch.einsum meets a parameter and has no equation in letters')
    labels, output = _parse(equation, [operand.dim() for operand in operands])
    return (equation, *_widen_operands(widening, operands, labels, output)), kwargs


@watch(torch.tensordot, names=('a', 'b', 'dims'))
def tensordot(widening: Widening, call: Call) -> None:
    """A sum over axes that are listed, or over so many."""
    a, b, dims = call['a'], call['b'], call.get('dims', 2)
    pairs = zip(range(a.dim() - dims, a.dim()), range(dims)) if isinstance(dims, int) else zip(*dims)
    labels: List[Labels] = [[(0, axis) for axis in range(a.dim())], [(1, axis) for axis in range(b.dim())]]
    for left, right in pairs:
        labels[1][right] = labels[0][left]
    output = [label for mine, other in (labels, labels[::-1]) for label in mine if label not in other]
    call['a'], call['b'] = _widen_operands(widening, [a, b], labels, output)


def _label_matrices(*dims: int) -> Tuple[List[Labels], Labels]:
    """Labels of the axes of two factors and of their product."""
    batch: List[Labels] = [[('batch', axis) for axis in range(2 - dim, 0)] for dim in dims]
    rows: Labels = ['row'] if dims[0] > 1 else []
    columns: Labels = ['column'] if dims[1] > 1 else []
    return ([[*batch[0], *rows, 'sum'], [*batch[1], 'sum', *columns]], [*max(batch, key=len), *rows, *columns])


def _parse(equation: str, dims: Sequence[int]) -> Tuple[List[Labels], Labels]:
    """Labels of an equation's operands and output; the axes of an ellipsis are counted from its end."""
    inputs, arrow, output = equation.replace(' ', '').partition('->')
    terms = inputs.split(',')
    ellipses = [
        [('...', axis) for axis in range(len(term.replace('...', '')) - dim, 0)] for term, dim in zip(terms, dims)
    ]
    widest: Labels = max(ellipses, key=len)

    def labels(term: str, ellipsis: Labels) -> Labels:
        before, dots, after = term.partition('...')
        return [*before, *(ellipsis if dots else []), *after]

    found = [labels(term, ellipsis) for term, ellipsis in zip(terms, ellipses)]
    if arrow:
        return found, labels(output, widest)
    return found, [*widest, *sorted(letter for letter in set(inputs) - set('.,') if inputs.count(letter) == 1)]


def _sizes(tensors: Sequence[torch.Tensor], labels: Sequence[Labels]) -> Dict[Hashable, int]:
    sizes: Dict[Hashable, int] = {}
    for tensor, names in zip(tensors, labels):
        for label, size in zip(names, tensor.shape):
            sizes[label] = max(size, sizes.get(label, 1))
    return sizes


def _widen_operands(
    widening: Widening,
    operands: Sequence[torch.Tensor],
    labels: Sequence[Labels],
    output: Labels,
) -> List[torch.Tensor]:
    """Widens the parameters in a sum of products.

    Args:
        widening: the student in the dry run.
        operands: the factors.
        labels: a label for each axis of each.
        output: labels of the output's axes; the others are summed over.

    Returns:
        The factors, wider where they are parameters that meet something wider.

    Raises:
        UnsupportedModelError: if a parameter cannot be widened exactly.
    """
    operands = list(operands)
    if all(map(from_parameters, operands)):
        return operands
    for position, tensor in enumerate(operands):
        if from_parameters(tensor):
            others = [i for i, other in enumerate(operands) if i != position and not from_parameters(other)]
            operands[position] = _widen_operand(
                widening,
                tensor,
                labels[position],
                output,
                _sizes([operands[i] for i in others], [labels[i] for i in others]),
                {label for i, names in enumerate(labels) if i != position for label in names},
                any(shows_narrow_images(operands[i]) for i in others),
            )
    return operands


def _widen_operand(
    widening: Widening,
    tensor: torch.Tensor,
    labels: Labels,
    output: Labels,
    met: Dict[Hashable, int],
    others: Any,
    meets_images: bool,
) -> torch.Tensor:
    """Widens one parameter, given the sizes that activations have and all labels of other factors."""
    axes = view_axes(tensor)
    wider = [
        axis
        for axis, (label, size) in enumerate(zip(labels, tensor.shape))
        if met.get(label, 1) > 1 and size > 1 and met[label] != size
    ]
    if len(set(labels)) < len(labels):
        if wider:
            raise widening.unsupported(f'a diagonal of {sources(tensor)[0]} is multiplied')
        return tensor
    if axes is None:
        if wider and all(labels[axis] in output for axis in wider):
            return widening.widen_to_meet(tensor, [[met.get(label, 1) for label in labels]])
        if wider:
            raise widening.unsupported(
                f'a product sums over an axis that is computed from {", ".join(sources(tensor))}, and is wider'
            )
        return tensor
    parameter = widening.tensor(sources(tensor)[0])
    summed = [axis for axis in range(tensor.dim()) if labels[axis] not in output]
    if sources(tensor)[0] in widening.met:
        _check_again(widening, tensor, wider, [axes[axis] for axis in summed if axes[axis] is not None])
        return tensor
    maps: Dict[int, AxisMap] = {}
    for axis in wider:
        maps[axis] = widening.axis_like(
            parameter, 'in' if axis in summed else 'out', tensor.shape[axis], met[labels[axis]], 'a matrix product'
        )
    divided = [axis for axis in wider if axis in summed]
    if len(divided) > 1:
        raise widening.unsupported(f'{sources(tensor)[0]} is summed over {len(divided)} axes that are wider')
    is_stem = meets_images and isinstance(parameter, nn.Parameter) and any(tensor.shape[axis] > 1 for axis in summed)
    if divided or is_stem:
        # Outputs widen as a linear layer's. Of several axes the first: heads stand before their entries.
        free = [labels.index(label) for label in output if label in labels and label not in others]
        free = [axis for axis in free if axes[axis] is not None]
        if free:
            maps[free[0]] = widening.out_axis(parameter, tensor.shape[free[0]])
    return widen_view(widening, tensor, maps, divided[0] if divided else None)


def _check_again(widening: Widening, tensor: torch.Tensor, wider: Sequence[int], summed: Sequence[int]) -> None:
    """A parameter that was met before must be as wide, and divided by as much, as it has to be here."""
    name = sources(tensor)[0]
    if wider:
        raise widening.unsupported(f'{name} was met before, where its channels were others')
    check_divisor(widening, name, summed)
