"""The task loss of a run, through timm's factory."""

import argparse
from typing import Optional

import torch
import torch.nn as nn
from timm.loss import create_classification_loss, load_class_stats, resolve_class_weights

from ..errors import UsageError, usage_errors
from .data import uses_mixup

__all__ = ['create_criterion']


def create_criterion(args: argparse.Namespace, num_classes: Optional[int] = None) -> nn.Module:
    """The loss that ``--loss`` and its arguments describe.

    Args:
        args: arguments of ``train.py``.
        num_classes: the student's classes, to compare with those that have a weight; None compares nothing.

    Returns:
        A loss of logits (B, num_classes) and of what the training loader gives as targets: class indices (B,), or
        numbers in [0, 1] per class (B, num_classes) where labels are several or mixed.

    Raises:
        UsageError: if an argument does not fit the loss, or a file of weights cannot be read.
    """
    with usage_errors('check --loss and its arguments', ValueError, TypeError, OSError):
        stats = load_class_stats(args.class_stats)
        weights = {
            kind: resolve_class_weights(
                getattr(args, f'loss_{kind}'),
                kind,
                stats,
                power=args.loss_weight_power,
                beta=args.loss_weight_beta,
                max_weight=args.loss_weight_max,
            )
            for kind in ('pos_weight', 'class_weight')
        }
        counts, num_samples = stats if stats is not None and args.loss == 'db' else (None, None)
        criterion = create_classification_loss(
            args.loss,
            multi_label=args.task == 'multilabel',
            smoothing=args.smoothing,
            soft_targets=uses_mixup(args),
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
            asl_gamma_pos=args.asl_gamma_pos,
            asl_gamma_neg=args.asl_gamma_neg,
            asl_clip=args.asl_clip,
            asl_reduction=args.asl_reduction,
            poly_epsilon=args.poly_epsilon,
            poly_gamma=args.poly_gamma,
            poly_alpha=args.poly_alpha,
            jsd_splits=args.aug_splits,
            twoway_tp=args.twoway_tp,
            twoway_tn=args.twoway_tn,
            class_counts=counts,
            num_samples=num_samples,
            db_neg_scale=args.db_neg_scale,
            db_init_bias=args.db_init_bias,
            db_focal_gamma=args.db_focal_gamma,
            **weights,
        )
    per_class = [*weights.items(), ('counts', counts)]
    for name, values in per_class if num_classes else ():
        if isinstance(values, torch.Tensor) and len(values) != num_classes:
            raise UsageError(
                f'the {name} of the loss are of {len(values)} classes and the model has {num_classes}: '
                'check --class-stats, --loss-pos-weight and --loss-class-weight'
            )
    return criterion
