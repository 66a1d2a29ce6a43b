"""Static teachers: pretrained models of any kind, frozen, that look at the student's images in their own way."""

import logging
import math
from contextlib import nullcontext
from numbers import Integral
from typing import List, Optional, Sequence, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import DistillationTeacher
from timm.utils import unwrap_model

from ..distillers import DistillSettings, ModelOutput, tap_teacher
from ..distillers.feature_tap import model_name
from ..errors import LIBRARY_ERRORS, InputError, NamedError, first_line, is_bug
from ..expansion.images import has_record, input_shape
from .online_modules import OnlineModules

__all__ = ['ClassMap', 'StaticTeacher', 'StaticTeachers', 'classes_in']

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

# Of every class of the student the teacher's class, or several of them.
ClassMap = Sequence[Union[int, Sequence[int]]]

_logger = logging.getLogger(__name__)


class StaticTeacher(nn.Module):
    """A frozen teacher that looks at the student's images, tapped for what the losses need of it.

    Always in evaluation mode, and without gradients. The student's images become what the teacher was trained on:
    of its size, normalised its own way, a grey image three times for an RGB teacher, the mean of three channels for a
    grey one, on its device and in its dtype. What it makes of them is of the student's classes, device and dtype.

    Args:
        teacher: from :func:`timm_gpd.task.given_teacher.resolve_static_teacher`.
        student: its ``pretrained_cfg`` tells how its images are normalised; the teacher may expect another way, which
            is warned about.
        settings: losses, from :func:`timm_gpd.distillers.distill_settings`.
        img_size: pixels of the side of the square images that the teacher is shown (default: the student's images).
        class_map: of every class of the student the teacher's class, or several, whose probabilities are added up;
            None where both have the same classes.
        number: which of several teachers it is, from 1; 0 for the only one.
        with_online_modules: whether it gets modules that adapt it to the student, by :meth:`add_online_modules`.

    Raises:
        InputError: if the teacher does not offer what the losses need, or its images have other channels.

    Attributes:
        prefix: of the names of its metrics.
        online_modules: what trains along with the student, or None.
    """

    prefix = 'static_'
    online_modules: Optional[OnlineModules]

    def __init__(
        self,
        teacher: DistillationTeacher,
        student: nn.Module,
        settings: DistillSettings,
        img_size: Optional[int] = None,
        class_map: Optional[ClassMap] = None,
        number: int = 0,
        with_online_modules: bool = False,
    ) -> None:
        super().__init__()
        self.teacher, self.img_size, self.number = teacher, img_size, number
        self.with_online_modules, self.online_modules = with_online_modules, None
        model = unwrap_model(teacher.model)
        student_channels = self.channels = input_shape(student)[0]
        if has_record(model) or any(isinstance(module, nn.Conv2d) for module in model.modules()):
            self.channels = input_shape(model)[0]
        if student_channels != self.channels and {student_channels, self.channels} != {1, 3}:
            raise InputError(
                f"the static teacher takes images of {self.channels} channels and the student's have "
                f'{student_channels}: give one of as many; grey images (1) and RGB (3) do for each other'
            )
        cfg = getattr(student, 'pretrained_cfg', None) or {}
        like = next((parameter for parameter in student.parameters()), teacher.mean_kd)
        for key, imagenet in IMAGENET.items():
            of_student, of_teacher = torch.tensor(cfg.get(key, imagenet)), getattr(teacher, f'{key}_kd')
            for owner, values, channels in (
                ('student', of_student, student_channels),
                ('teacher', of_teacher, self.channels),
            ):
                self.register_buffer(f'{owner}_{key}', _per_channel(values, channels).to(like), persistent=False)
        pairs = [(getattr(self, f'student_{key}'), getattr(self, f'teacher_{key}')) for key in IMAGENET]
        self.sees_the_same = all(torch.equal(*pair) for pair in pairs)
        if not all((of_student == of_teacher).all() for of_student, of_teacher in pairs):
            _logger.warning(
                f"the student's images have {self._statistics('student')}, and the static teacher {model_name(model)} "
                f'expects {self._statistics("teacher")}: they are normalised again for it'
            )
        self.register_buffer('class_indices', _class_indices(class_map, like.device), persistent=False)
        self.tap = tap_teacher(teacher.model, settings, number)
        self.train(False)

    def forward(self, x: torch.Tensor, in_views: bool = False) -> ModelOutput:
        """Output for images of shape (B, in_chans, H, W), normalised for the student, or for views of such images.

        It has a history where there are online modules, which get gradients by it.
        """
        online, run = self.online_modules, self.tap if in_views else self.tap.run
        with torch.set_grad_enabled(torch.is_grad_enabled() and online is not None):
            images = self._for_teacher(x.detach())
            with nullcontext() if online is None else online.inserted(self.tap):
                return self._for_student(run(images), x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (B, num_classes), for images of shape (B, in_chans, H, W), differentiable in them."""
        return self._for_student(self.tap.run(self._for_teacher(x)), x).logits

    @property
    def adapts(self) -> bool:
        """Whether it changes as the student trains."""
        return self.online_modules is not None

    @property
    def members(self) -> List['StaticTeacher']:
        """The teachers that this is: itself."""
        return [self]

    def add_online_modules(self, x: torch.Tensor) -> None:
        """Makes the online modules, of the student's dtype and device, if it is to have some and has none yet.

        Args:
            x: images, shape (B, in_chans, H, W), normalised for the student.

        Raises:
            InputError: if the teacher has no classifier that a head could stand beside.
        """
        if self.with_online_modules and self.online_modules is None:
            self.online_modules = OnlineModules(self.tap, self._for_teacher(x)).to(x)

    @torch.no_grad()
    def verify(self, x: torch.Tensor) -> None:
        """Checks on images of shape (B, in_chans, H, W) that the teacher takes them, and is the same if tapped.

        Raises:
            InputError: if it does not take them, or would be another model if tapped.
        """
        images = self._for_teacher(x)
        try:
            self.tap.verify(images)
        except LIBRARY_ERRORS as error:
            if isinstance(error, NamedError) or is_bug(error):
                raise
            raise InputError(
                f'the static teacher {model_name(unwrap_model(self.teacher.model))} takes no images of '
                f'{images.shape[-2]} x {images.shape[-1]} pixels ({first_line(error)}): show it others by '
                '--kd-img-size, in Python img_size'
            ) from error

    def train(self, mode: bool = True) -> 'StaticTeacher':
        return super().train(False)

    def _statistics(self, owner: str) -> str:
        mean, std = (
            ', '.join(f'{value:.4g}' for value in getattr(self, f'{owner}_{key}').flatten().tolist())
            for key in ('mean', 'std')
        )
        return f'mean ({mean}) and standard deviation ({std})'

    def _for_teacher(self, x: torch.Tensor) -> torch.Tensor:
        if not self.sees_the_same:
            x = x * self.student_std + self.student_mean
            if x.shape[1] != self.channels:
                x = x.mean(1, keepdim=True) if self.channels == 1 else x.expand(-1, self.channels, -1, -1)
            x = (x - self.teacher_mean) / self.teacher_std
        if self.img_size is not None and x.shape[-2:] != (self.img_size, self.img_size):
            x = x if x.dtype == torch.float64 else x.float()  # half precision is not resized on every device
            x = F.interpolate(x, (self.img_size, self.img_size), mode='bilinear', antialias=True)
        like = next((p for p in self.teacher.model.parameters() if p.is_floating_point()), x)
        return x.to(like.device, like.dtype)

    def _for_student(self, output: ModelOutput, x: torch.Tensor) -> ModelOutput:
        like = next((p for p in self.teacher.model.parameters() if p.is_floating_point()), x)
        if like.device != x.device or like.dtype != x.dtype:  # else it is as autocast has made it
            output = output.apply(lambda tensor: tensor.to(x.device, x.dtype))
        if self.class_indices.numel():
            output = output._replace(
                logits=_map_classes(output.logits, self.class_indices),
                views={view: _map_classes(logits, self.class_indices) for view, logits in (output.views or {}).items()}
                or None,
            )
        return output


class StaticTeachers(nn.Module):
    """Several static teachers, which look at the same images.

    Args:
        teachers: each by itself, of the student's classes, some perhaps with a store.
    """

    def __init__(self, teachers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.train(False)

    def __len__(self) -> int:
        return len(self.teachers)

    def forward(self, x: torch.Tensor, in_views: bool = False) -> ModelOutput:
        """Output for images of shape (B, in_chans, H, W), or for views of such: logits of the mean probabilities."""
        outputs = [teacher(x, in_views) for teacher in self.teachers]
        views = {view: _mean([output.views[view] for output in outputs]) for view in outputs[0].views or ()}
        return ModelOutput(_mean([output.logits for output in outputs]), each=tuple(outputs), views=views or None)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Those of their mean probabilities, see :meth:`StaticTeacher.logits`."""
        return _mean([teacher.logits(x) for teacher in self.teachers])

    @property
    def adapts(self) -> bool:
        """Whether one of them changes as the student trains."""
        return any(teacher.adapts for teacher in self.teachers)

    @property
    def members(self) -> List[StaticTeacher]:
        """The teachers that this is."""
        return list(self.teachers)

    def verify(self, x: torch.Tensor) -> None:
        """Checks every teacher, see :meth:`StaticTeacher.verify`."""
        for teacher in self.teachers:
            teacher.verify(x)

    def train(self, mode: bool = True) -> 'StaticTeachers':
        return super().train(False)


def _per_channel(values: torch.Tensor, channels: int) -> torch.Tensor:
    """Statistics of channels, shape (1, channels, 1, 1); the mean of those given where they are of other channels."""
    values = values.flatten()
    return (values if len(values) == channels else values.mean().expand(channels)).view(1, -1, 1, 1)


def classes_in(row: Union[int, Sequence[int]]) -> List[int]:
    """The classes that a class map gives one of the student's."""
    return [row] if isinstance(row, Integral) else list(row)


def _class_indices(class_map: Optional[ClassMap], device: torch.device) -> torch.Tensor:
    """A class map as a matrix, a row for every class of the student, filled up with -1; empty where there is none."""
    rows: List[List[int]] = [classes_in(row) for row in ([] if class_map is None else class_map)]
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.long, device=device)


def _mean(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits of the mean of several models' probabilities."""
    return torch.stack([each.log_softmax(-1) for each in logits]).logsumexp(0) - math.log(len(logits))


def _map_classes(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Logits of the student's classes, from the teacher's: those of sums of probabilities."""
    found = logits[:, indices.clamp(min=0)]  # (B, classes of the student, most of the teacher's for one)
    return found.masked_fill(indices < 0, -math.inf).logsumexp(-1)
