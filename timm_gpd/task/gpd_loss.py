"""What the student learns from its dynamic teacher, and how much of the loss that is."""

import math
from typing import Any, Callable, Dict, Mapping, Optional

import torch

from ..errors import InputError, check_number
from ..losses import ADVERSARIAL_LOSSES, GPD_LOSSES, needs_target
from ..losses.adversarial import VIEWS_OF
from ..losses.hyperparameters import check_hyperparameter, loss_defaults

__all__ = ['OF_ONE_LOGIT', 'WEIGHT_SCHEDULES', 'GpdLoss', 'WeightSchedule']

OF_ONE_LOGIT = ('mse', 'l1')  # losses that compare each logit by itself, and none of their softmax
WEIGHT_SCHEDULES = ('constant', 'linear', 'cosine')


class GpdLoss:
    """A loss of two logits, with its hyperparameters.

    Args:
        name: a key of ``timm_gpd.losses.GPD_LOSSES``, or with an adversary of ``ADVERSARIAL_LOSSES``.
        hyperparameters: those that differ from its defaults.
        num_classes: of the student, where that is known.

    Raises:
        InputError: if there is no such loss or hyperparameter, or it is always 0 for so many classes.
    """

    def __init__(
        self,
        name: str,
        hyperparameters: Optional[Mapping[str, Any]] = None,
        num_classes: Optional[int] = None,
    ) -> None:
        known_losses: Dict[str, Callable[..., torch.Tensor]] = {**GPD_LOSSES, **ADVERSARIAL_LOSSES}
        if name not in known_losses:
            raise InputError(f'gpd_loss must be one of {", ".join(known_losses)}, but is {name!r}')
        self.name, self.function, self.views = name, known_losses[name], VIEWS_OF.get(name, ())
        self.needs_target = needs_target(self.function)
        self._check_classes(num_classes)
        self.hyperparameters: Dict[str, Any] = {}
        defaults = loss_defaults(self.function)
        for key, value in (hyperparameters or {}).items():
            if key not in defaults:
                known = f'choose of {", ".join(defaults)}' if defaults else 'it has none'
                raise InputError(f'{key} is no hyperparameter of gpd_loss {name}: {known}')
            self.hyperparameters[key] = check_hyperparameter(f'{name}.{key}', value, defaults[key])

    def __call__(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        target: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """The loss.

        Args:
            student_logits: shape (B, num_classes).
            teacher_logits: shape (B, num_classes). Gradients do not flow into them.
            target: class indices, shape (B,), or class probabilities, shape (B, num_classes); what some losses need.

        Returns:
            A scalar.

        Raises:
            ValueError: if the loss needs a target and cannot use this one, there are too few classes for it, or it
                compares views of images.
        """
        if self.views:
            raise InputError(
                f'gpd_loss {self.name} compares images that an attack has perturbed, and there is none: '
                'call setup_adversary(task, attack)'
            )
        self._check_classes(student_logits.shape[-1])
        if not self.needs_target:
            return self.function(student_logits, teacher_logits, **self.hyperparameters)
        if target is None:
            raise ValueError(f'gpd_loss {self.name} needs the target as its third argument')
        return self.function(student_logits, teacher_logits, target, **self.hyperparameters)

    def of_step(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
        target: torch.Tensor,
    ) -> torch.Tensor:
        """The loss of what a step gave.

        Args:
            student: from :meth:`StepLoss.forward`.
            teacher: the same of the dynamic teacher.
            target: see :meth:`__call__`.

        Returns:
            A scalar.

        Raises:
            ValueError: see :meth:`__call__`.
        """
        if not self.views or 'output_perturbed' not in student:
            return self(student['output'], teacher['output'], target)
        views = [{view: result[f'output_{view}'] for view in self.views} for result in (student, teacher)]
        return self.function(*views, *([target] if self.needs_target else []), **self.hyperparameters)

    def _check_classes(self, num_classes: Optional[int]) -> None:
        if num_classes == 1 and self.name not in OF_ONE_LOGIT:
            raise InputError(
                f'gpd_loss {self.name} compares probabilities of classes, and the student has one, whose is always 1: '
                f'take {" or ".join(OF_ONE_LOGIT)}'
            )

    def __repr__(self) -> str:
        return ', '.join([self.name, *(f'{key}={value}' for key, value in self.hyperparameters.items())])


class WeightSchedule:
    """A weight that goes from one value to another while training goes on.

    Args:
        kind: ``'constant'`` keeps the first, ``'linear'`` goes in a line, ``'cosine'`` in half a wave.
        start: the first value.
        end: the last.

    Raises:
        InputError: if there is no such kind, or a value is no number.
    """

    def __init__(self, kind: str, start: float, end: float) -> None:
        if kind not in WEIGHT_SCHEDULES:
            raise InputError(f'gpd_weight_schedule must be one of {", ".join(WEIGHT_SCHEDULES)}, but is {kind!r}')
        check_number('gpd_weight', start)
        check_number('gpd_weight_end', end)
        self.kind, self.start, self.end = kind, start, end

    def at(self, progress: float) -> float:
        """The weight at some point.

        Args:
            progress: the share of training that is done, from 0 to 1.

        Returns:
            The weight, ``start`` at 0.
        """
        if self.kind == 'constant':
            return self.start
        done = progress if self.kind == 'linear' else (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * done
