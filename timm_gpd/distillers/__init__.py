"""Distillation from a static teacher: losses with what they need to compare two timm models of any kind.

A task states its losses once, taps the models, and builds one :class:`Distillers` per learner::

    settings = distill_settings('dkd,nd', {'beta': 2})
    student_tap, teacher_tap = tap_learner(student, settings), tap_teacher(teacher, settings)
    distillers = Distillers(settings, example_output(student_tap, x), example_output(teacher_tap, x))

    output = student_tap(x)                                        # logits and features in one pass
    terms = distillers(output, teacher_tap(x), target)             # {'dkd': ..., 'nd': ...}
"""

from typing import Any, Dict, List, Mapping, Optional, Type

import torch
import torch.nn as nn

from ..errors import InputError
from ..losses.hyperparameters import check_hyperparameter
from .base import Distiller
from .embedding import ND, RSD, Feature
from .feature_tap import ModelOutput, Tap, evaluation_mode, example_output
from .ofa import OFA
from .plain import AT, DIST, DKD, KD, NKD, RKD, RLD, WTTM
from .reviewkd import ReviewKD

__all__ = [
    'DISTILLERS',
    'DistillSettings',
    'Distiller',
    'Distillers',
    'ModelOutput',
    'Tap',
    'distill_settings',
    'evaluation_mode',
    'example_output',
    'tap_learner',
    'tap_teacher',
]

# Under the names of ``--kd-distill-type``; ``logit`` and ``feature`` are timm's.
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
    'at': AT,
}

# Hyperparameters of every loss to use, by its name.
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
                name: DISTILLERS[name](learner, teacher, **{k: v for k, v in arguments.items() if k != 'weight'})
                for name, arguments in settings.items()
            }
        )
        self.weights = {name: arguments.get('weight', DISTILLERS[name].weight) for name, arguments in settings.items()}

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
        return {name: self.weights[name] * distiller(learner, teacher, target) for name, distiller in self.items()}


def distill_settings(
    types: str,
    loss_args: Optional[Mapping[str, Any]] = None,
    temperature: Optional[float] = None,
) -> DistillSettings:
    """Reads ``--kd-distill-type`` and ``--kd-loss-args``.

    Args:
        types: names of losses, separated by commas, as in ``'dkd,nd'``.
        loss_args: hyperparameters by name (``beta``), or by loss and name (``dkd.beta``) where several losses have
            one of that name. Every loss has a ``weight``.
        temperature: temperature of ``kd`` where ``loss_args`` gives none.

    Returns:
        Hyperparameters by loss and name: those that were given, checked.

    Raises:
        ValueError: if there is no such loss or hyperparameter, it is not clear whose it is, or its value is not one.
    """
    names = [name.strip() for name in types.split(',')]
    for name in names:
        if name not in DISTILLERS:
            raise InputError(f'{name!r} is not a distillation loss: choose of {", ".join(DISTILLERS)}')
    if len({DISTILLERS[name] for name in names}) < len(names):
        raise InputError(f'{types!r} names a distillation loss twice: name it once')
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
        if DISTILLERS[name] is KD and temperature is not None:
            settings[name].setdefault('temperature', check_hyperparameter('temperature', temperature, 1.0))
    return settings


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


def tap_teacher(model: nn.Module, settings: DistillSettings) -> Tap:
    """A static teacher, tapped for what the losses need of it.

    Args:
        model: timm model; it is used as it is, not copied.
        settings: losses, from :func:`distill_settings`.

    Returns:
        The tap; its :meth:`Tap.verify` checks that it gives the model's own logits.

    Raises:
        ValueError: if the model does not offer what the losses need of a teacher.
    """
    return Tap(model, _needs('teacher_needs', settings))


def _needs(kind: str, settings: DistillSettings) -> Dict[str, str]:
    losses: Dict[str, List[str]] = {}
    for name in settings:
        for need in getattr(DISTILLERS[name], kind):
            losses.setdefault(need, []).append(name)
    return {need: ', '.join(names) for need, names in losses.items()}


def _defaults(name: str) -> Dict[str, Any]:
    return {'weight': DISTILLERS[name].weight, **DISTILLERS[name].defaults}
