"""Continuing a run from one of its checkpoints."""

import argparse
import os
import pickle
from typing import Any, Optional

import torch
from timm.task import TrainingTask, resume_task_checkpoint

from ..errors import UsageError, is_bug

__all__ = ['resume_run']


def resume_run(
    args: argparse.Namespace,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    loss_scaler: Optional[Any] = None,
) -> int:
    """Restores task, optimizer and loss scaler from ``--resume``.

    Args:
        args: arguments of ``train.py``; ``--no-resume-opt`` leaves optimizer and loss scaler as they are.
        task: what is trained; receives student, dynamic teacher and distillers.
        optimizer: over its trainable module.
        loss_scaler: of mixed precision, if any.

    Returns:
        The epoch to go on with, from 0.

    Raises:
        UsageError: if the file is missing, is no checkpoint, or is one of another architecture or other GPD settings.
    """
    if not os.path.isfile(args.resume):
        raise UsageError(f'checkpoint {args.resume} does not exist: check --resume')
    state = {} if args.no_resume_opt else dict(optimizer=optimizer, loss_scaler=loss_scaler)
    try:
        epoch = resume_task_checkpoint(task, args.resume, **state)
    except (pickle.UnpicklingError, EOFError, OSError) as error:
        raise UsageError(f'{args.resume} cannot be read as a checkpoint: {str(error).splitlines()[0]}')
    except (RuntimeError, ValueError, KeyError) as error:
        if is_bug(error):
            raise
        reason = str(error).strip().splitlines()
        raise UsageError(
            f'{args.resume} does not fit --model {args.model} and its options: {reason[-1].strip() if reason else ""} '
            '(resume with the arguments of its run, in args.yaml beside it)'
        )
    return (epoch or 0) if args.start_epoch is None else args.start_epoch
