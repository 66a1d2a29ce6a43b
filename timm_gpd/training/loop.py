"""One epoch of training, for any of timm's tasks."""

import argparse
import logging
import time
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Dict, Optional, Tuple

import torch
from timm.data import Mixup
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad

from ..errors import UsageError
from ..task import GapPreservingTask
from ..task.own_norms import OwnNorms
from .checkpoints import Checkpoints, Position
from .compute import Compute
from .data.replay import ReplayedLoader
from .interruption import Interruption
from .non_finite import NonFiniteError, are_finite, name_non_finite
from .processes import Processes
from .report.image_log import ImageLog
from .report.progress import Progress
from .schedule import mean_lr
from .sync_batch_norm import SynchronizedBatchNorm

__all__ = ['LoopSettings', 'TrainingLoop']

_logger = logging.getLogger('train')


@dataclass(frozen=True)
class LoopSettings:
    """How epochs are trained.

    Attributes:
        grad_accum_steps: batches of an update.
        clip_grad: limit that gradients are clipped to, None for none.
        clip_mode: what is limited: ``'norm'``, ``'value'``, ``'agc'``, the norm relative to the weights', or
            ``'own-norm'``, that of student and dynamic teacher each.
        mixup_off_epoch: epoch from which on batches are not mixed, 0 for never.
        recovery_interval: updates between recovery checkpoints, 0 for none.
        on_nan: what follows a loss or gradient that is NaN or infinite, see ``POLICIES`` of ``non_finite``.
        sync_bn: batch norm over the images of all processes.
        variable_batch_loss_scale: how a loss grows with its batch where batches differ: ``'none'``, ``'sqrt'`` or
            ``'linear'``.
        synchronize_step: wait for the device at the end of every update.
    """

    grad_accum_steps: int = 1
    clip_grad: Optional[float] = None
    clip_mode: str = 'norm'
    mixup_off_epoch: int = 0
    recovery_interval: int = 0
    on_nan: str = 'stop'
    sync_bn: bool = False
    variable_batch_loss_scale: str = 'none'
    synchronize_step: bool = False

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> 'LoopSettings':
        """What the arguments of ``train.py`` say, under the same names."""
        return cls(**{setting.name: getattr(args, setting.name) for setting in fields(cls)})


class TrainingLoop:
    """Trains epochs, or what is left of one.

    Args:
        task: what is trained; its result's ``loss`` is minimised, and every other scalar is averaged for the log.
        loader: batches of images (B, in_chans, H, W) and targets.
        optimizer: over the task's trainable module.
        compute: device and precision.
        processes: those that train together.
        settings: accumulation, clipping, recovery.
        lr_scheduler: timm scheduler, stepped on every update; or None.
        checkpoints: writes recovery checkpoints, and where the run stands if it is interrupted.
        interruption: tells whether the run shall end.
        mixup_fn: mixes a batch, where the loader does not.
        progress: shows how far the run is.
        batch_size: images of a batch of this process, the mean where batches differ.
        image_log: saves images.
        num_epochs: epochs of the whole schedule, which a task may ask how far it is.
    """

    def __init__(
        self,
        task: TrainingTask,
        loader: ReplayedLoader,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        processes: Processes,
        settings: LoopSettings = LoopSettings(),
        lr_scheduler: Any = None,
        checkpoints: Optional[Checkpoints] = None,
        interruption: Optional[Interruption] = None,
        mixup_fn: Optional[Mixup] = None,
        progress: Optional[Progress] = None,
        batch_size: Optional[float] = None,
        image_log: Optional[ImageLog] = None,
        num_epochs: int = 1,
    ) -> None:
        self.loader, self.compute, self.processes, self.settings = loader, compute, processes, settings
        self.checkpoints, self.interruption = checkpoints, interruption
        self.mixup_fn, self.progress = mixup_fn, progress
        self.batch_size, self.image_log = batch_size, image_log
        self.updates_per_epoch = -(-len(loader) // settings.grad_accum_steps)
        self.num_updates = num_epochs * self.updates_per_epoch
        synchronized = settings.sync_bn and processes.is_distributed
        self.batch_norm = SynchronizedBatchNorm() if synchronized else nullcontext()
        self.train_from_now_on(task, optimizer, lr_scheduler)

    def train_from_now_on(self, task: TrainingTask, optimizer: torch.optim.Optimizer, lr_scheduler: Any) -> None:
        """Takes another task, with its optimizer and schedule, between two epochs."""
        self.task, self.optimizer, self.lr_scheduler = task, optimizer, lr_scheduler
        self.clip_mode, self.own_norms = self.settings.clip_mode, None
        if self.clip_mode == 'own-norm' and self.settings.clip_grad is not None:
            self.clip_mode = 'norm'  # of a student alone that is the same
            self.own_norms = OwnNorms(task) if isinstance(task, GapPreservingTask) else None

    def train_epoch(self, position: Position) -> Dict[str, float]:
        """Trains an epoch from a position on, which moves with it, to behind its last batch.

        Args:
            position: where the run stands, changed in place.

        Returns:
            Mean of the loss and of each of its terms over the images of the epoch, of all processes.

        Raises:
            NonFiniteError: if a loss or a gradient is NaN or infinite, unless such updates are skipped; then if all
                of the epoch would be.
            UsageError: if the position is of an epoch of another length.
            RunEnded: if the run was told to end; its position is saved.
        """
        epoch, batches, accumulation = position.epoch, len(self.loader), self.settings.grad_accum_steps
        if position.batch and position.batches not in (0, batches):
            raise UsageError(
                f'the checkpoint is of the middle of an epoch of {position.batches} batches, and this run has '
                f'{batches}: resume with the same images, or from last.pth.tar'
            )
        position.batches = batches
        if self.settings.mixup_off_epoch and epoch >= self.settings.mixup_off_epoch:
            self._turn_mixup_off()
        self.task.train()
        self.optimizer.zero_grad()
        times = _Times()
        means, update_terms = _Means.at(position), _Means()
        for index, (images, target) in self.loader.run_epoch(epoch, position.batch, position.rewinds):
            update = index // accumulation
            # The last update of an epoch may have fewer batches than the others.
            accumulated = min(accumulation, batches - update * accumulation)
            is_update = index == batches - 1 or (index + 1) % accumulation == 0
            num_updates = epoch * self.updates_per_epoch + update + 1
            if hasattr(self.task, 'begin_update'):  # timm's tasks have none
                self.task.begin_update(num_updates - 1, (num_updates - 1) / self.num_updates)
            images, target = self.compute.prepare(images, target)
            if self.mixup_fn is not None:
                images, target = self.mixup_fn(images, target)
            times.loaded()
            with self.batch_norm, nullcontext() if is_update else self.task.no_sync():
                with self.compute.autocast():
                    result = self.task(images, target)
                update_terms.add(result, images.shape[0])
                loss = result['loss'] * self._loss_factor(images.shape[0]) / accumulated
                is_finite = self._backward(loss, is_update, update_terms)
            if not is_update:
                continue
            if is_finite:
                means.add_all(update_terms)
                self.task.update_ema(step=num_updates)
            elif self.settings.on_nan == 'skip':
                _logger.warning(f'{self._name_non_finite(update_terms, epoch, update)}: the update is skipped')
            else:
                raise NonFiniteError(self._name_non_finite(update_terms, epoch, update))
            self.optimizer.zero_grad()
            if self.own_norms is not None:
                self.own_norms.forget()
            if self.settings.synchronize_step and self.compute.device.type != 'cpu':
                torch.accelerator.synchronize(self.compute.device)
            if self.image_log is not None:
                self.image_log.save(update, index, images)
            loss, loss_mean = update_terms.mean('loss'), means.mean('loss')
            if self.progress is not None:
                images_of_all = update_terms.images * self.processes.world_size
                self.progress.step(
                    epoch, update, loss, loss_mean, mean_lr(self.optimizer), images_of_all, *times.updated()
                )
            if self.lr_scheduler is not None:
                self.lr_scheduler.step_update(num_updates=num_updates, metric=loss_mean)
            update_terms = _Means()
            position.batch = index + 1
            self._save_if_wanted(position, means, update)
        if not means.images and batches:
            raise NonFiniteError(f'epoch {epoch}: no update had a finite loss and finite gradients: lower --lr')
        position.batch, position.sums, position.images = batches, means.numbers(), means.images
        return means.compute(self.processes)

    def _loss_factor(self, batch_size: int) -> float:
        """Factor of the loss of a batch, 1 for one of mean size."""
        how = self.settings.variable_batch_loss_scale
        if how == 'none' or self.batch_size is None:
            return 1.0
        return (batch_size / self.batch_size) ** (0.5 if how == 'sqrt' else 1.0)

    def _turn_mixup_off(self) -> None:
        self.loader.turn_mixup_off()
        if self.mixup_fn is not None:
            self.mixup_fn.mixup_enabled = False

    def _backward(self, loss: torch.Tensor, is_update: bool, update_terms: '_Means') -> bool:
        """Adds gradients, and with the last batch of an update takes the step, unless something is not finite.

        Returns:
            Whether all is finite; the same in all processes.
        """
        limit, mode = self.settings.clip_grad, self.clip_mode
        clipped = None if limit is None else self.task.get_clip_parameters(exclude_head='agc' in mode)
        if self.compute.loss_scaler is not None:
            # It expects gradients to overflow, and skips such updates itself; that leaves the losses.
            if is_update and self.processes.any(not update_terms.are_finite()):
                return False
            self.compute.loss_scaler(
                loss, self.optimizer, clip_grad=limit, clip_mode=mode, parameters=clipped, need_update=is_update
            )
            return True
        # If a loss is not finite, so are gradients, in every process, since they are summed.
        (loss * torch.where(loss.detach().isfinite(), 1.0, float('nan'))).backward()
        if not is_update:
            return True
        trained = self.task.get_trainable_module()
        if not are_finite(parameter.grad for parameter in trained.parameters() if parameter.grad is not None):
            return False
        if self.own_norms is not None:
            self.own_norms(limit)
        elif limit is not None:
            dispatch_clip_grad(clipped, value=limit, mode=mode)
        self.optimizer.step()
        return True

    def _name_non_finite(self, update_terms: '_Means', epoch: int, update: int) -> str:
        what = name_non_finite(update_terms.sums, self.task.get_trainable_module().named_parameters())
        return f'epoch {epoch}, update {update}, learning rate {mean_lr(self.optimizer):.3g}: {what}'

    def _save_if_wanted(self, position: Position, means: '_Means', update: int) -> None:
        """Saves between two updates, every so often and if the run shall end."""
        shall_end = self.interruption is not None and self.interruption.check()
        interval = self.settings.recovery_interval
        if self.checkpoints is None or not (shall_end or (interval and (update + 1) % interval == 0)):
            return
        position.sums, position.images = means.numbers(), means.images
        path = self.checkpoints.save_recovery(position)
        if shall_end and self.interruption is not None:
            self.interruption.end(path)


class _Means:
    """Means of a task's scalars over images, kept on the device: reading them once an epoch does not stall it."""

    def __init__(self) -> None:
        self.sums: Dict[str, torch.Tensor] = {}
        self.images = 0

    @classmethod
    def at(cls, position: Position) -> '_Means':
        """What has been summed up in an epoch before a position."""
        means = cls()
        means.sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in position.sums.items()}
        means.images = position.images
        return means

    def add(self, result: Dict[str, torch.Tensor], images: int) -> None:
        """Adds a batch."""
        self.images += images
        for name, value in result.items():
            if value.dim() == 0:
                self._add(name, value.detach() * images)

    def add_all(self, other: '_Means') -> None:
        """Adds what another has summed up."""
        self.images += other.images
        for name, value in other.sums.items():
            self._add(name, value)

    def _add(self, name: str, value: torch.Tensor) -> None:
        dtype = torch.float32 if value.device.type == 'mps' else torch.float64
        before = self.sums.get(name)
        self.sums[name] = value.to(dtype) if before is None else before.to(value.device, dtype) + value.to(dtype)

    def mean(self, name: str) -> float:
        """The mean of one of them so far, in this process; NaN before any image. The device is waited for."""
        return (self.sums[name] / self.images).item() if self.images else float('nan')

    def are_finite(self) -> bool:
        return bool(torch.stack(list(self.sums.values())).isfinite().all())

    def numbers(self) -> Dict[str, float]:
        """The sums as numbers, for which the device is waited for."""
        return {name: value.item() for name, value in self.sums.items()}

    def compute(self, processes: Processes) -> Dict[str, float]:
        """The means, over the images of all processes."""
        *sums, images = processes.sum([*self.numbers().values(), self.images])
        return OrderedDict((name, value / max(images, 1)) for name, value in zip(self.sums, sums))


class _Times:
    """How long an update takes, and how much of that it waits for images; in seconds."""

    def __init__(self) -> None:
        self.start = self.waiting_since = time.time()
        self.waited = 0.0

    def loaded(self) -> None:
        """A batch is there."""
        self.waited += time.time() - self.waiting_since

    def updated(self) -> Tuple[float, float]:
        """Both numbers of an update that is done; the next one begins."""
        now = time.time()
        times = now - self.start, self.waited
        self.start = self.waiting_since = now
        self.waited = 0.0
        return times
