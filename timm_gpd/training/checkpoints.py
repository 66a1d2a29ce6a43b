"""Checkpoints: whole states of a run, each written at once or not at all, and which of them are kept.

File names, keys and what is kept are those of timm's ``CheckpointSaver``: ``last``, ``model_best``,
``checkpoint-<epoch>`` for the best few epochs, ``milestone-<epochs>``, ``recovery-<epoch>-<batch>``; all ``.pth.tar``.
"""

import argparse
import logging
import os
import shutil
import zipfile
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..errors import UsageError, first_line, one_line, why_unwritable
from .processes import Processes
from .report.files import find_files, replaced_file

__all__ = ['Checkpoints', 'Position', 'has_dynamic_teacher', 'newest_checkpoint', 'read_checkpoint']

EXTENSION = '.pth.tar'

_logger = logging.getLogger('train')


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        epoch: index of the epoch that goes on, from 0.
        batch: index of its batch that comes next.
        sums: of each loss over the images of the epoch so far, in this process.
        images: how many those are.
        batches: of the epoch, where it was begun.
        rewinds: how often the run has gone back to a checkpoint; its random numbers are others each time.
        schedule: what the schedule has seen, see ``schedule_state``.
        learning_rates: of the optimizer's parameter groups, where they come from a checkpoint.
    """

    epoch: int = 0
    batch: int = 0
    sums: Dict[str, float] = field(default_factory=dict)
    images: int = 0
    batches: int = 0
    rewinds: int = 0
    schedule: Dict[str, Any] = field(default_factory=dict)
    learning_rates: Sequence[float] = ()

    def next_epoch(self, schedule: Dict[str, Any]) -> 'Position':
        """The beginning of the next epoch, and what the schedule has seen by then."""
        return Position(self.epoch + 1, rewinds=self.rewinds, schedule=schedule)


class Kept(NamedTuple):
    """A numbered checkpoint that is there, and the metric that it is ranked by, if it was validated."""

    name: str
    metric: Optional[float]


class Checkpoints:
    """Writes checkpoints of a run into its folder. All processes call its methods; the first one writes.

    Args:
        folder: the run's folder.
        task: what is trained.
        optimizer: over its trainable module.
        args: the command, which a checkpoint holds.
        processes: those that train together.
        loss_scaler: of mixed precision, if any.
        lower_is_better: of the metric that checkpoints are ranked by.
        max_history: how many numbered checkpoints are kept.
    """

    def __init__(
        self,
        folder: str,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        args: argparse.Namespace,
        processes: Processes,
        loss_scaler: Optional[Any] = None,
        lower_is_better: bool = False,
        max_history: int = 10,
    ) -> None:
        self.folder, self.task, self.optimizer, self.loss_scaler = folder, task, optimizer, loss_scaler
        self.args, self.processes = args, processes
        self.sign, self.max_history = -1 if lower_is_better else 1, max_history
        self.history: List[Kept] = []
        self.best_metric: Optional[float] = None
        self.best_epoch: Optional[int] = None

    # -- writing ----------------------------------------------------------------------------------------------------

    def save_epoch(self, epoch: int, position: Position, metric: Optional[float] = None) -> None:
        """Writes ``last``, and keeps it as a numbered checkpoint and as ``model_best`` if it earns that.

        Args:
            epoch: index of the epoch that is complete.
            position: where the run goes on.
            metric: what ranks it; None if it was not validated, then it is kept as long as there is room.
        """
        self._write('last', epoch, position, metric)
        if self.processes.is_primary:
            self._rank(epoch, metric)
            for path in find_files(self.folder, f'recovery-*{EXTENSION}'):  # what they would restore is behind
                os.remove(path)

    def save_milestone(self, epoch: int) -> None:
        """Keeps ``last`` for good, as ``milestone-<number of complete epochs>``. After :meth:`save_epoch`."""
        if self.processes.is_primary:
            _duplicate(self.path('last'), self.path(f'milestone-{epoch + 1}'))

    def save_recovery(self, position: Position) -> str:
        """Writes a checkpoint between two steps; the one before the last of them is removed.

        Returns:
            Its path.
        """
        name = f'recovery-{position.epoch}-{position.batch}'
        self._write(name, position.epoch, position)
        if self.processes.is_primary:
            recoveries = sorted(find_files(self.folder, f'recovery-*{EXTENSION}'), key=os.path.getmtime)
            for path in recoveries[:-2]:
                os.remove(path)
        return self.path(name)

    def path(self, name: str) -> str:
        """Path of a checkpoint."""
        return os.path.join(self.folder, name + EXTENSION)

    def _write(self, name: str, epoch: int, position: Position, metric: Optional[float] = None) -> None:
        parts = self.processes.gather(self._part_of_process(position))
        if not self.processes.is_primary:
            return
        state = {
            'epoch': epoch,
            'arch': self.args.model,
            'args': argparse.Namespace(**vars(self.args)),  # the class that timm allows in a checkpoint
            'optimizer': self.optimizer.state_dict(),
            'version': 2,
            **self.task.get_checkpoint_state(),
            **self.task.get_checkpoint_state(ema=True),
            'saver': {
                'checkpoint_files': [tuple(kept) for kept in self.history],
                'best_epoch': self.best_epoch,
                'best_metric': self.best_metric,
                'pending': (epoch, metric),
            },
            'run': {
                'epoch': position.epoch,
                'batch': position.batch,
                'batches': position.batches,
                'rewinds': position.rewinds,
                'world_size': self.processes.world_size,
                'schedule': position.schedule,
                'learning_rates': [group['lr'] for group in self.optimizer.param_groups],
                'parts': parts,
            },
        }
        if self.loss_scaler is not None:
            state[self.loss_scaler.state_dict_key] = self.loss_scaler.state_dict()
        if metric is not None:
            state['metric'] = metric
        try:
            with replaced_file(self.path(name)) as partial, open(partial, 'wb') as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # the second is torch's, of what it could not write
            raise UsageError(
                f'{self.path(name)} cannot be written: {why_unwritable(error) or first_line(error)}; earlier '
                'checkpoints are as they were: make room, and go on with --resume auto'
            )

    def _part_of_process(self, position: Position) -> Dict[str, Any]:
        """What differs between processes: sums of losses, and buffers, such as running statistics of their images."""
        part: Dict[str, Any] = {'sums': position.sums, 'images': position.images}
        if self.processes.is_distributed:
            part['buffers'] = [
                {name: buffer.cpu() for name, buffer in module.named_buffers()} for module in self._trained_modules()
            ]
        return part

    def _trained_modules(self) -> List[nn.Module]:
        modules = [self.task.get_trainable_module(), self.task.get_trainable_module(ema=True)]
        return [unwrap_model(module) for module in modules if module is not None]

    # -- which are kept ---------------------------------------------------------------------------------------------

    def _rank(self, epoch: int, metric: Optional[float]) -> None:
        """Keeps ``last`` as the numbered checkpoint of an epoch if there is room or it is better than another."""
        new = Kept(f'checkpoint-{epoch}', metric)
        history = sorted([kept for kept in self.history if kept.name != new.name] + [new], key=self._rank_of)
        self.history, dropped = history[: self.max_history], history[self.max_history :]
        if new in self.history:
            _duplicate(self.path('last'), self.path(new.name))
        if metric is not None and (self.best_metric is None or self.sign * metric > self.sign * self.best_metric):
            self.best_metric, self.best_epoch = metric, epoch
            _duplicate(self.path('last'), self.path('model_best'))
        for kept in dropped:
            if os.path.exists(self.path(kept.name)):
                os.remove(self.path(kept.name))

    def _rank_of(self, kept: Kept) -> Any:
        """Sorts the best first, of equals the earlier; then those without a metric, the latest first."""
        epoch = _epoch_of(kept.name)
        return (1, -epoch) if kept.metric is None else (0, -self.sign * kept.metric, epoch)

    # -- reading ----------------------------------------------------------------------------------------------------

    def restore_position(self, checkpoint: Dict[str, Any]) -> Position:
        """Where a run goes on after a checkpoint; what differs between processes is restored in each.

        Args:
            checkpoint: what was read from its file.

        Returns:
            The position of this process.

        Raises:
            UsageError: if an epoch was begun with other batches.
        """
        if 'run' not in checkpoint:  # of timm's script, or of this one before it knew positions
            return Position(epoch=checkpoint['epoch'] + 1)
        run = checkpoint['run']
        position = Position(
            run['epoch'],
            run['batch'],
            batches=run.get('batches', 0),
            rewinds=run['rewinds'],
            schedule=run.get('schedule', {}),  # not in checkpoints of before it was kept
            learning_rates=run['learning_rates'],
        )
        if run['world_size'] == self.processes.world_size:
            part = run['parts'][self.processes.rank]
            position.sums, position.images = part['sums'], part['images']
            for module, buffers in zip(self._trained_modules(), part.get('buffers', ())):
                for name, buffer in module.named_buffers():
                    buffer.copy_(buffers[name])
        if run['batch']:
            self._check_same_epoch(checkpoint)
        return position

    def _check_same_epoch(self, checkpoint: Dict[str, Any]) -> None:
        """The batches of an epoch that was begun are those that it goes on with."""
        before, now = vars(checkpoint['args']), vars(self.args)
        both = {flag: (before.get(flag), now.get(flag)) for flag in ('batch_size', 'grad_accum_steps', 'seed')}
        both['number of processes'] = checkpoint['run']['world_size'], self.processes.world_size
        for what, (old, new) in both.items():
            if old != new:
                raise UsageError(
                    f'the checkpoint is of the middle of an epoch with {what} {old}, and this run has {new}: resume '
                    'with the same, or from last.pth.tar'
                )

    def restore_history(self, checkpoint: Dict[str, Any], is_last: bool) -> None:
        """Goes on ranking where a checkpoint of this folder left off. Whatever else is there is ranked with the rest.

        A better ``model_best`` from epochs after the checkpoint stays.

        Args:
            checkpoint: what was read from its file.
            is_last: whether that is ``last``.
        """
        saver = checkpoint.get('saver') or {}
        known = {name.removesuffix(EXTENSION): metric for name, metric in saver.get('checkpoint_files', [])}
        for path in find_files(self.folder, f'checkpoint-*{EXTENSION}'):
            name = os.path.basename(path).removesuffix(EXTENSION)
            if name not in known:
                known[name] = read_checkpoint(path).get('metric')
        kept = [Kept(name, metric) for name, metric in known.items() if os.path.exists(self.path(name))]
        self.history = sorted(kept, key=self._rank_of)
        self.best_metric, self.best_epoch = saver.get('best_metric'), saver.get('best_epoch')
        if os.path.exists(self.path('model_best')):
            best = read_checkpoint(self.path('model_best'))
            metric = best.get('metric')
            if metric is not None and (self.best_metric is None or self.sign * metric > self.sign * self.best_metric):
                self.best_metric, self.best_epoch = metric, best['epoch']
        epoch, metric = saver.get('pending', (None, None))
        if is_last and epoch is not None:  # the run may have ended before it was ranked
            self._rank(epoch, metric)


def read_checkpoint(path: str) -> Dict[str, Any]:
    """Reads a training checkpoint, of this package or timm's.

    Args:
        path: the file.

    Returns:
        What it holds. Tensors stay in the file until they are used, but in files of torch before 1.6.

    Raises:
        UsageError: if it is no such file.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # what timm saves beside tensors and numbers
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever an unpickler makes of bytes that are no checkpoint
        raise UsageError(f'{path} cannot be read as a checkpoint: {one_line(error, length=200)}') from error
    if not isinstance(checkpoint, dict):
        raise UsageError(f'{path} is no checkpoint, but holds a {type(checkpoint).__name__}')
    return checkpoint


def has_dynamic_teacher(checkpoint: Dict[str, Any]) -> bool:
    """Whether a training checkpoint is of an epoch with a dynamic teacher."""
    return 'dynamic_teacher' in (checkpoint.get('task_state') or {})


def newest_checkpoint(folder: str) -> Optional[str]:
    """The checkpoint from which a run goes on: the furthest that can be read.

    Args:
        folder: the run's folder.

    Returns:
        Path of ``last`` or of a recovery checkpoint; None if there is neither.
    """
    found = []
    for path in [*find_files(folder, f'recovery-*{EXTENSION}'), os.path.join(folder, f'last{EXTENSION}')]:
        if not os.path.exists(path):
            continue
        try:
            checkpoint = read_checkpoint(path)
        except UsageError as error:
            _logger.warning(f'{error}: it is passed over')
            continue
        run = checkpoint.get('run', {'epoch': checkpoint['epoch'] + 1, 'batch': 0})
        found.append((run['epoch'], run['batch'], path))
    return max(found)[-1] if found else None


def _epoch_of(name: str) -> int:
    return int(name.rpartition('-')[2])


def _duplicate(source: str, target: str) -> None:
    """Gives a file a second name, or where the file system has no such thing a copy; at once, over what was there."""
    with replaced_file(target) as partial:
        os.remove(partial)
        try:
            os.link(source, partial)
        except (OSError, NotImplementedError):
            shutil.copy2(source, partial)
