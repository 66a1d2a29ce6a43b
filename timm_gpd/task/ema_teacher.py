"""The EMA teacher: a copy of the student that follows it, some tensors at every step."""

import math
import random
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Dict, List

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.task import DistillationTeacher
from timm.utils import unwrap_model

from ..distillers import DistillSettings
from ..errors import InputError, check_number
from ..expansion.copies import forget_computed_tensors_
from .static_teacher import StaticTeacher

__all__ = ['EmaTeacher', 'EmaTeacherConfig']


@dataclass(frozen=True)
class EmaTeacherConfig:
    """A moving average of the student as its teacher: fragment-wise EMA (arXiv 2212.06522).

    Attributes:
        prob: probability, above 0 and at most 1, that a tensor moves in a step; with 1 it is an ordinary average.
        momentum: share m0, from 0 and below 1, of itself that a tensor that moves keeps at the start; it rises by a
            cosine, to 1 at the end of training.
        seed: of which tensors move.
    """

    prob: float = 0.2
    momentum: float = 0.99
    seed: int = 0


class EmaTeacher(StaticTeacher):
    """A copy of the student that no gradient reaches and that follows the student, tensor by tensor.

    After a step each tensor moves with a probability p, to ``m * its own + (1 - m) * the student's``, and stays, bit
    for bit, otherwise. The momentum is ``m = 1 - (1 - m0) * (cos(pi * t / T) + 1) / 2`` at the share t / T of training.

    It is in evaluation mode, so batch norm uses running statistics. Those of a norm, which make no sense apart, are
    drawn together, apart from its weights, and move as the weights do; counts of batches, which are integers, are the
    student's when they are drawn. In several processes statistics move to the mean of all processes', so that all have
    the same teacher. Weights below 32 bits could not move by a small share: they are averaged in float32.

    Args:
        config: how it follows.
        student: where it starts; copied.
        settings: losses, from :func:`timm_gpd.distillers.distill_settings`.
        number: which of several teachers it is, from 1; 0 for the only one.

    Raises:
        InputError: if probability or momentum is out of range, or the student does not offer what the losses need.

    Attributes:
        update: number of the step that is next, from 0; it chooses what moves.
        progress: the share t / T of training that is done.
    """

    prefix = 'ema_teacher_'

    def __init__(
        self, config: EmaTeacherConfig, student: nn.Module, settings: DistillSettings, number: int = 0
    ) -> None:
        check_number('prob of an EMA teacher', config.prob)
        check_number('momentum of an EMA teacher', config.momentum)
        if not 0 < config.prob <= 1:
            raise InputError(f'prob of an EMA teacher must be above 0 and at most 1, but is {config.prob!r}')
        if not 0 <= config.momentum < 1:
            raise InputError(f'momentum of an EMA teacher must be from 0 to below 1, but is {config.momentum!r}')
        copy = deepcopy(student).requires_grad_(False)
        dtype = next((tensor.dtype for tensor in copy.parameters() if tensor.is_floating_point()), torch.float32)
        copy.to(torch.promote_types(dtype, torch.float32)).register_load_state_dict_post_hook(_forget)
        super().__init__(DistillationTeacher(copy), student, settings, number=number)
        self.config, self.update, self.progress, self.is_told = config, 0, 0.0, False

    @property
    def adapts(self) -> bool:
        """Whether it changes as the student trains."""
        return True

    @property
    def model(self) -> nn.Module:
        """The average, as a model of the student's class."""
        return unwrap_model(self.teacher.model)

    def begin_update(self, update: int, progress: float) -> None:
        """Takes down where training stands. Where nobody tells it, every call of :meth:`follow` is the next step's.

        Args:
            update: see :meth:`timm_gpd.task.base.BaseTask.begin_update`.
            progress: the same.
        """
        self.update, self.progress, self.is_told = update, progress, True

    def momentum(self) -> float:
        """The momentum m of the step."""
        return 1 - (1 - self.config.momentum) * (math.cos(math.pi * self.progress) + 1) / 2

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Moves towards the student, after a step of it. All processes call it.

        Args:
            student: as it is now, on any device, of the class that this is a copy of.
        """
        generator = random.Random(f'fragments of an update: {self.config.seed}, {self.update}')
        self.update += not self.is_told
        drawn = [name for names in _fragments(self.model) if generator.random() < self.config.prob for name in names]
        own, theirs = _tensors(self.model), _tensors(student)
        statistics = dict(student.named_buffers())
        theirs.update(_mean_of_processes({name: theirs[name] for name in drawn if name in statistics}))
        weight = 1 - self.momentum()
        for name in drawn:
            if own[name].is_floating_point():
                own[name].lerp_(theirs[name].to(own[name]), weight)
            else:
                own[name].copy_(theirs[name])
        forget_computed_tensors_(self.model)


def _forget(model: nn.Module, _: Any) -> None:
    forget_computed_tensors_(model)


def _tensors(model: nn.Module) -> Dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _fragments(model: nn.Module) -> List[List[str]]:
    """Names of the tensors that are drawn together: each parameter alone, and all buffers of a module."""
    buffers: Dict[str, List[str]] = {}
    for name, _ in model.named_buffers():
        buffers.setdefault(name.rpartition('.')[0], []).append(name)
    return [[name] for name, _ in model.named_parameters()] + list(buffers.values())


def _mean_of_processes(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Means over all processes of tensors of floating point, those that are there in each."""
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not tensors or not dist.is_available() or not dist.is_initialized():
        return {}
    values = torch.cat([tensor.flatten() for tensor in tensors.values()])
    dist.all_reduce(values)
    parts = (values / dist.get_world_size()).split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts)}
