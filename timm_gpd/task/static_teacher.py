"""The static teacher: any pretrained model, frozen, behind timm's own wrapper."""
import os
import pickle
from typing import Optional, Union

import torch
import torch.nn as nn
from timm.models import load_state_dict
from timm.task import DistillationTeacher
from timm.utils import unwrap_model

from ..distillers import DistillSettings, ModelOutput, tap_teacher
from ..expansion.images import input_shape

__all__ = ['StaticTeacher', 'resolve_static_teacher']

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class StaticTeacher(nn.Module):
    """A frozen teacher that looks at the student's images, tapped for what the losses need of it.

    Always in evaluation mode, and without gradients.

    Args:
        teacher: from :func:`resolve_static_teacher`.
        student: its ``pretrained_cfg`` tells how its images are normalised; the teacher may expect another way.
        settings: losses, from :func:`timm_gpd.distillers.distill_settings`.

    Raises:
        ValueError: if the teacher does not offer what the losses need.
    """

    def __init__(self, teacher: DistillationTeacher, student: nn.Module, settings: DistillSettings) -> None:
        super().__init__()
        self.teacher = teacher
        cfg = getattr(student, 'pretrained_cfg', None) or {}
        for key in IMAGENET:
            value = torch.tensor(cfg.get(key, IMAGENET[key])).view(1, -1, 1, 1)
            self.register_buffer(f'student_{key}', value.to(teacher.mean_kd), persistent=False)
        self.tap = tap_teacher(teacher.model, settings)
        self.train(False)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> ModelOutput:
        """Output for images of shape (B, in_chans, H, W), normalised for the student."""
        return self.tap(self._normalize(x))

    def verify(self, x: torch.Tensor) -> None:
        """Checks on images of shape (B, in_chans, H, W) that tapping the teacher does not change it."""
        self.tap.verify(self._normalize(x))

    def train(self, mode: bool = True) -> 'StaticTeacher':
        return super().train(False)

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        return self.teacher.normalize_input(x, self.student_mean, self.student_std)


def resolve_static_teacher(
        teacher: Union[str, nn.Module],
        student: nn.Module,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        path: Optional[str] = None,
) -> DistillationTeacher:
    """A frozen teacher of the student's classes.

    Args:
        teacher: timm model name (``hf-hub:`` and ``local-dir:`` too), created with pretrained weights; a module, taken
            as it is; or a DistillationTeacher.
        student: the model that it will teach.
        device: device of the teacher.
        dtype: dtype of the teacher.
        path: checkpoint with the weights of a teacher that is named, instead of those that timm knows.

    Raises:
        ValueError: if the teacher has other classes, or the checkpoint cannot be loaded. A name whose weights know
            other classes would get a classifier of random weights instead, silently.
    """
    classes = None
    if isinstance(teacher, str):
        teacher = _create(teacher, student, device, dtype, path)
        classes = unwrap_model(teacher.model).pretrained_cfg.get('num_classes')
    elif not isinstance(teacher, DistillationTeacher):
        teacher = DistillationTeacher(teacher, device=device, dtype=dtype)
    if classes is None:
        classes = getattr(unwrap_model(teacher.model), 'num_classes', student.num_classes)
    _check_classes(classes, student)
    return teacher.to(device).requires_grad_(False)


def _create(
        name: str,
        student: nn.Module,
        device: Optional[torch.device],
        dtype: Optional[torch.dtype],
        path: Optional[str],
) -> DistillationTeacher:
    def create() -> DistillationTeacher:
        return DistillationTeacher(
            name, student.num_classes, input_shape(student)[0], pretrained_path=path, device=device, dtype=dtype)

    if not path:
        return create()
    if not os.path.isfile(path):
        raise ValueError(f'the static teacher\'s checkpoint {path} does not exist')
    try:
        weights = load_state_dict(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].partition('. ')[0]
        raise ValueError(f'{path} cannot be read as a checkpoint: {reason}')
    try:
        return create()
    except (KeyError, RuntimeError) as error:  # a KeyError from timm before 1.0.31, of other names
        problem = str(error).strip().splitlines()[-1].strip()  # the classifier's bias, where only that does not fit
        for key, tensor in weights.items():
            if problem.startswith(f'size mismatch for {key}:') and problem.endswith(f'[{student.num_classes}]).'):
                _check_classes(len(tensor), student)
        if not problem.startswith('size mismatch'):
            problem = 'its tensors have other names or shapes'
        raise ValueError(f'{path} does not fit {name}: {problem}')


def _check_classes(classes: int, student: nn.Module) -> None:
    if classes != student.num_classes:
        raise ValueError(f'the static teacher has {classes} classes and the student {student.num_classes}: '
                         'give one that was trained on the same classes')
