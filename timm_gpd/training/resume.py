"""Continuing a run from one of its checkpoints."""

import argparse
import logging
import os
from typing import Callable

from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint

from ..command_line import flag_of
from ..errors import UsageError, is_bug, one_line
from .checkpoints import Checkpoints, Position, has_dynamic_teacher, newest_checkpoint, read_checkpoint
from .non_finite import NonFiniteError

__all__ = ['find_checkpoint', 'resume_run', 'rewind']

REWINDS = 3  # to one checkpoint, before the run gives up

_logger = logging.getLogger('train')


def find_checkpoint(args: argparse.Namespace, folder: str) -> str:
    """The file that ``--resume`` names; ``auto`` is the furthest checkpoint of the run's folder.

    Args:
        args: arguments of ``train.py``.
        folder: the run's folder.

    Returns:
        Its path; empty where the run begins.

    Raises:
        UsageError: if it does not exist.
    """
    if args.resume != 'auto':
        if args.resume and not os.path.isfile(args.resume):
            raise UsageError(f'checkpoint {args.resume} does not exist: check --resume')
        return args.resume
    return newest_checkpoint(folder) or ''


def resume_run(
    args: argparse.Namespace,
    path: str,
    task: TrainingTask,
    checkpoints: Checkpoints,
) -> Position:
    """Restores what is trained, its average, the optimizer and the loss scaler.

    Args:
        args: arguments of ``train.py``; ``--no-resume-opt`` leaves optimizer and loss scaler as they are.
        path: the checkpoint.
        task: what is trained; receives student, dynamic teacher and distillers.
        checkpoints: of the run, with its optimizer and loss scaler.

    Returns:
        Where the run goes on.

    Raises:
        UsageError: if the file is no checkpoint, or is one of another architecture or other GPD settings.
    """
    state = {} if args.no_resume_opt else dict(optimizer=checkpoints.optimizer, loss_scaler=checkpoints.loss_scaler)
    checkpoint = read_checkpoint(path)
    if 'optimizer' not in checkpoint or 'epoch' not in checkpoint:
        raise UsageError(f'{path} is no checkpoint of a run: to start from its weights, use --initial-checkpoint')
    was_joint = has_dynamic_teacher(checkpoint)
    if was_joint != args.gpd and not (args.gpd and args.gpd_epochs):
        raise UsageError(
            f'{path} is of a run {"with" if was_joint else "without"} --gpd, and this one is '
            f'{"with" if args.gpd else "without"}: resume it as it was, or start from its student with '
            '--initial-checkpoint'
        )
    for name, flag in (('ema_teacher', 'ema_teacher'), ('online_modules', 'kd_online_modules')):
        was_there = name in (checkpoint.get('task_state') or {})
        if was_there != getattr(args, flag):
            raise UsageError(
                f'{path} is of a run {"with" if was_there else "without"} {flag_of(flag)}, and this one is '
                f'{"without" if was_there else "with"}: resume it as it was, or start from its student with '
                '--initial-checkpoint'
            )
    before = vars(checkpoint.get('args') or argparse.Namespace())
    if before.get('opt', args.opt) != args.opt and not args.no_resume_opt:
        raise UsageError(
            f'{path} holds the state of --opt {before["opt"]}, and this run has {args.opt}: resume it with the same, '
            'or with --no-resume-opt'
        )
    for flag in ('lr', 'lr_base', 'weight_decay', 'momentum') if not args.no_resume_opt else ():
        if before.get(flag, getattr(args, flag)) != getattr(args, flag):
            _logger.warning(
                f'{flag_of(flag)} stays {before[flag]}, as the optimizer goes on as it was: --no-resume-opt begins '
                f'with {getattr(args, flag)}'
            )
    if 'state_dict_ema' in checkpoint and not task.has_ema():
        raise UsageError(f'{path} holds a moving average, which this run would lose: resume it with --model-ema')
    if task.has_ema() and 'state_dict_ema' not in checkpoint:
        _logger.warning(f'{path} holds no moving average: it begins with the weights')
    try:
        resume_task_checkpoint(task, path, **state)
        if task.has_ema():
            load_task_ema_checkpoint(task, path)
    except (RuntimeError, ValueError, KeyError) as error:
        if is_bug(error):
            raise
        raise UsageError(
            f'{path} does not fit --model {args.model} and its options: {one_line(error)} '
            '(resume with the arguments of its run, in args.yaml beside it)'
        )
    if os.path.realpath(os.path.dirname(path)) == os.path.realpath(checkpoints.folder):
        checkpoints.restore_history(checkpoint, is_last=os.path.basename(path).startswith('last'))
    return checkpoints.restore_position(checkpoint)


def rewind(
    error: NonFiniteError,
    args: argparse.Namespace,
    task_of: Callable[[str], TrainingTask],
    checkpoints: Checkpoints,
    position: Position,
) -> Position:
    """Goes back to the furthest checkpoint, after a loss or gradient that was not finite.

    Args:
        error: what happened.
        args: arguments of ``train.py``.
        task_of: gives what is trained, of the kind that a checkpoint is of.
        checkpoints: of the run.
        position: where it happened.

    Returns:
        Where the run goes on, with other random numbers.

    Raises:
        NonFiniteError: if there is no checkpoint, or going back to it has not helped three times.
    """
    path = checkpoints.processes.share(newest_checkpoint(checkpoints.folder))
    if path is None:
        raise NonFiniteError(f'{error}; there is no checkpoint to go back to')
    restored = resume_run(args, path, task_of(path), checkpoints)
    if position.rewinds - restored.rewinds >= REWINDS:
        raise NonFiniteError(f'{error}; going back to {path} has not helped {REWINDS} times')
    restored.rewinds = position.rewinds + 1
    _logger.warning(f'{error}; the run goes back to {path} and on with other random numbers')
    return restored
