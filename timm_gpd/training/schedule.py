"""The schedule of a run's learning rate."""

import argparse
from typing import Any, Sequence, Tuple

import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from ..errors import UsageError, usage_errors

__all__ = ['create_schedule', 'mean_lr', 'set_learning_rates']


def create_schedule(
    args: argparse.Namespace,
    optimizer: torch.optim.Optimizer,
    updates_per_epoch: int,
    start_epoch: int,
    lower_is_better: bool,
) -> Tuple[Any, int]:
    """timm's scheduler, taken to the epoch that the run starts with.

    Args:
        args: arguments of ``train.py``.
        optimizer: whose learning rates it sets.
        updates_per_epoch: updates of the optimizer in an epoch.
        start_epoch: index of the first epoch, from 0.
        lower_is_better: of the metric that the schedule ``plateau`` watches.

    Returns:
        The scheduler, None for ``--sched none``; and the number of epochs at whose end the run ends.

    Raises:
        UsageError: if the arguments make no schedule, or the run would stop behind its end.
    """
    with usage_errors(f'check --sched {args.sched} and its arguments', ValueError, AssertionError, ZeroDivisionError):
        scheduler, num_epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args, decreasing_metric=lower_is_better), updates_per_epoch=updates_per_epoch
        )
    if args.stop_epoch is not None and args.stop_epoch > num_epochs:
        raise UsageError(f'--stop-epoch {args.stop_epoch} is behind the {num_epochs} epochs of the schedule: lower it')
    late = [epoch for epoch in args.save_epochs if epoch > num_epochs]
    if late:
        raise UsageError(f'--save-epochs {late[0]} is behind the {num_epochs} epochs of the schedule: lower it')
    if scheduler is None:
        return None, num_epochs
    if start_epoch > 0 and args.sched_on_updates:
        scheduler.step_update(start_epoch * updates_per_epoch)
    elif start_epoch > 0:
        scheduler.step(start_epoch)
    return scheduler, num_epochs


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate of an optimizer's parameter groups."""
    rates = [group['lr'] for group in optimizer.param_groups]
    return sum(rates) / len(rates)


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Sets the learning rates of an optimizer's parameter groups, in place; as many as there are."""
    for group, rate in zip(optimizer.param_groups, rates):
        group['lr'] = rate
