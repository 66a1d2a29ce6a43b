"""The static teacher: any pretrained model, frozen, behind timm's own wrapper."""

import os
from typing import Optional, Union

import torch
import torch.nn as nn
from timm.models import load_state_dict
from timm.task import DistillationTeacher
from timm.utils import unwrap_model

from ..distillers import DistillSettings, ModelOutput, tap_teacher
from ..errors import LIBRARY_ERRORS, InputError, is_bug, one_line
from ..expansion.images import input_shape
from ..expansion.student import count_classes

__all__ = ['StaticTeacher', 'resolve_static_teacher']

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class StaticTeacher(nn.Module):
    """A frozen teacher that looks at the student's images, tapped for what the losses need of it.

    Always in evaluation mode, and without gradients. The student's images become what the teacher was trained on:
    normalised its own way, a grey image three times for an RGB teacher, the mean of three channels for a grey one.

    Args:
        teacher: from :func:`resolve_static_teacher`.
        student: its ``pretrained_cfg`` tells how its images are normalised; the teacher may expect another way.
        settings: losses, from :func:`timm_gpd.distillers.distill_settings`.

    Raises:
        InputError: if the teacher does not offer what the losses need, or its images have other channels.
    """

    def __init__(self, teacher: DistillationTeacher, student: nn.Module, settings: DistillSettings) -> None:
        super().__init__()
        self.teacher = teacher
        student_channels, self.channels = input_shape(student)[0], input_shape(unwrap_model(teacher.model))[0]
        if student_channels != self.channels and {student_channels, self.channels} != {1, 3}:
            raise InputError(
                f"the static teacher takes images of {self.channels} channels and the student's have "
                f'{student_channels}: give one of as many; grey images (1) and RGB (3) do for each other'
            )
        cfg = getattr(student, 'pretrained_cfg', None) or {}
        for key, imagenet in IMAGENET.items():
            of_student = torch.tensor(cfg.get(key, imagenet)).to(teacher.mean_kd)
            of_teacher = getattr(teacher, f'{key}_kd')
            self.register_buffer(f'student_{key}', _per_channel(of_student, student_channels), persistent=False)
            self.register_buffer(f'teacher_{key}', _per_channel(of_teacher, self.channels), persistent=False)
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
        if torch.equal(self.student_mean, self.teacher_mean) and torch.equal(self.student_std, self.teacher_std):
            return x
        x = x * self.student_std + self.student_mean
        if x.shape[1] != self.channels:
            x = x.mean(1, keepdim=True) if self.channels == 1 else x.expand(-1, self.channels, -1, -1)
        return (x - self.teacher_mean) / self.teacher_std


def _per_channel(values: torch.Tensor, channels: int) -> torch.Tensor:
    """Statistics of channels, shape (1, channels, 1, 1); the mean of those given where they are of other channels."""
    values = values.flatten()
    return (values if len(values) == channels else values.mean().expand(channels)).view(1, -1, 1, 1)


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
        classes = getattr(unwrap_model(teacher.model), 'num_classes', None)
    if classes is not None:  # of one that does not tell, the logits are compared when its losses are made
        _check_classes(classes, student)
    return teacher.to(device).requires_grad_(False)


def _create(
    name: str,
    student: nn.Module,
    device: Optional[torch.device],
    dtype: Optional[torch.dtype],
    path: Optional[str],
) -> DistillationTeacher:
    num_classes, channels = count_classes(student), input_shape(student)[0]

    def create() -> DistillationTeacher:
        return DistillationTeacher(name, num_classes, channels, pretrained_path=path, device=device, dtype=dtype)

    if not path:
        try:
            teacher = create()
        except (RuntimeError, OSError, ValueError, AssertionError) as error:  # timm's, of a name or of its weights
            if is_bug(error):
                raise
            raise InputError(one_line(error)) from error
        _check_adapted(name, unwrap_model(teacher.model), channels)
        return teacher
    if not os.path.isfile(path):
        raise InputError(f"the static teacher's checkpoint {path} does not exist")
    try:
        weights = load_state_dict(path)
    except LIBRARY_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].partition('. ')[0]
        raise InputError(f'{path} cannot be read as a checkpoint: {reason}')
    try:
        return create()
    except RuntimeError as error:
        # The last line is about the classifier's bias, where only that does not fit.
        problem = (str(error).strip().splitlines() or [''])[-1].strip()
        for key, tensor in weights.items():
            if problem.startswith(f'size mismatch for {key}:') and problem.endswith(f'[{num_classes}]).'):
                _check_classes(len(tensor), student)
        raise InputError(f'{path} does not fit {name}: {one_line(error)}')


def _check_adapted(name: str, teacher: nn.Module, channels: int) -> None:
    """timm adapts the kernel of a first convolution to other channels; other first layers it leaves untrained."""
    cfg = getattr(teacher, 'pretrained_cfg', None) or {}
    first = cfg.get('first_conv')
    for layer in first if isinstance(first, (tuple, list)) else [first] if first else []:
        if cfg['input_size'][0] != channels and not isinstance(teacher.get_submodule(layer), nn.Conv2d):
            raise InputError(
                f'the static teacher {name} was trained on images of {cfg["input_size"][0]} channels, and '
                f'its first layer cannot be adapted to {channels}: give another one'
            )


def _check_classes(classes: int, student: nn.Module) -> None:
    of_student = count_classes(student)
    if classes != of_student:
        raise InputError(
            f'the static teacher has {classes} classes and the student {of_student}: '
            'give one that was trained on the same classes'
        )
