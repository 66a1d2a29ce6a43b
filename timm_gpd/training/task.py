"""The task of a run: what is trained, by which losses."""

import argparse
from copy import deepcopy
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from timm.layers import SplitBatchNorm2d
from timm.task import ClassificationTask, MultiLabelClassificationTask, TrainingTask
from timm.utils import unwrap_model

from ..distillers import distill_settings, loss_and_teacher
from ..errors import UsageError, usage_errors
from ..task import DistillationTask, GapPreservingTask, create_attack, setup_adversary
from ..task.gap_control import GapControl, GapTarget, Switch
from ..task.gpd_loss import OF_ONE_LOGIT, GpdLoss
from ..task.stored_teacher import AnyStaticTeacher
from .criterion import create_criterion
from .static_teachers import read_static_teachers
from .student import recorded_classes

__all__ = ['check_task', 'create_task', 'get_student', 'get_teachers', 'get_validation_models']

# Losses that ask nothing of classes: the others compare probabilities of which only one class can be right.
MULTILABEL_GPD_LOSSES = OF_ONE_LOGIT
MULTILABEL_DISTILLERS = ('feature', 'embed', 'reviewkd', 'rkd', 'at')


def check_task(args: argparse.Namespace) -> None:
    """Checks what the arguments say of the losses, before anything is created.

    Args:
        args: arguments of ``train.py``.

    Raises:
        UsageError: if an argument of a loss is none, or the losses do not fit the targets.
    """
    with usage_errors('check --gpd-loss and --gpd-loss-args'):
        GpdLoss(args.gpd_loss, args.gpd_loss_args)
    teachers = read_static_teachers(args)
    with usage_errors('check --kd-distill-type and --kd-loss-args'):
        distillers = distill_settings(
            args.kd_distill_type,
            args.kd_loss_args,
            args.kd_temperature,
            args.kd_token_distill_type,
            len(teachers) or 1,
        )
    if args.kd_token_distill_type == 'hard' and teachers and 'token' not in map(_loss_of, distillers):
        raise UsageError('--kd-token-distill-type hard is of the loss token: add it to --kd-distill-type')
    create_criterion(args)
    if args.gpd and args.split_bn:
        raise UsageError(
            '--split-bn computes parts of a batch apart, and a dynamic teacher is made for batches of any size: '
            'leave out --gpd or --split-bn'
        )
    if args.task != 'multilabel':
        if args.target_format == 'multihot':
            raise UsageError('--target-format multihot needs --task multilabel')
        return
    reason = 'compares probabilities of classes that exclude each other, and with --task multilabel they do not: choose'
    if args.gpd and args.gpd_method != 'netaug' and args.gpd_loss not in MULTILABEL_GPD_LOSSES:
        raise UsageError(f'--gpd-loss {args.gpd_loss} {reason} {" or ".join(MULTILABEL_GPD_LOSSES)}')
    for name in distillers if teachers else ():
        if _loss_of(name) not in MULTILABEL_DISTILLERS:
            raise UsageError(f'--kd-distill-type {name} {reason} of {", ".join(MULTILABEL_DISTILLERS)}')
    if len(teachers) - args.ema_teacher > 1:
        raise UsageError(
            'several of --kd-model-name are validated by the mean of their probabilities of classes that exclude each '
            'other, and with --task multilabel they do not: give one'
        )


def _loss_of(name: str) -> str:
    return loss_and_teacher(name)[0]


def create_task(
    args: argparse.Namespace,
    student: nn.Module,
    device: torch.device,
    is_joint: Optional[bool] = None,
    static_teacher: Optional[AnyStaticTeacher] = None,
) -> TrainingTask:
    """What the run trains: gap preserving with ``--gpd``, else distillation or classification.

    Args:
        args: arguments of ``train.py``, checked by :func:`check_task`.
        student: timm model with a classifier, on ``device``. A static teacher gets its dtype.
        device: device of the task.
        is_joint: whether the student trains with a dynamic teacher (default: with ``--gpd``).
        static_teacher: that of another task, instead of the one that the arguments name.

    Returns:
        One of timm's training tasks. Its static teacher, where there is one, is frozen. With ``--adv`` it trains on
        perturbed images.

    Raises:
        UsageError: if the student cannot be widened, or the static teacher does not fit it.
    """
    task = _create_task(args, student, device, is_joint, static_teacher)
    if args.adv:
        setup_adversary(task, create_attack(student, args.adv, args.adv_eps, args.adv_step, args.adv_steps))
    return task


def _create_task(
    args: argparse.Namespace,
    student: nn.Module,
    device: torch.device,
    is_joint: Optional[bool],
    static_teacher: Optional[AnyStaticTeacher],
) -> TrainingTask:
    criterion = create_criterion(args, recorded_classes(student)).to(device)
    dtype = next(student.parameters()).dtype
    common: Dict[str, Any] = dict(criterion=criterion, device=device, dtype=dtype)
    distillation: Dict[str, Any] = dict(
        distill_type=args.kd_distill_type,
        distill_args=args.kd_loss_args,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
        temperature=args.kd_temperature,
        token_distill_type=args.kd_token_distill_type,
        student_feature_dim=args.kd_student_feature_dim,
        teacher_feature_dim=args.kd_teacher_feature_dim,
    )
    static: Any = static_teacher if static_teacher is not None else read_static_teachers(args) or None
    with usage_errors(_what_to_check(args)):
        if args.gpd if is_joint is None else is_joint:
            return GapPreservingTask(
                student,
                static_teacher=static,
                ratio=args.gpd_ratio,
                num_branches=args.gpd_branches,
                noise=args.gpd_noise,
                scale=args.gpd_scale,
                share_weight=args.gpd_share_weight,
                gpd_loss=args.gpd_loss,
                gpd_loss_args=args.gpd_loss_args,
                gpd_weight=args.gpd_weight,
                gpd_weight_schedule=args.gpd_weight_schedule,
                gpd_weight_end=args.gpd_weight_end,
                method=args.gpd_method,
                between=args.gpd_between,
                seed=args.seed,
                gap_control=_create_gap_control(args),
                **distillation,
                **common,
            )
        if static is not None:
            return DistillationTask(student, static, **distillation, **common)
    if args.task == 'multilabel':
        return MultiLabelClassificationTask(student, threshold=args.multilabel_threshold, **common)
    return ClassificationTask(student, **common)


def _what_to_check(args: argparse.Namespace) -> str:
    if args.kd_model_name:
        return 'check --kd-model-name, --kd-model-path and --kd-distill-type'
    return 'check --ema-teacher and --kd-distill-type' if args.ema_teacher else ''


def _create_gap_control(args: argparse.Namespace) -> Optional[GapControl]:
    if args.gpd_switch:
        return Switch()
    return None if args.gpd_gap_target is None else GapTarget(args.gpd_gap_target, args.gpd_gap_scales)


# timm's own tasks lack the methods by which those of this package answer these questions.


def get_student(task: TrainingTask, ema: bool = False) -> nn.Module:
    """The student that a task trains, as a plain model.

    Args:
        task: one of this package's tasks or of timm's.
        ema: the averaged student.
    """
    ask: Any = getattr(task, 'get_student', None)
    student = ask(ema=ema) if ask is not None else unwrap_model(task.get_eval_model(ema=ema))
    if not any(isinstance(module, SplitBatchNorm2d) for module in student.modules()):
        return student
    student = deepcopy(student).eval()
    for module in student.modules():
        if isinstance(module, SplitBatchNorm2d):
            del module.aux_bn  # of training alone; without it the tensors are those of a model that was not split
    return student


def get_teachers(task: TrainingTask) -> Dict[str, nn.Module]:
    """The teachers beside the dynamic one.

    Args:
        task: one of this package's tasks or of timm's.

    Returns:
        Teachers by the prefix of their metrics: ``'static_'`` the static one, ``'ema_teacher_'`` the EMA teacher.
    """
    ask: Any = getattr(task, 'get_teachers', None)
    if ask is not None:
        return ask()
    teacher = getattr(task, 'teacher', None)  # of timm's distillation tasks
    return {} if teacher is None else {'static_': teacher}


def get_validation_models(task: TrainingTask, ema: bool = False) -> Dict[str, nn.Module]:
    """The models that tell how far a task is.

    Args:
        task: one of this package's tasks or of timm's.
        ema: the averaged models.

    Returns:
        Plain models by the prefix of their metrics: ``''`` the student, ``'teacher_'`` the dynamic teacher.
    """
    ask: Any = getattr(task, 'get_validation_models', None)
    return ask(ema=ema) if ask is not None else {'': get_student(task, ema)}
