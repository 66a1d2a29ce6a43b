"""How the entries of one tensor are replicated, and the algebra that replicates and slices them.

Nothing here knows about modules. A channel axis of the dynamic teacher is the student's with every entry repeated
``ratio`` times in place; activations are repeated and never rescaled, so a weight that sums over replicated inputs is
divided by their replication (inverse reparameterization, Sec. 3.2 of arXiv 2410.04140, interleaved).
"""

import math
from dataclasses import dataclass, replace
from typing import Iterator, List, NamedTuple, Optional, Tuple

import torch

from .errors import UnsupportedModelError

__all__ = ['Segment', 'AxisMap', 'TensorMap']


class Segment(NamedTuple):
    """A stretch of an axis that is replicated alike.

    Student index ``(n, block)`` becomes teacher index ``(n, ratio, block)``: block 1 repeats every entry in place,
    block ``head_dim`` repeats whole attention heads.

    Attributes:
        size: its entries in the student, a multiple of ``block``.
        ratio: how many times they are replicated.
        block: the run of entries that is replicated as a whole.
    """

    size: int
    ratio: int
    block: int = 1

    @property
    def teacher_size(self) -> int:
        """Its entries in the teacher."""
        return self.size * self.ratio


class AxisMap(Tuple[Segment, ...]):
    """The segments of one axis, in order. Nearly always there is just one."""

    @classmethod
    def uniform(cls, size: int, ratio: int, block: int = 1) -> 'AxisMap':
        """One segment for the whole axis.

        Args:
            size: the student's entries.
            ratio: how many times they are replicated.
            block: the run of entries that is replicated as a whole.

        Returns:
            The axis map.

        Raises:
            ValueError: if ``block`` does not divide ``size``.
        """
        if size % block:
            raise ValueError(f'a block of {block} does not divide an axis of {size} entries')
        return cls((Segment(size, ratio, block),))

    @property
    def size(self) -> int:
        """The student's entries."""
        return sum(segment.size for segment in self)

    @property
    def teacher_size(self) -> int:
        """The teacher's entries."""
        return sum(segment.teacher_size for segment in self)

    @property
    def ratio(self) -> int:
        """The largest replication on the axis."""
        return max(segment.ratio for segment in self)

    def replica_index(self, device: Optional[torch.device] = None) -> torch.Tensor:
        """Which replica every teacher entry is.

        Args:
            device: where the result is to be (default: torch's default device).

        Returns:
            Integers of shape ``(teacher_size,)``; the student is where they are 0.
        """
        return torch.cat(
            [
                torch.arange(segment.ratio, device=device)
                .repeat_interleave(segment.block)
                .repeat(segment.size // segment.block)
                for segment in self
            ]
        )

    def replicate(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Student axis to teacher axis.

        Args:
            tensor: has ``size`` entries along ``axis``.
            axis: the axis, not negative.

        Returns:
            A tensor with ``teacher_size`` entries along ``axis``.
        """
        parts = [
            part.unflatten(axis, (-1, 1, segment.block))
            .repeat_interleave(segment.ratio, dim=axis + 1)
            .flatten(axis, axis + 2)
            for segment, part in self._split(tensor, axis, [segment.size for segment in self])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

    def first_replica(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Teacher axis to student axis: replica 0 of every entry. Differentiable.

        Args:
            tensor: has ``teacher_size`` entries along ``axis``.
            axis: the axis, not negative.

        Returns:
            A tensor with ``size`` entries along ``axis``; a view wherever strides allow one.
        """
        return self.first_replicas(tensor, axis, 1)

    def first_replicas(self, tensor: torch.Tensor, axis: int, ratio: int) -> torch.Tensor:
        """Teacher axis to the axis of a narrower teacher: the first replicas of every entry. Differentiable.

        Args:
            tensor: has ``teacher_size`` entries along ``axis``.
            axis: the axis, not negative.
            ratio: how many replicas are kept; segments that have fewer stay as they are.

        Returns:
            A tensor with ``at_ratio(ratio).teacher_size`` entries along ``axis``.
        """
        parts = [
            part
            if segment.ratio <= ratio
            else part.unflatten(axis, (-1, segment.ratio, segment.block))
            .narrow(axis + 1, 0, ratio)
            .flatten(axis, axis + 2)
            for segment, part in self._split(tensor, axis, [segment.teacher_size for segment in self])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

    def at_ratio(self, ratio: int) -> 'AxisMap':
        """The axis of a narrower teacher: what is replicated more than ``ratio`` times is replicated so many times."""
        return AxisMap(segment._replace(ratio=min(segment.ratio, ratio)) for segment in self)

    def _split(self, tensor: torch.Tensor, axis: int, sizes: List[int]) -> Iterator[Tuple[Segment, torch.Tensor]]:
        return zip(self, tensor.split(sizes, axis) if len(self) > 1 else (tensor,))


@dataclass(frozen=True)
class TensorMap:
    """How one tensor of the student becomes the dynamic teacher's.

    Attributes:
        shape: the student's shape.
        axes: ``(axis, AxisMap)`` for every replicated axis, applied in order. An axis that holds several flattened ones
            comes once for each of them.
        sum_axis: the axis that the layer sums over; the weight is divided by its ratio. None where there is no such
            axis: norms, biases, depthwise kernels, tokens.
        has_other_sums: whether another layer sums over another of its axes, as over those of a transposed weight.
    """

    shape: Tuple[int, ...]
    axes: Tuple[Tuple[int, AxisMap], ...]
    sum_axis: Optional[int] = None
    has_other_sums: bool = False

    @property
    def divisor(self) -> int:
        """What the replicated weight is divided by so that the teacher's activations equal the student's."""
        return dict(self.axes)[self.sum_axis].ratio if self.sum_axis in dict(self.axes) else 1

    @property
    def teacher_shape(self) -> Tuple[int, ...]:
        """The teacher's shape."""
        sizes = {axis: axis_map.teacher_size for axis, axis_map in self.axes}
        return tuple(sizes.get(axis, size) for axis, size in enumerate(self.shape))

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        """Repeats a student tensor along its channel axes, without the divisor.

        Args:
            tensor: shape ``shape``.

        Returns:
            A tensor of shape ``teacher_shape``.
        """
        for axis, axis_map in self.axes:
            tensor = axis_map.replicate(tensor, axis)
        return tensor

    def first_replica(self, tensor: torch.Tensor) -> torch.Tensor:
        """Slices replica 0 out of a teacher tensor, without the divisor. Differentiable.

        Args:
            tensor: shape ``teacher_shape``.

        Returns:
            A tensor of shape ``shape``.
        """
        for axis, axis_map in reversed(self.axes):
            tensor = axis_map.first_replica(tensor, axis)
        return tensor

    def first_replicas(self, tensor: torch.Tensor, ratio: int) -> torch.Tensor:
        """Slices a narrower teacher's tensor out of a teacher's, without a divisor. Differentiable.

        Args:
            tensor: shape ``teacher_shape``.
            ratio: how many replicas are kept, the first ones; what has fewer stays as it is.

        Returns:
            A tensor of shape ``at_ratio(ratio).teacher_shape``.
        """
        for position, (axis, axis_map) in enumerate(self.axes):
            # Of several flattened axes, the later ones stand inside the blocks of the earlier ones.
            inside = math.prod(inner.ratio for inner_axis, inner in self.axes[position + 1 :] if inner_axis == axis)
            spread = AxisMap(Segment(s.size * inside, s.ratio, s.block * inside) for s in axis_map)
            tensor = spread.first_replicas(tensor, axis, ratio)
        return tensor

    def at_ratio(self, ratio: int) -> 'TensorMap':
        """How the tensor becomes that of a narrower teacher.

        Args:
            ratio: what is replicated more often is replicated so many times.

        Returns:
            The map; axes that no longer widen are left out.

        Raises:
            UnsupportedModelError: if an axis holds several flattened ones, of which a later one has several segments.
        """
        narrower: List[Tuple[int, AxisMap]] = []
        for axis, axis_map in self.axes:
            size = dict(narrower)[axis].teacher_size if axis in dict(narrower) else self.shape[axis]
            if size != axis_map.size:
                if len(axis_map) > 1:
                    raise UnsupportedModelError(
                        f'an axis of a tensor of shape {self.shape} holds several, with segments of their own: it has '
                        f'no ratio between, only 1 and {axis_map.ratio}'
                    )
                axis_map = AxisMap((axis_map[0]._replace(size=size),))
            narrower.append((axis, axis_map.at_ratio(ratio)))
        return replace(self, axes=tuple(pair for pair in narrower if pair[1].ratio > 1))

    def noise_like(self, tensor: torch.Tensor, std: float) -> torch.Tensor:
        """Noise for a replicated tensor that changes neither the teacher's function nor the extracted student.

        It sums to zero over the input replicas of each output, and is zero where the student is sliced from, so equal
        inputs give equal outputs. Exact replicas would otherwise receive equal gradients for ever.

        Args:
            tensor: a teacher tensor, shape ``teacher_shape``.
            std: standard deviation of the noise before its mean over the replicas is removed.

        Returns:
            A tensor of the same shape; zeros where no such noise exists (nothing is summed over replicas), or none that
            would keep every one of several sums.
        """
        if self.divisor == 1 or self.has_other_sums or not tensor.is_floating_point():
            return torch.zeros_like(tensor)
        free = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
        for position, (axis, axis_map) in enumerate(self.axes):
            index = axis_map.replica_index(tensor.device)
            for inner_axis, inner_map in self.axes[position + 1 :]:
                index = inner_map.replicate(index, 0) if inner_axis == axis else index
            shape = [1] * tensor.dim()
            shape[axis] = -1
            free |= (index > 0).view(shape)
        # Of several flattened axes the sum is over the last, as the divisor is. The noise of an input's replicas must
        # sum to zero, so what it sums to is taken from those of them that are free.
        axis, summed = self.sum_axis, dict(self.axes)[self.sum_axis]
        inputs = summed.replicate(torch.arange(summed.size, device=tensor.device), 0)
        noise = torch.randn_like(tensor) * std * free
        shape = [summed.size if i == axis else size for i, size in enumerate(tensor.shape)]
        total = noise.new_zeros(shape).index_add_(axis, inputs, noise)
        count = noise.new_zeros(shape).index_add_(axis, inputs, free.to(noise))
        return noise - free * (total / count.clamp(min=1)).index_select(axis, inputs)
