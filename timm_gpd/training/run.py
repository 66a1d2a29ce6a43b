"""A run: its epochs, and what is validated, saved and reported after each."""

import argparse
import logging
import math
from dataclasses import dataclass
from typing import Any, Dict, Tuple

from timm.task import TrainingTask

from .checkpoints import Checkpoints, Position, has_dynamic_teacher, read_checkpoint
from .data.images import report_bad_images
from .evaluation import Evaluation
from .interruption import Interruption
from .loop import TrainingLoop
from .non_finite import NonFiniteError
from .phases import Phases, Trained
from .processes import Processes
from .report.progress import Progress
from .report.run_folder import RunFolder
from .report.tracking import Tracker
from .resume import rewind
from .schedule import mean_lr, schedule_state

__all__ = ['Run']

_logger = logging.getLogger('train')


@dataclass(frozen=True)
class Run:
    """What a run consists of. All processes train it; the first one writes.

    Attributes:
        args: arguments of ``train.py``.
        trained: task, optimizer and schedule, which are others in another phase.
        phases: in which epochs they are.
        loop: trains an epoch.
        evaluate: validates the models.
        checkpoints: saves where the run stands.
        folder: what is reported goes there.
        tracker: and there.
        progress: and to the terminal.
        processes: those that train together.
        interruption: tells whether the run shall end.
        loaders: of training and validation, which count the images that cannot be read.
        last_epoch: how many epochs are complete when the run ends.
    """

    args: argparse.Namespace
    trained: Trained
    phases: Phases
    loop: TrainingLoop
    evaluate: Evaluation
    checkpoints: Checkpoints
    folder: RunFolder
    tracker: Tracker
    progress: Progress
    processes: Processes
    interruption: Interruption
    loaders: Tuple[Any, ...]
    last_epoch: int

    def train(self, position: Position) -> None:
        """Trains from a position to the last epoch.

        Args:
            position: where the run stands.

        Raises:
            NonFiniteError: if a loss or a gradient is not finite, and ``--on-nan`` knows no way on.
            RunEnded: if it was told to end.
        """
        while position.epoch < self.last_epoch:
            if self.phases.enter(self.trained, position):
                self._follow()
            try:
                metrics = self.loop.train_epoch(position)
            except NonFiniteError as error:
                if self.args.on_nan != 'rewind':
                    raise
                position = rewind(error, self.args, self._task_of, self.checkpoints, position)
                self.phases.schedule(self.trained, position)
                self._follow()
                continue
            position = self._end_epoch(position, metrics)
        if not self.processes.share(self.folder.has_results()):  # of a run that was complete, in another folder
            found, lr = self.evaluate(), mean_lr(self.trained.optimizer)
            self.folder.write_epoch(position.epoch - 1, {}, found, lr=lr)
            self.checkpoints.save_epoch(position.epoch - 1, position, found.get(self.args.eval_metric))

    def _follow(self) -> None:
        """Lets the parts of the run work on what is trained now."""
        task, optimizer = self.trained.task, self.trained.optimizer
        self.loop.train_from_now_on(task, optimizer, self.trained.lr_scheduler)
        self.checkpoints.task, self.checkpoints.optimizer, self.evaluate.task = task, optimizer, task

    def _task_of(self, path: str) -> TrainingTask:
        """A task into which a checkpoint can be loaded: it may be of the phase before."""
        self.phases.become(self.trained, has_dynamic_teacher(read_checkpoint(path)))
        self._follow()
        return self.trained.task

    def _end_epoch(self, position: Position, metrics: Dict[str, float]) -> Position:
        """Validates, saves and reports. Returns the beginning of the next epoch."""
        epoch, lr, metric = position.epoch, mean_lr(self.trained.optimizer), None
        if self.args.recovery_interval or self.interruption.check(wait=True):
            self.checkpoints.save_recovery(position)  # a validation may take longer than a cluster waits
        self.processes.share_statistics(self.trained.task, self.args.dist_bn)
        done = epoch + 1
        if done % self.args.val_interval == 0 or done in (*self.args.save_epochs, self.last_epoch):
            found = self.evaluate()
            self.progress.validated(found)
            self.tracker.log(self.folder.write_epoch(epoch, metrics, found, lr=lr))
            metric = (found or metrics)[self.args.eval_metric]
            if not math.isfinite(metric):
                _logger.warning(f'epoch {epoch}: {self.args.eval_metric} is {metric}, which no checkpoint is ranked by')
                metric = None
        lr_scheduler = self.trained.lr_scheduler
        if lr_scheduler is not None:
            lr_scheduler.step(done, metric)
        position = position.next_epoch(schedule_state(lr_scheduler))
        self.checkpoints.save_epoch(epoch, position, metric)
        if done in self.args.save_epochs:
            self.checkpoints.save_milestone(epoch)
        report_bad_images(self.processes, epoch, *self.loaders)
        if done < self.last_epoch and self.interruption.check(wait=True):
            self.interruption.end(self.checkpoints.path('last'))
        return position

    def finish(self) -> None:
        """Logs the best epoch, and writes the last one's student."""
        if self.checkpoints.best_metric is not None:
            _logger.info(f'*** Best metric: {self.checkpoints.best_metric} (epoch {self.checkpoints.best_epoch})')
        self.folder.finish(self.trained.task)
