"""One set of stored tensors, read as the dynamic teacher's and as the student's."""

from functools import lru_cache
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch

from ..axes import AxisMap, Segment, TensorMap
from ..private_torch import add_each_, multiply_each
from .plain_operators import has_second_derivatives, needs_plain_operators

__all__ = ['SharedTensors', 'add_to_first_replicas', 'refuse_shards']

Axes = Tuple[Tuple[int, AxisMap], ...]  # of a TensorMap

_BUCKET = 2**20  # entries; large enough to spare small tensors a call each, small enough to free gradients early


class SharedTensors:
    """Reads stored tensors as two models: the teacher's are multiples of them, the student's multiples of slices.

    Autograd alone would build the gradient of a stored tensor from three of its size: the teacher's times a number,
    the student's in a tensor of zeros, and their sum. Here it is one. Tensors go in buckets, each a few calls however
    many they are, so that gradients are ready, and a gradient reduction can start, while the backward pass still runs.

    Args:
        tensor_maps: how each stored tensor widens, by name.
        teacher_multipliers: what the stored tensor is multiplied by to be the teacher's, where that is not 1.
        student_multipliers: what its slice is multiplied by to be the student's, where that is not 1.
        first_multipliers: what its first replicas are multiplied by besides to be the teacher's, where that is not 1.
    """

    def __init__(
        self,
        tensor_maps: Mapping[str, TensorMap],
        teacher_multipliers: Mapping[str, float],
        student_multipliers: Mapping[str, float],
        first_multipliers: Mapping[str, float] = {},
    ) -> None:
        self.buckets: List[Tuple[Tuple[str, ...], _Bucket]] = []
        for names in _fill_buckets(tensor_maps):
            self.buckets.append(
                (
                    names,
                    _Bucket(
                        tuple(tensor_maps[name] for name in names),
                        tuple(teacher_multipliers.get(name, 1.0) for name in names),
                        tuple(student_multipliers.get(name, 1.0) for name in names),
                        tuple(first_multipliers.get(name, 1.0) for name in names),
                    ),
                )
            )

    def __call__(
        self,
        stored: Mapping[str, torch.Tensor],
    ) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
        """Teacher's and student's tensors by name; a tensor without a map is both. Differentiable.

        Args:
            stored: tensors by name, shapes as in ``tensor_maps[name].teacher_shape``.

        Raises:
            RuntimeError: if a tensor is one shard of many.
        """
        refuse_shards(stored)
        share = _share_plainly if needs_plain_operators() else _Share.apply
        teacher, student = dict(stored), dict(stored)
        for names, bucket in self.buckets:
            tensors = share(bucket, *[stored[name] for name in names])
            teacher.update(zip(names, tensors))
            student.update(zip(names, tensors[len(names) :]))
        return teacher, student

    def of_teacher(self, stored: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """The teacher's tensors alone, see :meth:`__call__`."""
        return self._of_one(_teachers_plainly, stored)

    def of_student(self, stored: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """The student's tensors alone, see :meth:`__call__`."""
        return self._of_one(_students_plainly, stored)

    def _of_one(self, read: Callable, stored: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        refuse_shards(stored)
        tensors = dict(stored)
        for names, bucket in self.buckets:
            tensors.update(zip(names, read(bucket, *[stored[name] for name in names])))
        return tensors


class _Bucket(NamedTuple):
    """Tensors that are read together."""

    tensor_maps: Tuple[TensorMap, ...]
    teacher_multipliers: Tuple[float, ...]
    student_multipliers: Tuple[float, ...]
    first_multipliers: Tuple[float, ...]


def _fill_buckets(tensor_maps: Mapping[str, TensorMap]) -> Iterable[Tuple[str, ...]]:
    names: List[str] = []
    size = 0
    for name, tensor_map in tensor_maps.items():
        entries = torch.Size(tensor_map.teacher_shape).numel()
        if names and size + entries > _BUCKET:
            yield tuple(names)
            names, size = [], 0
        names.append(name)
        size += entries
    if names:
        yield tuple(names)


def refuse_shards(stored: Mapping[str, torch.Tensor]) -> None:
    """Refuses tensors that are one shard of many.

    Raises:
        RuntimeError: names one.
    """
    if torch.compiler.is_compiling():
        return
    for name, tensor in stored.items():
        if hasattr(tensor, 'full_tensor'):
            raise RuntimeError(
                f'{name} is a DTensor, and the student is a slice of whole tensors: fully_shard all that is trained at '
                'once, not parts of it, or train with DistributedDataParallel (task.prepare_distributed())'
            )


def _teachers_plainly(bucket: _Bucket, *stored: torch.Tensor) -> List[torch.Tensor]:
    tensors = [tensor if by == 1 else tensor * by for tensor, by in zip(stored, bucket.teacher_multipliers)]
    return [
        tensor if by == 1 else tensor * first_replica_mask(tensor, tensor_map, by)
        for tensor, tensor_map, by in zip(tensors, bucket.tensor_maps, bucket.first_multipliers)
    ]


def _students_plainly(bucket: _Bucket, *stored: torch.Tensor) -> List[torch.Tensor]:
    slices = [tensor_map.first_replica(tensor) for tensor_map, tensor in zip(bucket.tensor_maps, stored)]
    # Copies, not views: strided, each of the student's convolutions would copy its kernel three times a step, and torch
    # 2.15's channels_last BatchNorm backward on the CPU misreads a strided weight.
    return [tensor.clone() if by == 1 else tensor * by for tensor, by in zip(slices, bucket.student_multipliers)]


def _share_plainly(bucket: _Bucket, *stored: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """What :class:`_Share` computes, in operators that any transform knows."""
    return *_teachers_plainly(bucket, *stored), *_students_plainly(bucket, *stored)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bucket: _Bucket, *stored: torch.Tensor):
        ctx.bucket = bucket
        ctx.set_materialize_grads(False)
        teacher = _multiply(stored, bucket.teacher_multipliers)
        of_two_scales = [i for i, by in enumerate(bucket.first_multipliers) if by != 1]
        for i in of_two_scales:
            teacher[i] = teacher[i].clone() if bucket.teacher_multipliers[i] == 1 else teacher[i]
        _multiply_first_replicas(teacher, bucket, of_two_scales)
        student = [_copy_first_replica(tensor, tensor_map) for tensor_map, tensor in zip(bucket.tensor_maps, stored)]
        return *teacher, *_multiply(student, bucket.student_multipliers)

    @staticmethod
    def backward(ctx, *grads):
        bucket = ctx.bucket
        if has_second_derivatives():
            return None, *_share_backward_plainly(bucket, grads)
        count = len(bucket.tensor_maps)
        teacher, student = grads[:count], grads[count:]
        used = [i for i in range(count) if teacher[i] is not None or student[i] is not None]
        result = [None] * count
        given = [i for i in used if teacher[i] is not None]
        if given:
            # Copies even where the multiplier is 1: parts are added in place, and a gradient may be another tensor's as
            # well.
            stored = multiply_each([teacher[i] for i in given], [bucket.teacher_multipliers[i] for i in given])
            for i, grad in zip(given, stored):
                result[i] = grad
        for i in used:
            if result[i] is None:
                result[i] = student[i].new_zeros(bucket.tensor_maps[i].teacher_shape)
        _multiply_first_replicas(result, bucket, [i for i in given if bucket.first_multipliers[i] != 1])

        used = [i for i in used if student[i] is not None]
        add_to_first_replicas(
            [result[i] for i in used],
            _multiply([student[i] for i in used], [bucket.student_multipliers[i] for i in used]),
            [bucket.tensor_maps[i] for i in used],
        )
        return None, *result


def _share_backward_plainly(bucket: _Bucket, grads: Sequence[Optional[torch.Tensor]]) -> List[Optional[torch.Tensor]]:
    """The gradient of :func:`_share_plainly`, as a function that has derivatives itself. It is linear in ``grads``."""
    given = [i for i, grad in enumerate(grads) if grad is not None]
    stored = [
        grads[given[0]].new_zeros(tensor_map.teacher_shape, requires_grad=True) for tensor_map in bucket.tensor_maps
    ]
    outputs = _share_plainly(bucket, *stored)
    return torch.autograd.grad(
        [outputs[i] for i in given], stored, [grads[i] for i in given], create_graph=True, allow_unused=True
    )


def _multiply_first_replicas(tensors: List[Any], bucket: _Bucket, indices: Sequence[int]) -> None:
    multiply_first_replicas(
        [tensors[i] for i in indices],
        [bucket.first_multipliers[i] for i in indices],
        [bucket.tensor_maps[i] for i in indices],
    )


def add_to_first_replicas(
    teacher: Sequence[torch.Tensor],
    student: Sequence[torch.Tensor],
    tensor_maps: Sequence[TensorMap],
) -> None:
    """Adds student tensors to the first replicas in teacher tensors, in place, in one call for all."""
    if torch.compiler.is_compiling():
        if teacher:
            _add_to_first_replicas(list(teacher), list(student), _encode_axes(tensor_maps))
    else:
        _add_in_views(teacher, student, [tensor_map.axes for tensor_map in tensor_maps])


def multiply_first_replicas(
    teacher: Sequence[torch.Tensor],
    by: Sequence[float],
    tensor_maps: Sequence[TensorMap],
) -> None:
    """Multiplies the first replicas in teacher tensors by numbers, in place, in one call for all."""
    if torch.compiler.is_compiling():
        if teacher:
            _multiply_in_first_replicas(list(teacher), list(by), _encode_axes(tensor_maps))
    else:
        _multiply_in_views(teacher, by, [tensor_map.axes for tensor_map in tensor_maps])


def first_replica_mask(tensor: torch.Tensor, tensor_map: TensorMap, number: float) -> torch.Tensor:
    """A number where a teacher tensor holds first replicas, and 1 elsewhere; of its shape and dtype."""
    mask = torch.ones_like(tensor, requires_grad=False)
    add_to_first_replicas([mask], [mask.new_full(tensor_map.shape, number - 1)], [tensor_map])
    return mask


def _add_in_views(into: Sequence[torch.Tensor], parts: Sequence[torch.Tensor], axes: Iterable[Axes]) -> None:
    replicas, entries = [], []
    for whole, part, tensor_axes in zip(into, parts, axes):
        replicas += _first_replica_views(whole, tensor_axes)
        entries += _student_views(part, tensor_axes)
    if replicas:
        add_each_(replicas, entries)


def _multiply_in_views(into: Sequence[torch.Tensor], by: Sequence[float], axes: Iterable[Axes]) -> None:
    for whole, number, tensor_axes in zip(into, by, axes):
        for view in _first_replica_views(whole, tensor_axes):
            view.mul_(number)


# Operators of their own: compiled, every entry of the whole would ask if it has a part. They make the views themselves:
# a compiler that lays the whole out in another order would not move views with it.


@torch.library.custom_op('timm_gpd::add_to_first_replicas', mutates_args=('into',))
def _add_to_first_replicas(into: List[torch.Tensor], parts: List[torch.Tensor], axes: List[int]) -> None:
    _add_in_views(into, parts, _decode_axes(axes))


@torch.library.custom_op('timm_gpd::multiply_in_first_replicas', mutates_args=('into',))
def _multiply_in_first_replicas(into: List[torch.Tensor], by: List[float], axes: List[int]) -> None:
    _multiply_in_views(into, by, _decode_axes(axes))


def _encode_axes(tensor_maps: Iterable[TensorMap]) -> List[int]:
    """Axes of some tensors in the integers that an operator takes; each list is behind its length."""
    numbers: List[int] = []
    for tensor_map in tensor_maps:
        numbers.append(len(tensor_map.axes))
        for axis, axis_map in tensor_map.axes:
            numbers += [axis, len(axis_map), *(number for segment in axis_map for number in segment)]
    return numbers


def _decode_axes(numbers: Iterable[int]) -> Iterator[Axes]:
    numbers = iter(numbers)
    for axis_count in numbers:
        axes = []
        for _ in range(axis_count):
            axis, segment_count = next(numbers), next(numbers)
            axes.append(
                (axis, AxisMap(Segment(next(numbers), next(numbers), next(numbers)) for _ in range(segment_count)))
            )
        yield tuple(axes)


def _multiply(tensors: Sequence[torch.Tensor], by: Sequence[float]) -> List[torch.Tensor]:
    """Every tensor times its number; where that is 1 the tensor is not copied."""
    result = [tensor.view_as(tensor) for tensor in tensors]
    changed = [i for i, number in enumerate(by) if number != 1]
    if changed:
        products = multiply_each([tensors[i] for i in changed], [by[i] for i in changed])
        for i, product in zip(changed, products):
            result[i] = product
    return result


# -- views, whose places are looked for once ---------------------------------------------------------------------------
#
# A step takes thousands of views, one axis after another of one tensor after another; on a GPU, and in small models
# everywhere, a step waits for that. What makes a view is its size, strides and offset, and these stay as they are.

Place = Tuple[Tuple[int, ...], Tuple[int, ...], int]  # size, strides, offset


def _first_replica_views(tensor: torch.Tensor, axes: Axes) -> List[torch.Tensor]:
    """Views of a teacher tensor that together hold the student's entries, one for each combination of segments."""
    return _views(tensor, _first_replica_places(axes, tensor.shape, tensor.stride()))


def _student_views(tensor: torch.Tensor, axes: Axes) -> List[torch.Tensor]:
    """Views of a student tensor, of the shapes and in the order of :func:`_first_replica_views`."""
    return _views(tensor, _student_places(axes, tensor.shape, tensor.stride()))


def _copy_first_replica(tensor: torch.Tensor, tensor_map: TensorMap) -> torch.Tensor:
    """``tensor_map.first_replica(tensor)``, on memory of its own."""
    views = () if torch.compiler.is_compiling() else _first_replica_views(tensor, tensor_map.axes)
    if len(views) != 1:
        return tensor_map.first_replica(tensor).clone()
    return views[0].clone().reshape(tensor_map.shape)


def _views(tensor: torch.Tensor, places: Iterable[Place]) -> List[torch.Tensor]:
    start = tensor.storage_offset()
    return [tensor.as_strided(size, stride, start + offset) for size, stride, offset in places]


@lru_cache(maxsize=2**14)
def _first_replica_places(axes: Axes, shape: torch.Size, stride: Tuple[int, ...]) -> Tuple[Place, ...]:
    views = [torch.empty_strided(shape, stride, device='meta')]
    for axis, axis_map in _last_first(axes):
        sizes = [segment.teacher_size for segment in axis_map]
        views = [
            part.unflatten(axis, (-1, segment.ratio, segment.block)).select(axis + 1, 0)
            for view in views
            for segment, part in zip(axis_map, view.split(sizes, axis))
        ]
    return _places(views)


@lru_cache(maxsize=2**14)
def _student_places(axes: Axes, shape: torch.Size, stride: Tuple[int, ...]) -> Tuple[Place, ...]:
    views = [torch.empty_strided(shape, stride, device='meta')]
    for axis, axis_map in _last_first(axes):
        sizes = [segment.size for segment in axis_map]
        views = [
            part.unflatten(axis, (-1, segment.block))
            for view in views
            for segment, part in zip(axis_map, view.split(sizes, axis))
        ]
    return _places(views)


def _places(views: Iterable[torch.Tensor]) -> Tuple[Place, ...]:
    return tuple((tuple(view.shape), view.stride(), view.storage_offset()) for view in views)


def _last_first(axes: Axes) -> Axes:
    """Axes in the order in which they can be split: one that is split moves those behind it."""
    order = sorted(range(len(axes)), key=lambda i: (axes[i][0], i), reverse=True)
    return tuple(axes[i] for i in order)
