"""What student and dynamic teacher run on, computed from the tensors that are stored."""

from typing import Dict, Mapping, NamedTuple, Tuple

import torch
import torch.nn as nn

from ..axes import TensorMap
from ..plan import ExpansionPlan
from ..private_torch import is_replica
from .branches import BranchedKernel
from .gradient_shares import scale_gradients_of_first_replicas
from .parameter_layout import ParameterLayout
from .shared_tensors import SharedTensors, multiply_first_replicas

__all__ = ['ComputedParameters', 'GradientScales']


class GradientScales(NamedTuple):
    """What gradients are multiplied by on their way into a stored tensor.

    Attributes:
        teacher: those of the dynamic teacher's weights.
        first: those of its first replicas, besides.
        student: those of the student's weights.
    """

    teacher: float
    first: float
    student: float


class ComputedParameters(nn.Module):
    """The part of :class:`DynamicTeacher` that reads its stored tensors as parameters of two models."""

    wide: nn.Module
    plan: ExpansionPlan
    scale: str
    share_weight: float
    _layout: ParameterLayout
    _shared: SharedTensors
    _branched: Dict[str, BranchedKernel]
    _teacher_multipliers: Dict[str, float]

    def _stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is stored for a tensor of the student: shape of the teacher's, in the convention of ``scale``."""
        tensor_map = self.plan.tensors.get(name)
        if tensor_map is None:
            return tensor.clone()
        if self.scale == 'student' or tensor_map.divisor == 1:
            return tensor_map.replicate(tensor)
        stored = tensor_map.replicate(tensor / tensor_map.divisor)
        if self.scale == 'balanced':
            multiply_first_replicas([stored], [tensor_map.divisor], [tensor_map])
        return stored

    def _stored_tensors(self) -> Dict[str, torch.Tensor]:
        if is_replica(self):
            raise RuntimeError(
                'replicas of nn.DataParallel hold no parameters of their own: train with '
                'DistributedDataParallel, one process for each GPU (task.prepare_distributed())'
            )
        return dict(self.wide.named_parameters())

    def _merge(self, name: str, memory_format: torch.memory_format, shared: bool = True) -> Tuple[torch.Tensor, ...]:
        """Teacher's and student's kernel, from branches; without ``shared`` the teacher's twice."""
        tensor_map = self.plan.tensors.get(name) if shared else None
        return self._branched[name](self._teacher_multipliers.get(name, 1.0), tensor_map, memory_format)

    def merged_tensors(self, memory_format: torch.memory_format = torch.contiguous_format) -> Dict[str, torch.Tensor]:
        """The tensors that are stored, with kernels that have branches merged. Differentiable.

        Args:
            memory_format: of merged kernels.

        Returns:
            Tensors by the student's parameter names, tied ones by the first, in the teacher's shapes: merged kernels as
            the teacher runs on them, all others in the convention of ``scale``.

        Raises:
            RuntimeError: in a replica of ``nn.DataParallel``.
        """
        stored = self._stored_tensors()
        stored.update({name: self._merge(name, memory_format, shared=False)[0] for name in self._branched})
        return stored

    def parameters_of_both(
        self,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
        """:meth:`teacher_parameters` and :meth:`student_parameters`, from kernels that are merged once.

        What the teacher's tensors give the student's entries as gradient is scaled by ``share_weight``.

        Args:
            memory_format: of merged kernels.

        Returns:
            The teacher's tensors, and the student's.

        Raises:
            RuntimeError: in a replica of ``nn.DataParallel``, or if parameters are shards.
        """
        teacher, student = self._shared(self._stored_tensors())
        for name in self._branched:
            teacher[name], student[name] = self._merge(name, memory_format)
        teacher = self.share_gradients(teacher, self.plan.tensors)
        return self._layout.under_all_names(teacher), self._layout.under_all_names(student)

    def share_gradients(
        self,
        teacher: Mapping[str, torch.Tensor],
        tensor_maps: Mapping[str, TensorMap],
    ) -> Dict[str, torch.Tensor]:
        """A teacher's tensors, whose gradients go into the student's entries by ``share_weight``.

        Args:
            teacher: tensors by the first of the student's names, of this teacher or a narrower one.
            tensor_maps: how they widen.

        Returns:
            Tensors of the same values. With ``scale='balanced'`` and a weight of 1 the student's entries move by them
            as those of a plain wide model would under SGD: stored as the student's they are the divisor times as
            large, and their gradient of the teacher's loss one over it.
        """
        if self.share_weight == 1 and self.scale != 'balanced':
            return dict(teacher)
        maps = {name: tensor_maps.get(name, TensorMap(tuple(tensor.shape), ())) for name, tensor in teacher.items()}
        factors = {
            name: self.share_weight * (tensor_map.divisor**2 if self.scale == 'balanced' else 1)
            for name, tensor_map in maps.items()
        }
        return scale_gradients_of_first_replicas(teacher, maps, factors)

    def gradient_scales(self, name: str) -> GradientScales:
        """What gradients of the two models' weights are multiplied by to be those of a stored tensor, without branches.

        Args:
            name: the tensor's, the first of the student's names.

        Returns:
            The numbers; ``share_weight``, which is besides, is left out.
        """
        divisor = self.plan.tensors[name].divisor if name in self.plan.tensors else 1
        return {
            'student': GradientScales(1 / divisor, 1, 1),
            'teacher': GradientScales(1, 1, divisor),
            'balanced': GradientScales(1, divisor, 1),
        }[self.scale]

    def teacher_parameters(
        self,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Dict[str, torch.Tensor]:
        """What the teacher runs on, branches merged. Differentiable.

        Args:
            memory_format: of merged kernels.

        Returns:
            Tensors by the student's parameter names, in the teacher's shapes; tied ones under every name.

        Raises:
            RuntimeError: in a replica of ``nn.DataParallel``, or if parameters are shards.
        """
        teacher = self._shared.of_teacher(self._stored_tensors())
        teacher.update({name: self._merge(name, memory_format, shared=False)[0] for name in self._branched})
        return self._layout.under_all_names(teacher)

    def student_parameters(
        self,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Dict[str, torch.Tensor]:
        """The student's parameters, computed from the stored ones: merged, then sliced. Differentiable (Sec. 3.3).

        Args:
            memory_format: of merged kernels.

        Returns:
            Tensors by the student's parameter names, in its shapes; tied ones under every name.

        Raises:
            RuntimeError: in a replica of ``nn.DataParallel``, or if parameters are shards.
        """
        student = self._shared.of_student(self._stored_tensors())
        student.update({name: self._merge(name, memory_format)[1] for name in self._branched})
        return self._layout.under_all_names(student)
