"""Distillation from a static teacher: losses with what they need to compare two timm models of any kind.

A task states its losses once, taps the models, and builds one :class:`Distillers` per learner::

    settings = distill_settings('dkd,nd', {'beta': 2})
    student_tap, teacher_tap = tap_learner(student, settings), tap_teacher(teacher, settings)
    distillers = Distillers(settings, example_output(student_tap, x), example_output(teacher_tap, x))

    output = student_tap(x)                                        # logits and features in one pass
    terms = distillers(output, teacher_tap(x), target)             # {'dkd': ..., 'nd': ...}
"""

from collections import ChainMap
from typing import Any, Dict, List, Mapping, Optional, Tuple, Type

import torch
import torch.nn as nn

from ..errors import InputError
from ..losses.hyperparameters import check_hyperparameter
from .adversarial import DGAD, IGDM, AdaAD, AdversarialDistiller
from .base import Distiller
from .embedding import ND, RSD, Embed, Feature
from .feature_tap import ModelOutput, Tap, evaluation_mode, example_output, stage_modules
from .ofa import OFA
from .plain import AT, DIST, DKD, KD, NKD, RKD, RLD, WTTM
from .reviewkd import ReviewKD
from .token import TOKEN_KINDS, Token

__all__ = [
    'ADVERSARIAL_DISTILLERS',
    'DISTILLERS',
    'DistillSettings',
    'AdversarialDistiller',
    'Distiller',
    'Distillers',
    'ModelOutput',
    'TOKEN_KINDS',
    'Tap',
    'distill_settings',
    'evaluation_mode',
    'example_output',
    'loss_and_teacher',
    'stage_modules',
    'tap_learner',
    'tap_teacher',
]

# Under the names of ``--kd-distill-type``; ``logit``, ``feature`` and ``token`` are timm's.
DISTILLERS: Dict[str, Type[Distiller]] = {
    'logit': KD,
    'kd': KD,
    'feature': Feature,
    'dkd': DKD,
    'rld': RLD,
    'nkd': NKD,
    'wttm': WTTM,
    'reviewkd': ReviewKD,
    'dist': DIST,
    'ofa': OFA,
    'nd': ND,
    'rsd': RSD,
    'rkd': RKD,
    'embed': Embed,
    'at': AT,
    'token': Token,
}
# The same of an adversarial step.
ADVERSARIAL_DISTILLERS: Dict[str, Type[Distiller]] = {'adaad': AdaAD, 'dgad': DGAD, 'igdm': IGDM}
_ALL = ChainMap(DISTILLERS, ADVERSARIAL_DISTILLERS)  # a view, as users add their own

# Hyperparameters of every loss to use, by its name, which may tell whose it is: ``dkd@2`` is the second teacher's.
DistillSettings = Dict[str, Dict[str, Any]]


class Distillers(nn.ModuleDict):
    """The losses between one learner and the static teacher.

    A student and its dynamic teacher are two learners, of different widths: each has distillers of its own. They belong
    to the task and are trained with it, and nothing of them remains in the student.

    Args:
        settings: losses and their hyperparameters, from :func:`distill_settings`.
        learner: the learner's output on example images.
        teacher: the teacher's output on the same images.

    Raises:
        ValueError: if the two have different numbers of classes.
    """

    def __init__(self, settings: DistillSettings, learner: ModelOutput, teacher: ModelOutput) -> None:
        counts = learner.logits.shape[-1], teacher.logits.shape[-1]
        if counts[0] != counts[1]:
            raise InputError(
                f'the static teacher has {counts[1]} classes and the student {counts[0]}: '
                'give one that was trained on the same classes'
            )
        super().__init__(
            {
                name: _loss(name)(
                    learner, _teachers_own(name, teacher), **{k: v for k, v in arguments.items() if k != 'weight'}
                )
                for name, arguments in settings.items()
            }
        )
        self.weights = {name: arguments.get('weight', _loss(name).weight) for name, arguments in settings.items()}

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """The losses of a batch.

        Args:
            learner: its output for a batch of B images, from the tap of :func:`tap_learner`.
            teacher: the teacher's for the same images, from the tap of :func:`tap_teacher`.
            target: class indices, shape (B,), or class probabilities, shape (B, num_classes).

        Returns:
            Weighted scalar losses by name, whose sum is L_KD.

        Raises:
            ValueError: if a loss cannot use such a target or a single image, see :mod:`timm_gpd.losses`.
        """
        return {
            name: self.weights[name] * distiller(learner, _teachers_own(name, teacher), target)
            for name, distiller in self.items()
        }


def distill_settings(
    types: str,
    loss_args: Optional[Mapping[str, Any]] = None,
    temperature: Optional[float] = None,
    token_kind: str = 'soft',
    num_teachers: int = 1,
) -> DistillSettings:
    """Reads ``--kd-distill-type`` and ``--kd-loss-args``.

    Args:
        types: names of losses, separated by commas, as in ``'dkd,nd'``. Of several teachers a loss is from the mean of
            their probabilities, or from one of them, as in ``'dkd@1,nd@2'``.
        loss_args: hyperparameters by name (``beta``), or by loss and name (``dkd.beta``) where several losses have
            one of that name. Every loss has a ``weight``.
        temperature: temperature of ``kd`` and ``token`` where ``loss_args`` gives none.
        token_kind: what ``token`` compares with, ``'soft'`` or ``'hard'``.
        num_teachers: how many static teachers there are.

    Returns:
        Hyperparameters by loss and name: those that were given, checked.

    Raises:
        ValueError: if there is no such loss, teacher or hyperparameter, it is not clear whose it is, or its value is
            not one.
    """
    names = [name.strip() for name in types.split(',')]
    for name in names:
        _check_name(name, num_teachers)
    if len({(_loss(name), loss_and_teacher(name)[1]) for name in names}) < len(names):
        raise InputError(f'{types!r} names a distillation loss twice: name it once')
    if token_kind not in TOKEN_KINDS:
        raise InputError(f'the distillation token learns {" or ".join(TOKEN_KINDS)}, but not {token_kind!r}')
    settings: DistillSettings = {name: {} for name in names}
    for key, value in (loss_args or {}).items():
        prefix, _, argument = key.rpartition('.')
        owners = [name for name in names if argument in _defaults(name) and prefix in ('', name)]
        if len(owners) != 1:
            problem = f'could be of {" or ".join(owners)}' if owners else 'is none'
            known = ', '.join(f'{name}.{argument}' for name in names for argument in _defaults(name))
            raise InputError(f'loss argument {key!r} {problem}: choose of {known}')
        settings[owners[0]][argument] = check_hyperparameter(
            f'{owners[0]}.{argument}', value, _defaults(owners[0])[argument]
        )
    for name in names:
        if _loss(name) in (KD, Token) and temperature is not None:
            settings[name].setdefault('temperature', check_hyperparameter('temperature', temperature, 1.0))
        if _loss(name) is Token:
            settings[name]['kind'] = token_kind
    return settings


def loss_and_teacher(name: str) -> Tuple[str, int]:
    """What the name of a loss says: ``'dkd@2'`` is ``'dkd'`` from the second static teacher.

    Args:
        name: as it stands in settings.

    Returns:
        The loss, and the teacher's number from 1; 0 where it is from the only one, or from the mean of several.
    """
    loss, _, teacher = name.partition('@')
    return loss, int(teacher or 0)


def tap_learner(model: nn.Module, settings: DistillSettings) -> Tap:
    """A model that learns, tapped for what the losses need of it.

    Args:
        model: timm model; it is used as it is, not copied.
        settings: losses, from :func:`distill_settings`.

    Returns:
        The tap; its :meth:`Tap.verify` checks that it gives the model's own logits.

    Raises:
        ValueError: if the model does not offer what the losses need of a learner.
    """
    return Tap(model, _needs('learner_needs', settings))


def tap_teacher(model: nn.Module, settings: DistillSettings, number: int = 0) -> Tap:
    """A static teacher, tapped for what the losses need of it.

    Args:
        model: timm model; it is used as it is, not copied.
        settings: losses, from :func:`distill_settings`.
        number: which of several teachers it is, from 1; 0 for the only one.

    Returns:
        The tap; its :meth:`Tap.verify` checks that it gives the model's own logits.

    Raises:
        ValueError: if the model does not offer what the losses need of a teacher.
    """
    own = {name: values for name, values in settings.items() if loss_and_teacher(name)[1] == number}
    return Tap(model, _needs('teacher_needs', own))


def _needs(kind: str, settings: DistillSettings) -> Dict[str, str]:
    losses: Dict[str, List[str]] = {}
    for name in settings:
        for need in getattr(_loss(name), kind):
            losses.setdefault(need, []).append(name)
    return {need: ', '.join(names) for need, names in losses.items()}


def _check_name(name: str, num_teachers: int) -> None:
    loss, separator, number = name.partition('@')
    if loss not in _ALL:
        raise InputError(
            f'{name!r} is not a distillation loss: choose of {", ".join([*DISTILLERS, *ADVERSARIAL_DISTILLERS])}'
        )
    if separator and num_teachers == 1:
        raise InputError(f'{name} tells several static teachers apart, and there is one: it is {loss}')
    known = [str(index + 1) for index in range(num_teachers)]
    if separator and number not in known:
        raise InputError(
            f'{name} is of none of the {num_teachers} static teachers: they are numbers {", ".join(known)}'
        )
    if num_teachers > 1 and not separator and _ALL[loss].teacher_needs:
        raise InputError(
            f'{loss} compares features, of which {num_teachers} static teachers have no mean: say of which one, '
            f'as in {loss}@1'
        )


def _loss(name: str) -> Type[Distiller]:
    return _ALL[loss_and_teacher(name)[0]]


def _teachers_own(name: str, teacher: ModelOutput) -> ModelOutput:
    """What a loss compares with: the output of the only teacher, of one of several, or of their mean."""
    number = loss_and_teacher(name)[1]
    return teacher.each[number - 1] if number else teacher


def _defaults(name: str) -> Dict[str, Any]:
    return {'weight': _loss(name).weight, **_loss(name).defaults}
