"""Static teachers as they are given: by name, as a file or a module, one or several, and how each is to be run."""

import os
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Dict, List, Optional, Sequence, Union

import torch
import torch.nn as nn
from timm import create_model
from timm.models import load_state_dict
from timm.task import DistillationTeacher
from timm.utils import unwrap_model

from ..distillers import DistillSettings
from ..errors import LIBRARY_ERRORS, InputError, first_line, is_bug, one_line
from ..expansion.images import input_shape
from ..expansion.student import count_classes
from .ema_teacher import EmaTeacher, EmaTeacherConfig
from .static_teacher import ClassMap, StaticTeacher, StaticTeachers, classes_in
from .stored_teacher import AnyStaticTeacher, StoredTeacher

__all__ = [
    'GivenTeacher',
    'StaticTeacherConfig',
    'count_static_teachers',
    'create_static_teacher',
    'resolve_static_teacher',
]


@dataclass(frozen=True)
class StaticTeacherConfig:
    """A static teacher, and what it is to be run on.

    Attributes:
        model: timm model name (``hf-hub:`` and ``local-dir:`` too), created with pretrained weights; a module, taken
            as it is, not copied: it is frozen and moved; or a timm DistillationTeacher.
        path: checkpoint with the weights of a teacher that is named, instead of those that timm knows.
        img_size: pixels of the side of the square images that it is shown; None for the student's images.
        class_map: of every class of the student, in order, the index of the teacher's class, or of several, whose
            probabilities are added up; None where both have the same classes.
        device: where it runs; None for the student's device.
        dtype: its dtype; None for the student's, and of a module for its own.
        cache: folder in which its outputs are stored, and found again, see
            :class:`timm_gpd.task.stored_teacher.StoredTeacher`; None for nowhere.
        online_modules: whether small modules in it train along with the student, see
            :mod:`timm_gpd.task.online_modules`; the teacher's own weights stay as they are.
    """

    model: Union[str, nn.Module]
    path: Optional[str] = None
    img_size: Optional[int] = None
    class_map: Optional[ClassMap] = None
    device: Union[str, torch.device, None] = None
    dtype: Optional[torch.dtype] = None
    cache: Optional[str] = None
    online_modules: bool = False


# What tasks take as a static teacher: one or several, or what another task has made of them.
OneTeacher = Union[str, nn.Module, StaticTeacherConfig, EmaTeacherConfig]
GivenTeacher = Union[OneTeacher, Sequence[OneTeacher]]


def count_static_teachers(given: Optional[GivenTeacher]) -> int:
    """How many static teachers are given.

    Raises:
        InputError: if a list is empty.
    """
    if isinstance(given, StaticTeachers):
        return len(given)
    if isinstance(given, (list, tuple)):
        if not given:
            raise InputError('the list of static teachers is empty: give one, or None')
        return len(given)
    return 1


def create_static_teacher(
    given: GivenTeacher,
    student: nn.Module,
    settings: DistillSettings,
    device: Optional[torch.device] = None,
    dtype: Optional[torch.dtype] = None,
) -> AnyStaticTeacher:
    """What a task asks about every batch of images.

    Args:
        given: one teacher or several; those of another task are taken as they are.
        student: the model that it will teach.
        settings: losses, from :func:`timm_gpd.distillers.distill_settings`.
        device: of the student.
        dtype: of the student.

    Returns:
        One static teacher, or several as one.

    Raises:
        InputError: see :func:`resolve_static_teacher` and :class:`StaticTeacher`.
    """
    if isinstance(given, (StaticTeacher, StaticTeachers, StoredTeacher)):
        return given
    each: List[OneTeacher] = list(given) if isinstance(given, (list, tuple)) else [given]
    several = len(each) > 1
    teachers: List[nn.Module] = []
    for index, one in enumerate(each):
        number = index + 1 if several else 0
        if isinstance(one, EmaTeacherConfig):
            if any(isinstance(teacher, EmaTeacher) for teacher in teachers):
                raise InputError('two EMA teachers of one student are given: give one')
            teachers.append(EmaTeacher(one, student, settings, number))
            continue
        config = _config(one)
        if config.model is student:
            raise InputError('the static teacher is the student itself: give another model, which is frozen')
        teacher = resolve_static_teacher(config, student, device, dtype)
        static = StaticTeacher(
            teacher, student, settings, config.img_size, config.class_map, number, config.online_modules
        )
        teachers.append(static if config.cache is None else StoredTeacher(static, config.cache))
    return StaticTeachers(teachers) if several else teachers[0]


def resolve_static_teacher(
    given: OneTeacher,
    student: nn.Module,
    device: Optional[torch.device] = None,
    dtype: Optional[torch.dtype] = None,
) -> DistillationTeacher:
    """A frozen teacher, whose classes are the student's or have a map.

    Args:
        given: one teacher.
        student: the model that it will teach.
        device: of the student.
        dtype: of the student.

    Returns:
        timm's wrapper, on the teacher's device and of its dtype.

    Raises:
        InputError: if the teacher has other classes, the device is not there, or the checkpoint cannot be loaded. A
            name whose weights know other classes would get a classifier of random weights instead, silently.
    """
    config = _config(given)
    _check_arguments(config)
    classes = None
    if isinstance(config.model, DistillationTeacher):
        teacher = config.model
    elif isinstance(config.model, str):
        teacher = DistillationTeacher(_create(config, student, dtype), dtype=dtype)
        classes = unwrap_model(teacher.model).pretrained_cfg.get('num_classes')
    elif isinstance(config.model, nn.Module):
        teacher = DistillationTeacher(config.model, dtype=dtype)
    else:
        raise InputError(f'a static teacher is a name or a module, but not {config.model!r}')
    if classes is None or config.class_map is not None:
        classes = getattr(unwrap_model(teacher.model), 'num_classes', None)
    _check_classes(classes, student, config.class_map)
    place = device if config.device is None else config.device
    try:
        teacher.to(place).model.to(dtype=config.dtype)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f'the static teacher cannot be put on device {place}: {first_line(error)}') from error
    return teacher.requires_grad_(False)


def _config(given: OneTeacher) -> StaticTeacherConfig:
    return given if isinstance(given, StaticTeacherConfig) else StaticTeacherConfig(given)


def _check_arguments(config: StaticTeacherConfig) -> None:
    if config.path and not isinstance(config.model, str):
        raise InputError(f'path {config.path} is of a static teacher that is named, and this one is a module')
    size, dtype = config.img_size, config.dtype
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise InputError(f'img_size of a static teacher must be an integer of at least 1, but is {size!r}')
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f'dtype of a static teacher must be one of floating point, but is {dtype!r}')


def _create(config: StaticTeacherConfig, student: nn.Module, dtype: Optional[torch.dtype]) -> nn.Module:
    name, path, channels = str(config.model), config.path, input_shape(student)[0]
    classes = None if config.class_map is not None else count_classes(student)
    wanted: Dict[str, Any] = dict(in_chans=channels, dtype=dtype)
    if not path:
        try:
            model = _create_of_size(name, config.img_size, pretrained=True, num_classes=classes, **wanted)
        except (RuntimeError, OSError, ValueError, AssertionError) as error:  # timm's, of a name or of its weights
            if is_bug(error):
                raise
            raise InputError(one_line(error)) from error
        _check_adapted(name, model, channels)
        return model
    weights = _read(path)
    if classes is None:
        classes = _classes_of(weights, name)
    wanted['pretrained_cfg_overlay'] = dict(file=path, num_classes=classes)
    try:
        return _create_of_size(name, config.img_size, pretrained=True, num_classes=classes, **wanted)
    except RuntimeError as error:
        # The last line is about the classifier's bias, where only that does not fit.
        problem = (str(error).strip().splitlines() or [''])[-1].strip()
        for key, tensor in weights.items():
            if problem.startswith(f'size mismatch for {key}:') and problem.endswith(f'[{classes}]).'):
                _check_classes(len(tensor), student, None)
        raise InputError(f'{path} does not fit {name}: {one_line(error)}')


def _create_of_size(name: str, img_size: Optional[int], **kwargs: Any) -> nn.Module:
    """A model for images of a size; many architectures take any, and no argument for it."""
    if img_size is not None:
        try:
            return create_model(name, img_size=img_size, **kwargs)
        except TypeError as error:
            if 'img_size' not in str(error):
                raise
    return create_model(name, **kwargs)


def _read(path: str) -> Dict[str, torch.Tensor]:
    if not os.path.isfile(path):
        raise InputError(f"the static teacher's checkpoint {path} does not exist")
    try:
        return load_state_dict(path)
    except LIBRARY_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].partition('. ')[0]
        raise InputError(f'{path} cannot be read as a checkpoint: {reason}')


def _classes_of(weights: Dict[str, torch.Tensor], name: str) -> Optional[int]:
    """How many classes weights are of; None, which stands for the architecture's, if they do not tell."""
    classifier = (getattr(create_model(name), 'pretrained_cfg', None) or {}).get('classifier')
    first = classifier[0] if isinstance(classifier, (tuple, list)) else classifier
    weight = weights.get(f'{first}.weight')
    return None if weight is None else len(weight)


def _check_adapted(name: str, teacher: nn.Module, channels: int) -> None:
    """timm adapts the kernel of a first convolution to other channels; other first layers it leaves untrained."""
    cfg: Any = getattr(teacher, 'pretrained_cfg', None) or {}
    first = cfg.get('first_conv')
    for layer in first if isinstance(first, (tuple, list)) else [first] if first else []:
        if cfg['input_size'][0] != channels and not isinstance(teacher.get_submodule(layer), nn.Conv2d):
            raise InputError(
                f'the static teacher {name} was trained on images of {cfg["input_size"][0]} channels, and '
                f'its first layer cannot be adapted to {channels}: give another one'
            )


def _check_classes(classes: Optional[int], student: nn.Module, class_map: Optional[ClassMap]) -> None:
    """Of a model that does not tell its classes, the logits are compared when the losses are made."""
    of_student = count_classes(student)
    if class_map is None:
        if classes not in (None, of_student):
            raise InputError(
                f'the static teacher has {classes} classes and the student {of_student}: '
                'give one that was trained on the same classes, or a class map'
            )
        return
    if len(class_map) != of_student:
        raise InputError(
            f"the class map is of {len(class_map)} classes and the student has {of_student}: give the static teacher's "
            'class, or several, for each of them'
        )
    for index, row in enumerate(class_map):
        of_teacher = classes_in(row)
        for found in of_teacher:
            if not isinstance(found, Integral) or found < 0 or (classes is not None and found >= classes):
                raise InputError(
                    f"the class map gives the student's class {index} the static teacher's {found!r}, and its classes "
                    f'are numbers from 0' + (f' to {classes - 1}' if classes is not None else '')
                )
        if not of_teacher:
            raise InputError(f"the class map gives the student's class {index} none of the static teacher's")
