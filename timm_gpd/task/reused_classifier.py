"""The static teacher's classifier in the student's place, as ``reuse_classifier`` of the loss ``embed`` asks for it."""

from typing import List, Union

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from ..distillers import DistillSettings, loss_and_teacher
from ..distillers.feature_tap import model_name
from ..errors import InputError
from ..expansion.copies import plain_copy
from .ema_teacher import EmaTeacher
from .static_teacher import StaticTeacher, StaticTeachers
from .stored_teacher import AnyStaticTeacher, StoredTeacher

__all__ = ['with_reused_classifier']


def with_reused_classifier(
    student: nn.Module, static_teacher: AnyStaticTeacher, settings: DistillSettings, in_place: bool
) -> nn.Module:
    """A student with the static teacher's classifier, frozen, where a loss asks for that.

    EmbedDistill (arXiv 2301.12005) keeps one of the teacher's two encoders, frozen, and trains the student to
    serve with it. Of a model that classifies that one is the classifier. It has to take the student's embedding as it
    is: a projection in between would be needed where the student is deployed, and that is an ordinary timm model.

    Args:
        student: timm model.
        static_teacher: one or several.
        settings: losses, from :func:`timm_gpd.distillers.distill_settings`.
        in_place: change the student itself.

    Returns:
        The student where no loss asks for it; else it, or a copy, with the classifier's weights, which do not require
        gradients.

    Raises:
        InputError: if two losses ask for it, the teacher is the student's average, there is a class map, or the
            classifiers are of different shapes.
    """
    asking = [name for name, arguments in settings.items() if arguments.get('reuse_classifier')]
    if not asking:
        return student
    if len(asking) > 1:
        raise InputError(
            f'{" and ".join(asking)} would both give the student a classifier: set reuse_classifier of one'
        )
    teacher = _teacher_of(asking[0], static_teacher)
    if isinstance(teacher, EmaTeacher):
        raise InputError("reuse_classifier: the EMA teacher's classifier is the student's own: name another teacher")
    if teacher.class_indices.numel():
        raise InputError(
            'reuse_classifier: the static teacher has other classes, with a class map: leave one of them out'
        )
    theirs = _classifier_of(unwrap_model(teacher.teacher.model), 'static teacher').state_dict()
    student = student if in_place else plain_copy(student)
    own = _classifier_of(student, 'student')
    shapes, wanted = (
        {name: tuple(tensor.shape) for name, tensor in state.items()} for state in (own.state_dict(), theirs)
    )
    if shapes != wanted:
        raise InputError(
            f"reuse_classifier: the student's classifier has {_describe(shapes)} and the static teacher's "
            f'{_describe(wanted)}, and nothing may stand between embedding and classifier of a plain model: choose a '
            'student of the same width, or leave it out'
        )
    with torch.no_grad():
        for name, tensor in own.state_dict().items():
            tensor.copy_(theirs[name])
    own.requires_grad_(False)
    return student


def _teacher_of(name: str, static_teacher: AnyStaticTeacher) -> StaticTeacher:
    if isinstance(static_teacher, StaticTeachers):
        teachers: List[Union[StaticTeacher, StoredTeacher]] = list(static_teacher.teachers)
        static_teacher = teachers[loss_and_teacher(name)[1] - 1]
    return static_teacher.static if isinstance(static_teacher, StoredTeacher) else static_teacher


def _classifier_of(model: nn.Module, owner: str) -> nn.Module:
    classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    if not isinstance(classifier, nn.Module) or isinstance(classifier, nn.ModuleList):
        raise InputError(
            f'reuse_classifier: {model_name(model)}, the {owner}, is without a single classifier: leave it out'
        )
    return classifier


def _describe(shapes: dict) -> str:
    return ', '.join(f'{name} {" x ".join(map(str, shape))}' for name, shape in shapes.items()) or 'no weights'
