"""The schedule of a run's learning rate."""

import argparse
from typing import Any, Dict, Sequence, Tuple

import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..errors import UsageError, usage_errors

__all__ = ['count_epochs', 'create_schedule', 'mean_lr', 'restore_schedule', 'schedule_state']

COUNTERS = ('best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch')  # of ReduceLROnPlateau


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
    scheduler, num_epochs = _create(args, optimizer, updates_per_epoch, lower_is_better)
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


def count_epochs(args: argparse.Namespace, updates_per_epoch: int) -> int:
    """The number of epochs at whose end a schedule ends.

    Args:
        args: arguments of ``train.py``.
        updates_per_epoch: updates of the optimizer in an epoch.

    Raises:
        UsageError: if the arguments make no schedule.
    """
    return _create(args, torch.optim.SGD([torch.zeros(1)]), updates_per_epoch)[1]


def _create(
    args: argparse.Namespace,
    optimizer: torch.optim.Optimizer,
    updates_per_epoch: int,
    lower_is_better: bool = False,
) -> Tuple[Any, int]:
    with usage_errors(f'check --sched {args.sched} and its arguments', ValueError, AssertionError, ZeroDivisionError):
        return create_scheduler_v2(
            optimizer, **scheduler_kwargs(args, decreasing_metric=lower_is_better), updates_per_epoch=updates_per_epoch
        )


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate of an optimizer's parameter groups."""
    rates = [group['lr'] for group in optimizer.param_groups]
    return sum(rates) / len(rates)


def schedule_state(scheduler: Any) -> Dict[str, Any]:
    """What a schedule has seen that the epoch does not tell: of ``plateau``, of which timm saves only a part.

    Args:
        scheduler: timm's, or None.

    Returns:
        Numbers by name; none of the schedules that follow from the epoch or update alone.
    """
    watched = getattr(scheduler, 'lr_scheduler', None)
    if not isinstance(watched, ReduceLROnPlateau):
        return {}
    return {**{name: getattr(watched, name) for name in COUNTERS}, 'restore_lr': scheduler.restore_lr}


def restore_schedule(
    scheduler: Any, optimizer: torch.optim.Optimizer, rates: Sequence[float], state: Dict[str, Any]
) -> None:
    """Takes a schedule and the learning rates to where a checkpoint was.

    Args:
        scheduler: of :func:`create_schedule`, changed in place.
        optimizer: whose learning rates it sets, changed in place.
        rates: of its parameter groups; none where they are not known.
        state: what :func:`schedule_state` told.
    """
    for group, rate in zip(optimizer.param_groups, rates):
        group['lr'] = rate
    watched = getattr(scheduler, 'lr_scheduler', None)
    if state and isinstance(watched, ReduceLROnPlateau):
        scheduler.restore_lr = state['restore_lr']
        for name in COUNTERS:
            setattr(watched, name, state[name])
