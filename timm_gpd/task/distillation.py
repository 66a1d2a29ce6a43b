"""Distillation from a static teacher alone, with the losses of the literature, as one of timm's training tasks."""

import logging
from typing import Any, Dict, Mapping, Optional

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from ..distillers import distill_settings
from ..expansion.images import accepted_input_shape, input_shape
from ..expansion.student import unwrap_student
from .base import BaseTask
from .given_teacher import GivenTeacher, count_static_teachers, create_static_teacher
from .learners import Learners, StudentLearner, example_batch
from .reused_classifier import with_reused_classifier
from .step_loss import StepLoss, loss_weights

__all__ = ['DistillationTask']

_logger = logging.getLogger(__name__)


class DistillationTask(BaseTask):
    """Trains a student with a static teacher: ``a * L_task + b * L_KD``.

    What timm's distillation tasks do, for the losses of :mod:`timm_gpd.losses`, several at once. A checkpoint's
    ``state_dict`` is the plain student's, and its ``task_state`` the distillers, which train with it.

    Args:
        student: timm model with a classifier, without the wrappers of ``torch.compile`` and DDP, which are for the
            task.
        static_teacher: timm model name (created with pretrained weights), timm DistillationTeacher or module, or a
            :class:`timm_gpd.StaticTeacherConfig` of one, which tells how to run it; or a list of several. A module is
            used as it is, not copied: it is moved to ``device`` and frozen. A :class:`timm_gpd.EmaTeacherConfig` stands
            for a moving average of the student, alone or in the list.
        criterion: task loss of logits and targets (default: cross-entropy).
        distill_type: names of losses, separated by commas, keys of ``timm_gpd.distillers.DISTILLERS``. Of several
            teachers ``dkd`` is from the mean of their probabilities, and ``dkd@2`` from the second.
        distill_args: their hyperparameters, see :func:`timm_gpd.distillers.distill_settings`.
        distill_loss_weight: weight b of L_KD.
        task_loss_weight: weight a of the task loss. Given alone, b = 1 - a.
        temperature: temperature of the losses ``kd`` or ``logit``, and ``token``.
        device: device of the task.
        dtype: dtype of the task.
        verbose: log what was built.
        token_distill_type: what the loss ``token`` compares with, ``'soft'`` or ``'hard'``.
        student_feature_dim: width that the student's embedding must have, if any.
        teacher_feature_dim: the same of the static teacher's.

    Raises:
        ValueError: if a loss does not exist, the static teacher has other classes than the student, or one of the two
            does not offer the features that a loss needs.
    """

    def __init__(
        self,
        student: nn.Module,
        static_teacher: GivenTeacher,
        criterion: Optional[nn.Module] = None,
        distill_type: str = 'logit',
        distill_args: Optional[Mapping[str, Any]] = None,
        distill_loss_weight: Optional[float] = None,
        task_loss_weight: Optional[float] = None,
        temperature: float = 4.0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        verbose: bool = True,
        token_distill_type: str = 'soft',
        student_feature_dim: Optional[int] = None,
        teacher_feature_dim: Optional[int] = None,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        student = unwrap_student(student)
        settings = distill_settings(
            distill_type, distill_args, temperature, token_distill_type, count_static_teachers(static_teacher)
        )
        self.settings = dict(distillers=settings)
        self.task_loss_weight, self.distill_loss_weight = loss_weights(task_loss_weight, distill_loss_weight)
        self.criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
        self.static_teacher = create_static_teacher(static_teacher, student, settings, self.device, self.dtype)
        with_reused_classifier(student, self.static_teacher, settings, in_place=True)
        shape = accepted_input_shape(student) or input_shape(student)
        example = example_batch(student, self.static_teacher, settings, shape, student_feature_dim, teacher_feature_dim)
        self.trainable_module = StudentLearner(
            student, settings, StepLoss(self.criterion, self.task_loss_weight, self.distill_loss_weight)
        )
        self.trainable_module.add_distillers(settings, self.static_teacher, *example)
        if verbose:
            _logger.info(
                f'DistillationTask: task_loss_weight={self.task_loss_weight}, '
                f'distill_loss_weight={self.distill_loss_weight}, {settings}'
            )

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Forward pass and loss.

        Args:
            input: images, shape (B, in_chans, H, W), normalised for the student.
            target: class indices, shape (B,), or whatever else criterion and losses take.

        Returns:
            ``loss``; ``output``, the student's logits, shape (B, num_classes); ``task_loss``, and ``kd/<loss>`` for
            every distillation loss.
        """
        return self.trainable_module(input, target, self.static_teacher(input, in_views=True))

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """What is validated: the student, without distillers.

        Args:
            module: take it from this module instead of from what is trained.
            ema: take the averaged student.

        Returns:
            The student; None for the averaged one where there is none.
        """
        model = super().get_eval_model(module=module, ema=ema)
        trained = None if model is None else unwrap_model(model)
        return trained.model if isinstance(trained, Learners) else model
