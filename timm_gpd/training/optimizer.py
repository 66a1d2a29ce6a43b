"""The optimizer of a run, and the learning rate that it starts from."""

import argparse
import logging
from typing import Optional, cast

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.task import TrainingTask

from ..errors import UsageError

__all__ = ['create_optimizer', 'resolve_lr']

_logger = logging.getLogger('train')


def create_optimizer(
    args: argparse.Namespace,
    task: TrainingTask,
    batch_size: Optional[float] = None,
) -> torch.optim.Optimizer:
    """timm's optimizer over what a task trains.

    Args:
        args: arguments of ``train.py``.
        task: the task.
        batch_size: images of an update, see :func:`resolve_lr`.

    Returns:
        The optimizer.

    Raises:
        UsageError: if it needs second derivatives.
    """
    trained = cast(nn.Module, task.get_trainable_module())
    settings = {**optimizer_kwargs(cfg=args), 'lr': resolve_lr(args, batch_size), **args.opt_kwargs}
    optimizer = create_optimizer_v2(trained, **settings)
    if getattr(optimizer, 'is_second_order', False):
        raise UsageError(
            f'--opt {args.opt} needs second derivatives, which a training step does not keep: choose another --opt'
        )
    return optimizer


def resolve_lr(args: argparse.Namespace, batch_size: Optional[float] = None) -> float:
    """``--lr``, or where it was not given what ``--lr-base`` and the batch size make of it, as in timm.

    Args:
        args: arguments of ``train.py``.
        batch_size: images of an update, of all processes; the mean, where batches differ (default: those of one
            process).

    Returns:
        The learning rate that the schedule starts from.
    """
    if args.lr:
        return args.lr
    if batch_size is None:
        batch_size = args.batch_size * args.grad_accum_steps
    growth = args.lr_base_scale or ('sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    share = batch_size / args.lr_base_size
    lr = args.lr_base * (share**0.5 if growth == 'sqrt' else share)
    _logger.info(
        f'Learning rate ({lr}) calculated from base learning rate ({args.lr_base}) and effective '
        f'global batch size ({batch_size:g}) with {growth} scaling.'
    )
    return lr
