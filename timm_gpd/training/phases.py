"""The phases of a run: epochs in which the student trains with its dynamic teacher, and those in which it trains alone.

What is trained is made anew where another phase begins: task, optimizer, average, schedule. It depends on nothing but
what a checkpoint holds, so a run that goes on there is the run that was not interrupted.
"""

import argparse
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from timm.task import TrainingTask

from ..errors import UsageError, usage_errors
from ..task import GapPreservingTask, hand_over
from .checkpoints import Position, has_dynamic_teacher, read_checkpoint
from .compute import Compute
from .data.replay import seed_for_hand_over
from .joint_epochs import read_joint_epochs
from .optimizer import create_optimizer
from .processes import Processes
from .schedule import count_epochs, create_schedule, restore_schedule
from .task import create_task, get_student

__all__ = ['Phases', 'Trained']

_HOW = {True: 'with its dynamic teacher', False: 'alone'}

_logger = logging.getLogger('train')


@dataclass
class Trained:
    """What is trained in a phase.

    Attributes:
        task: student, dynamic teacher, losses.
        optimizer: over the task's trainable module.
        lr_scheduler: timm scheduler, or None.
    """

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any = None

    @property
    def is_joint(self) -> bool:
        """Whether there is a dynamic teacher."""
        return isinstance(self.task, GapPreservingTask)


class Phases:
    """Makes what is trained, in the first phase of a run and in each that follows.

    Args:
        args: arguments of ``train.py``.
        compute: device and precision.
        processes: those that train together.
        updates_per_epoch: updates of the optimizer in an epoch.
        images_per_update: of all processes; the mean, where batches differ.

    Attributes:
        num_epochs: epochs of the whole schedule.
        joint_epochs: indices of those with a dynamic teacher.

    Raises:
        UsageError: if the arguments make no schedule, or ``--gpd-epochs`` does not fit it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        compute: Compute,
        processes: Processes,
        updates_per_epoch: int,
        images_per_update: float,
    ) -> None:
        self.args, self.compute, self.processes = args, compute, processes
        self.updates_per_epoch, self.images_per_update = updates_per_epoch, images_per_update
        self.num_epochs = count_epochs(args, updates_per_epoch)
        self.joint_epochs = read_joint_epochs(args.gpd_epochs, self.num_epochs) if args.gpd else range(0)

    def begin(self, task: TrainingTask, student: nn.Module, checkpoint: str) -> Trained:
        """What is trained at first.

        Args:
            task: what the arguments name, with its dynamic teacher where there will be one.
            student: what it was made of.
            checkpoint: path of the one that the run goes on from, whose phase it is; empty where the run begins.

        Returns:
            Task and optimizer. The schedule comes from :meth:`schedule`, as it depends on the checkpoint.
        """
        if not isinstance(task, GapPreservingTask) or not self.args.gpd_epochs:
            return self._complete(task)
        is_joint = (self.args.start_epoch or 0) in self.joint_epochs
        if checkpoint:
            is_joint = has_dynamic_teacher(read_checkpoint(checkpoint))
        if not is_joint:
            task = create_task(self.args, student, self.compute.device, is_joint, task.static_teacher)
        return self._complete(task)

    def _complete(self, task: TrainingTask) -> Trained:
        if self.args.model_ema:
            task.setup_ema(
                decay=self.args.model_ema_decay,
                use_warmup=self.args.model_ema_warmup,
                device='cpu' if self.args.model_ema_force_cpu else None,
            )
        return Trained(task, create_optimizer(self.args, task, self.images_per_update))

    def schedule(self, trained: Trained, position: Position) -> None:
        """Gives what is trained a schedule, taken to where a run stands."""
        trained.lr_scheduler, _ = create_schedule(
            self.args,
            trained.optimizer,
            self.updates_per_epoch,
            position.epoch,
            lower_is_better=self.args.eval_metric.endswith('loss'),
        )
        restore_schedule(trained.lr_scheduler, trained.optimizer, position.learning_rates, position.schedule)

    def check(self, trained: Trained, position: Position) -> None:
        """Checks that a run goes on in the middle of an epoch as the epoch was begun.

        Args:
            trained: what a checkpoint was loaded into.
            position: where the run stands.

        Raises:
            UsageError: if ``--gpd-epochs`` has put the epoch into another phase since.
        """
        is_joint = position.epoch in self.joint_epochs
        if position.batch and is_joint != trained.is_joint:
            raise UsageError(
                f'the checkpoint is of the middle of epoch {position.epoch}, which was begun '
                f'{_HOW[trained.is_joint]}, and with --gpd-epochs {self.args.gpd_epochs} the student trains '
                f'{_HOW[is_joint]} there: resume with that of its run, or from last.pth.tar'
            )

    def prepare(self, trained: Trained) -> None:
        """Compiles a task if the arguments say so, and lets it share gradients among the processes."""
        if self.args.torchcompile:
            with usage_errors('check --torchcompile and --torchcompile-mode', RuntimeError):
                trained.task.compile(backend=self.args.torchcompile, mode=self.args.torchcompile_mode)
        self.processes.wrap(trained.task, broadcast_buffers=not self.args.no_ddp_bb)

    def become(self, trained: Trained, is_joint: bool) -> Trained:
        """Makes what is trained of the other kind, of the same student, in place; nothing else goes over.

        Args:
            trained: changed in place, but for its schedule, where it is of another kind.
            is_joint: whether there is to be a dynamic teacher.

        Returns:
            What was trained before.
        """
        before = Trained(trained.task, trained.optimizer, trained.lr_scheduler)
        if is_joint != trained.is_joint:
            student = get_student(trained.task)
            self.compute.place(student)
            static_teacher = getattr(trained.task, 'static_teacher', None)  # of this package's tasks
            after = self._complete(create_task(self.args, student, self.compute.device, is_joint, static_teacher))
            self.prepare(after)
            trained.task, trained.optimizer = after.task, after.optimizer
        return before

    def enter(self, trained: Trained, position: Position) -> bool:
        """Hands over to the phase that a run's position is in, where that is another one.

        Args:
            trained: changed in place.
            position: the beginning of an epoch, or anywhere in one that goes on as it was begun.

        Returns:
            Whether another phase begins.
        """
        epoch, is_joint = position.epoch, position.epoch in self.joint_epochs
        if is_joint == trained.is_joint:
            return False
        seed_for_hand_over(self.args.seed, epoch)  # noise and branches are drawn
        before = self.become(trained, is_joint)
        hand_over(before.task, before.optimizer, trained.task, trained.optimizer)
        position.learning_rates = [group['lr'] for group in trained.optimizer.param_groups]
        self.schedule(trained, position)
        _logger.info(
            f'epoch {epoch}: the student trains {_HOW[is_joint]} from now on, and the optimizer goes on as it was'
        )
        return True
