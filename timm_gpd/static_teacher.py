"""The static teacher: any pretrained model, frozen, behind timm's own wrapper."""
from typing import Optional, Union

import torch
import torch.nn as nn
from timm.task import DistillationTeacher
from timm.utils import unwrap_model

__all__ = ['resolve_static_teacher']


def resolve_static_teacher(
        teacher: Union[str, nn.Module],
        student: nn.Module,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
) -> DistillationTeacher:
    """A frozen teacher of the student's classes.

    Args:
        teacher: timm model name (``hf-hub:`` and ``local-dir:`` too), created with pretrained weights; a module, taken
            as it is; or a DistillationTeacher.
        student: the model that it will teach.
        device: device of the teacher.
        dtype: dtype of the teacher.

    Raises:
        ValueError: if the teacher has other classes. A name whose weights know other classes would get a classifier
            of random weights instead, silently.
    """
    classes = None
    if isinstance(teacher, str):
        teacher = DistillationTeacher(teacher, student.num_classes, student.in_chans, device=device, dtype=dtype)
        classes = unwrap_model(teacher.model).pretrained_cfg.get('num_classes')
    elif not isinstance(teacher, DistillationTeacher):
        teacher = DistillationTeacher(teacher, device=device, dtype=dtype)
    if classes is None:
        classes = getattr(unwrap_model(teacher.model), 'num_classes', student.num_classes)
    if classes != student.num_classes:
        raise ValueError(f'the static teacher has {classes} classes and the student {student.num_classes}: '
                         'give one that was trained on the same classes')
    return teacher.to(device).requires_grad_(False)
