"""The task of a run: what is trained, by which losses."""

import argparse
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, DistillationTeacher, TrainingTask
from timm.utils import unwrap_model

from ..distillers import distill_settings
from ..errors import UsageError, usage_errors
from ..task import DistillationTask, GapPreservingTask
from ..task.base import BaseTask
from ..task.static_teacher import resolve_static_teacher
from .data import uses_mixup

__all__ = ['create_task', 'get_student', 'get_validation_models']


def create_task(args: argparse.Namespace, student: nn.Module, device: torch.device) -> TrainingTask:
    """What the run trains: gap preserving with ``--gpd``, else distillation or classification.

    Args:
        args: arguments of ``train.py``.
        student: timm model with a classifier, on ``device``.
        device: device of the task.

    Returns:
        One of timm's training tasks. Its static teacher, where there is one, is frozen.

    Raises:
        UsageError: if the student cannot be widened, or the static teacher does not fit it.
    """
    common: Dict[str, Any] = dict(criterion=_create_criterion(args).to(device), device=device)
    distillation: Dict[str, Any] = dict(
        distill_type=args.kd_distill_type,
        distill_args=args.kd_loss_args,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
        temperature=args.kd_temperature,
    )
    with usage_errors('check --kd-distill-type and --kd-loss-args'):
        distill_settings(args.kd_distill_type, args.kd_loss_args, args.kd_temperature)
    if args.kd_model_path and not args.kd_model_name:
        raise UsageError('--kd-model-path needs --kd-model-name, the architecture of that checkpoint')
    with usage_errors('check --kd-model-name, --kd-model-path and --kd-distill-type' if args.kd_model_name else ''):
        teacher: Optional[DistillationTeacher] = (
            resolve_static_teacher(args.kd_model_name, student, device, path=args.kd_model_path)
            if args.kd_model_name
            else None
        )
        if args.gpd:
            return GapPreservingTask(
                student,
                static_teacher=teacher,
                ratio=args.gpd_ratio,
                num_branches=args.gpd_branches,
                noise=args.gpd_noise,
                scale=args.gpd_scale,
                gpd_loss=args.gpd_loss,
                gpd_weight=args.gpd_weight,
                **distillation,
                **common,
            )
        if teacher is not None:
            return DistillationTask(student, teacher, **distillation, **common)
    return ClassificationTask(student, **common)


def _create_criterion(args: argparse.Namespace) -> nn.Module:
    if args.bce_loss:
        return BinaryCrossEntropy(
            smoothing=0.0 if uses_mixup(args) else args.smoothing,
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
        )
    if uses_mixup(args):
        return SoftTargetCrossEntropy()  # mixup has smoothed the targets
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


# timm's own tasks lack the two methods by which those of this package answer these questions.


def get_student(task: TrainingTask, ema: bool = False) -> nn.Module:
    """The student that a task trains, as a plain model.

    Args:
        task: one of this package's tasks or of timm's.
        ema: the averaged student.
    """
    if isinstance(task, BaseTask):
        return task.get_student(ema=ema)
    return unwrap_model(task.get_eval_model(ema=ema))


def get_validation_models(task: TrainingTask, ema: bool = False) -> Dict[str, nn.Module]:
    """The models that tell how far a task is.

    Args:
        task: one of this package's tasks or of timm's.
        ema: the averaged models.

    Returns:
        Plain models by the prefix of their metrics: ``''`` the student, ``'teacher_'`` the dynamic teacher.
    """
    return task.get_validation_models(ema=ema) if isinstance(task, BaseTask) else {'': get_student(task, ema)}
