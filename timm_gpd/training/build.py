"""From arguments to the parts of a run: student, task loss, task, learning rate."""
import argparse
import logging
from typing import Any, Dict

import torch
import torch.nn as nn
from timm import create_model
from timm.data import resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, TrainingTask

from ..task.distillation import DistillationTask
from ..distillers import distill_settings
from ..errors import UsageError, usage_errors
from ..task.static_teacher import resolve_static_teacher
from ..task.gap_preserving import GapPreservingTask
from .data import uses_mixup

__all__ = ['create_student', 'create_task', 'resolve_lr']

_logger = logging.getLogger('train')


def create_student(args: argparse.Namespace) -> nn.Module:
    """The model that ``--model`` and its options name. Sets ``args.num_classes``.

    Raises:
        UsageError: if timm cannot create it, or it has no classifier.
    """
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else 3)
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else None
    with usage_errors('check --model, --model-kwargs, --pretrained and the checkpoint options', RuntimeError,
                      ValueError, TypeError, OSError, AssertionError, KeyError):
        student = create_model(
            args.model,
            pretrained=args.pretrained or bool(args.pretrained_path),
            pretrained_cfg_overlay=overlay,
            in_chans=in_chans,
            num_classes=args.num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            drop_block_rate=args.drop_block,
            global_pool=args.gp,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
            checkpoint_path=args.initial_checkpoint,
            **args.model_kwargs,
        )
    args.num_classes = getattr(student, 'num_classes', 0)
    if not args.num_classes:
        raise UsageError(f'{args.model} has no classifier: set --num-classes')
    if args.grad_checkpointing:
        student.set_grad_checkpointing(enable=True)
    _logger.info(f'Model {args.model} created, param count:{sum(p.numel() for p in student.parameters())}')
    return student


def resolve_input(args: argparse.Namespace, student: nn.Module) -> Dict[str, Any]:
    """Input size, normalisation and resizing, from arguments and model; the student's config then says the same."""
    with usage_errors('check --input-size, --mean and --std'):
        data_config = resolve_data_config(vars(args), model=student)
    student.pretrained_cfg.update(
        {key: data_config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')},
        num_classes=args.num_classes)
    return data_config


def _create_criterion(args: argparse.Namespace) -> nn.Module:
    if args.bce_loss:
        return BinaryCrossEntropy(
            smoothing=0. if uses_mixup(args) else args.smoothing,
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
        )
    if uses_mixup(args):
        return SoftTargetCrossEntropy()  # mixup has smoothed the targets
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def create_task(args: argparse.Namespace, student: nn.Module, device: torch.device) -> TrainingTask:
    """What the run trains: gap preserving with ``--gpd``, else distillation or classification.

    Raises:
        UsageError: if the student cannot be widened, or the static teacher does not fit it.
    """
    common = dict(criterion=_create_criterion(args).to(device), device=device)
    distillation = dict(
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
        teacher = resolve_static_teacher(
            args.kd_model_name, student, device, path=args.kd_model_path) if args.kd_model_name else None
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


def resolve_lr(args: argparse.Namespace) -> None:
    """Sets ``args.lr`` from ``--lr-base`` and the batch size where it was not given, as timm does."""
    if args.lr:
        return
    batch_size = args.batch_size * args.grad_accum_steps
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    share = batch_size / args.lr_base_size
    args.lr = args.lr_base * (share ** 0.5 if scale == 'sqrt' else share)
    _logger.info(f'Learning rate ({args.lr}) calculated from base learning rate ({args.lr_base}) and effective '
                 f'global batch size ({batch_size:g}) with {scale} scaling.')
