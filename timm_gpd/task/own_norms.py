"""Clipping the gradients of student and dynamic teacher, each by its own norm, where they meet in shared entries."""

from typing import List, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.utils import get_total_norm

from ..axes import TensorMap
from ..errors import InputError
from ..private_torch import multiply_each
from ..teacher.computed_parameters import GradientScales
from ..teacher.shared_tensors import add_to_first_replicas
from .gap_preserving import GapPreservingTask

__all__ = ['OwnNorms']


class OwnNorms:
    """Clips the student's and the dynamic teacher's gradient, each by the norm that its plain training would see.

    What a stored tensor has as its gradient is a sum. From now on the student's part of it is taken down in every
    backward pass, and the rest is the teacher's::

        clip = OwnNorms(task)
        for images, target in loader:
            optimizer.zero_grad()
            task(images, target)['loss'].backward()
            clip(5.0)
            optimizer.step()

    Norms are of gradients of each model's own weights, whatever is stored, and of what its losses from a static teacher
    learn with; a criterion's own parameters count as the student's. Replica 0 of the teacher counts times
    ``share_weight``, as its gradient goes in there, and ratios between count as part of the teacher, in its weights. As
    without, batches that make an update are summed up before, and processes of DistributedDataParallel averaged.

    Args:
        task: what is trained, with one branch. It is not compiled, and its loss is not scaled for half precision.

    Raises:
        InputError: if convolutions have several branches, which are no weights of a model that trains plainly.
    """

    def __init__(self, task: GapPreservingTask) -> None:
        learners = task.get_learners()
        if len(learners.model.branch_kinds) > 1:
            raise InputError(
                "clipping by each model's own norm takes one branch: several are no weights of a model that trains "
                'plainly'
            )
        self.task = task
        self._gradients = learners.take_down_student_gradients()

    def forget(self) -> None:
        """Drops what was taken down, where an update is left out."""
        self._gradients.pop()

    @torch.no_grad()
    def __call__(self, limit: float) -> None:
        """Clips what the backward passes since the last call have left in ``grad``, in place.

        Args:
            limit: the largest norm that either model's gradient may have.

        Raises:
            RuntimeError: if gradients are shards.
        """
        learners = self.task.get_learners()
        teacher, step_loss = learners.model, learners.step_loss
        stored = {name: p.grad for name, p in teacher.wide.named_parameters() if p.grad is not None}
        if any(hasattr(gradient, 'full_tensor') for gradient in stored.values()):
            raise RuntimeError(
                "clipping by each model's own norm needs whole gradients, and these are DTensors: train with "
                'DistributedDataParallel (task.prepare_distributed()), or clip by the norm of all'
            )
        maps = [teacher.plan.tensors.get(name, TensorMap(tuple(g.shape), ())) for name, g in stored.items()]
        scales = [teacher.gradient_scales(name) for name in stored]
        student = self._pop_student(stored, maps)

        losses = {id(p): p.grad for p in step_loss.parameters() if p.grad is not None}
        of_teacher = [losses.pop(id(p)) for p in step_loss.distillers_of('dynamic_teacher') if id(p) in losses]
        of_student = list(losses.values())
        student_factor = _factor(get_total_norm([*student, *of_student]), limit)
        own = [gradient * scale.student for gradient, scale in zip(student, scales)]
        add_to_first_replicas(list(stored.values()), multiply_each(own, -1.0), maps)  # what is left is the teacher's
        norms = [
            _teacher_norm(gradient, tensor_map, scale)
            for gradient, tensor_map, scale in zip(stored.values(), maps, scales)
        ]
        teacher_factor = _factor(get_total_norm([*norms, *of_teacher]), limit)
        for gradient in (*stored.values(), *of_teacher):
            gradient *= teacher_factor
        for gradient in of_student:
            gradient *= student_factor
        add_to_first_replicas(list(stored.values()), multiply_each(own, student_factor), maps)

    def _pop_student(self, stored: Mapping[str, torch.Tensor], maps: Sequence[TensorMap]) -> List[torch.Tensor]:
        """The student's gradients that belong to the stored tensors', of all processes where these are."""
        taken = self._gradients.pop()
        gradients = [
            taken[name] if name in taken else gradient.new_zeros(tensor_map.shape)
            for (name, gradient), tensor_map in zip(stored.items(), maps)
        ]
        trained = self.task.get_trainable_module()
        if not isinstance(trained, nn.parallel.DistributedDataParallel):
            return gradients
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        flat /= dist.get_world_size(trained.process_group)
        dist.all_reduce(flat, group=trained.process_group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        return [part.view(gradient.shape).to(gradient) for part, gradient in zip(parts, gradients)]


def _teacher_norm(gradient: torch.Tensor, tensor_map: TensorMap, scale: GradientScales) -> torch.Tensor:
    """Norm of the gradient of a weight of the teacher's, from that of what is stored."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    norm = torch.linalg.vector_norm(gradient, dtype=dtype)
    if scale.first != 1:  # of the squared norm, what first replicas are too large by
        first = torch.linalg.vector_norm(tensor_map.first_replica(gradient), dtype=dtype)
        norm = (norm.square() - (1 - scale.first**-2) * first.square()).clamp(min=0).sqrt()
    return norm / scale.teacher


def _factor(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """What gradients of a norm are multiplied by, as ``clip_grad_norm_`` does."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)
