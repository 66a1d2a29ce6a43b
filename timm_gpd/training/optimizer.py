"""The optimizer of a run, and the learning rate that it starts from."""

import argparse
import logging
from typing import Optional, cast

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from timm.task import TrainingTask

from ..errors import UsageError, usage_errors

__all__ = ['check_optimizer', 'create_optimizer', 'resolve_lr']

_logger = logging.getLogger('train')


def check_optimizer(args: argparse.Namespace) -> None:
    """Checks the arguments of the optimizer on a layer of its own, before anything else is created.

    Args:
        args: arguments of ``train.py``.

    Raises:
        UsageError: if the optimizer does not take them, is not installed, or needs second derivatives.
    """
    info = get_optimizer_info(args.opt.lower().split('_')[-1])
    if args.opt_betas and not info.has_betas:
        _logger.warning(f'--opt-betas does nothing: --opt {args.opt} has none')
    elif args.opt_betas and len(args.opt_betas) != info.num_betas:
        raise UsageError(f'--opt {args.opt} has {info.num_betas} betas: --opt-betas gives {len(args.opt_betas)}')
    settings = {**optimizer_kwargs(cfg=args), 'lr': args.lr or args.lr_base, **args.opt_kwargs, 'layer_decay': None}
    kinds = (TypeError, ValueError, AssertionError, LookupError, RuntimeError, ImportError)
    with usage_errors(f'check --opt {args.opt}, --opt-betas and --opt-kwargs', *kinds):
        optimizer = create_optimizer_v2(nn.Linear(2, 2), **settings)
    if getattr(optimizer, 'is_second_order', False):
        raise UsageError(
            f'--opt {args.opt} needs second derivatives, which a training step does not keep: choose another --opt'
        )


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
    """
    trained = cast(nn.Module, task.get_trainable_module())
    settings = {**optimizer_kwargs(cfg=args), 'lr': resolve_lr(args, batch_size), **args.opt_kwargs}
    return create_optimizer_v2(trained, **settings)


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
