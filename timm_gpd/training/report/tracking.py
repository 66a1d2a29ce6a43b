"""Services that follow a run: TensorBoard and wandb."""

import argparse
import importlib
import logging
import os
from typing import Any, Dict, List, Mapping, Optional

from ...command_line import flag_of
from ...errors import UsageError, first_line

__all__ = ['Tracker', 'check_tracking']

_logger = logging.getLogger('train')

PACKAGES = {'log_tensorboard': ('tensorboard', 'torch.utils.tensorboard'), 'log_wandb': ('wandb', 'wandb')}


def check_tracking(args: argparse.Namespace) -> None:
    """Refuses, before a run starts, what could not be tracked.

    Args:
        args: arguments of ``train.py``.

    Raises:
        UsageError: if a package is missing, or ``--wandb-resume-id`` stands alone.
    """
    if args.wandb_resume_id and not (args.log_wandb and args.resume):
        raise UsageError('--wandb-resume-id continues the wandb run of a resumed run: give --log-wandb and --resume')
    for flag, (package, module) in PACKAGES.items():
        if getattr(args, flag):
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise UsageError(f'{flag_of(flag)} needs {package}: pip install {package} ({error})')


class Tracker:
    """Sends the rows of ``summary.csv`` to the services that the arguments name; as a context, ends with the run.

    TensorBoard's files are in ``tensorboard/`` of the run's folder, wandb's in ``wandb/``.

    Args:
        args: arguments of ``train.py``, which :func:`check_tracking` accepts.
        folder: the run's; its name is the run's in wandb.
        start_epoch: index of the first epoch that is trained, from 0: what TensorBoard has of it and of later ones is
            of a run that was continued from an earlier checkpoint, and is hidden.
        is_primary: whether this is the process that reports. In all others nothing is sent.

    Raises:
        UsageError: if wandb does not start.
    """

    def __init__(self, args: argparse.Namespace, folder: str, start_epoch: int = 0, is_primary: bool = True) -> None:
        self.services: List[Any] = []
        if is_primary and args.log_tensorboard:
            self.services.append(_TensorBoard(os.path.join(folder, 'tensorboard'), start_epoch))
        if is_primary and args.log_wandb:
            self.services.append(_Wandb(args, folder))

    def __enter__(self) -> 'Tracker':
        return self

    def __exit__(self, kind: Any, error: Optional[BaseException], trace: Any) -> None:
        for service in self.services:
            service.close(0 if error is None else getattr(error, 'exit_code', 1))
        self.services = []

    def log(self, row: Mapping[str, float]) -> None:
        """Sends one epoch.

        Args:
            row: from :func:`timm_gpd.training.report.summary.summary_row`.
        """
        for service in self.services:
            service.log(row)


class _TensorBoard:
    """Columns of training and validation are groups of their own: ``train/loss``, ``eval/top1``."""

    def __init__(self, folder: str, start_epoch: int) -> None:
        writer = importlib.import_module('torch.utils.tensorboard').SummaryWriter
        self.writer = writer(folder, purge_step=start_epoch or None)

    def log(self, row: Mapping[str, float]) -> None:
        for column, value in row.items():
            if column != 'epoch':
                name = column.replace('_', '/', 1) if column.startswith(('train_', 'eval_')) else column
                self.writer.add_scalar(name, value, int(row['epoch']))
        self.writer.flush()

    def close(self, exit_code: int) -> None:
        self.writer.close()


class _Wandb:
    """What timm's script sends: the row, under the names of its columns."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        self.wandb = importlib.import_module('wandb')
        resumed: Dict[str, Any] = dict(resume='must', id=args.wandb_resume_id) if args.wandb_resume_id else {}
        try:
            self.run = self.wandb.init(
                project=args.wandb_project,
                name=os.path.basename(os.path.normpath(folder)),
                config=dict(vars(args)),
                tags=args.wandb_tags,
                dir=folder,
                **resumed,
            )
        except self.wandb.Error as error:
            raise UsageError(f'wandb: {first_line(error)} (wandb login, or WANDB_MODE=offline, may help)')
        _logger.info(f'wandb run {self.run.id}: to continue it, --resume with --wandb-resume-id {self.run.id}')

    def log(self, row: Mapping[str, float]) -> None:
        self.run.log(dict(row))

    def close(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)
