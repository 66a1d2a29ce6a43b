"""One epoch of training, for any of timm's tasks."""

import argparse
import logging
import time
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Dict, Optional

import torch
from timm.data import Mixup
from timm.task import TrainingTask
from timm.utils import AverageMeter, dispatch_clip_grad

from .checkpoints import Checkpoints, Position
from .compute import Compute
from .interruption import Interruption, RunInterrupted
from .non_finite import NonFiniteError, are_finite, name_non_finite
from .processes import Processes
from .replay import ReplayedLoader
from .schedule import mean_lr

__all__ = ['LoopSettings', 'TrainingLoop']

_logger = logging.getLogger('train')


@dataclass(frozen=True)
class LoopSettings:
    """How epochs are trained.

    Attributes:
        grad_accum_steps: batches of an update.
        clip_grad: limit that gradients are clipped to, None for none.
        clip_mode: what is limited: ``'norm'``, ``'value'``, or ``'agc'``, the norm relative to the weights'.
        mixup_off_epoch: epoch from which on batches are not mixed, 0 for never.
        log_interval: updates between log lines.
        recovery_interval: updates between recovery checkpoints, 0 for none.
        on_nan: what follows a loss or gradient that is NaN or infinite, see ``POLICIES`` of ``non_finite``.
    """

    grad_accum_steps: int = 1
    clip_grad: Optional[float] = None
    clip_mode: str = 'norm'
    mixup_off_epoch: int = 0
    log_interval: int = 50
    recovery_interval: int = 0
    on_nan: str = 'stop'

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
        settings: accumulation, clipping, logging.
        lr_scheduler: timm scheduler, stepped on every update; or None.
        checkpoints: writes recovery checkpoints, and where the run stands if it is interrupted.
        interruption: tells whether the run shall end.
        mixup_fn: mixes a batch, where the loader does not.
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
    ) -> None:
        self.task, self.loader, self.optimizer, self.compute = task, loader, optimizer, compute
        self.processes, self.settings, self.lr_scheduler = processes, settings, lr_scheduler
        self.checkpoints, self.interruption, self.mixup_fn = checkpoints, interruption, mixup_fn
        self.updates_per_epoch = -(-len(loader) // settings.grad_accum_steps)

    def train_epoch(self, position: Position) -> Dict[str, float]:
        """Trains an epoch from a position on, which moves with it, to the beginning of the next one.

        Args:
            position: where the run stands, changed in place.

        Returns:
            Mean of the loss and of each of its terms over the images of the epoch, of all processes.

        Raises:
            NonFiniteError: if a loss or a gradient is NaN or infinite, unless such updates are skipped.
            RunInterrupted: if the run was told to end; its position is saved.
        """
        epoch, batches, accumulation = position.epoch, len(self.loader), self.settings.grad_accum_steps
        if self.settings.mixup_off_epoch and epoch >= self.settings.mixup_off_epoch:
            self._turn_mixup_off()
        self.task.train()
        self.optimizer.zero_grad()
        log = _Log(self.settings.log_interval, self.updates_per_epoch)
        means, update_terms = _Means.at(position), _Means()
        for index, (images, target) in self.loader.run_epoch(epoch, position.batch):
            update = index // accumulation
            # The last update of an epoch may have fewer batches than the others.
            accumulated = min(accumulation, batches - update * accumulation)
            is_update = index == batches - 1 or (index + 1) % accumulation == 0
            images, target = self.compute.prepare(images, target)
            if self.mixup_fn is not None:
                images, target = self.mixup_fn(images, target)
            log.loaded()
            with nullcontext() if is_update else self.task.no_sync():
                with self.compute.autocast():
                    result = self.task(images, target)
                update_terms.add(result, images.shape[0])
                is_finite = self._backward(result['loss'] / accumulated, is_update, update_terms)
            if not is_update:
                continue
            if is_finite:
                means.add_all(update_terms)
            elif self.settings.on_nan == 'skip':
                _logger.warning(f'{self._name_non_finite(update_terms, epoch, update)}: the update is skipped')
            else:
                raise NonFiniteError(self._name_non_finite(update_terms, epoch, update))
            self.optimizer.zero_grad()
            num_updates = epoch * self.updates_per_epoch + update + 1
            self.task.update_ema(step=num_updates)
            log.updated(epoch, update, update_terms, mean_lr(self.optimizer))
            if self.lr_scheduler is not None:
                self.lr_scheduler.step_update(num_updates=num_updates, metric=log.losses.avg)
            update_terms = _Means()
            position.batch = index + 1
            self._save_if_wanted(position, means, update)
        metrics = means.compute(self.processes)
        position.epoch, position.batch, position.sums, position.images = epoch + 1, 0, {}, 0
        return metrics

    def _turn_mixup_off(self) -> None:
        self.loader.turn_mixup_off()
        if self.mixup_fn is not None:
            self.mixup_fn.mixup_enabled = False

    def _backward(self, loss: torch.Tensor, is_update: bool, update_terms: '_Means') -> bool:
        """Adds gradients, and with the last batch of an update takes the step, unless something is not finite.

        Returns:
            Whether all is finite; the same in all processes.
        """
        limit, mode = self.settings.clip_grad, self.settings.clip_mode
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
        if limit is not None:
            dispatch_clip_grad(clipped, value=limit, mode=mode)
        self.optimizer.step()
        return True

    def _name_non_finite(self, update_terms: '_Means', epoch: int, update: int) -> str:
        what = name_non_finite(update_terms.sums, self.task.get_trainable_module().named_parameters())
        return f'{what} in epoch {epoch}, update {update}, at a learning rate of {mean_lr(self.optimizer):.3g}'

    def _save_if_wanted(self, position: Position, means: '_Means', update: int) -> None:
        """Saves between two updates, every so often and if the run shall end."""
        signal_number = self.interruption.check() if self.interruption is not None else 0
        interval = self.settings.recovery_interval
        if self.checkpoints is None or not (signal_number or (interval and (update + 1) % interval == 0)):
            return
        position.sums, position.images = means.numbers(), means.images
        path = self.checkpoints.save_recovery(position)
        if signal_number:
            raise RunInterrupted(path, signal_number)


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

    def are_finite(self) -> bool:
        return bool(torch.stack(list(self.sums.values())).isfinite().all())

    def numbers(self) -> Dict[str, float]:
        """The sums as numbers, for which the device is waited for."""
        return {name: value.item() for name, value in self.sums.items()}

    def compute(self, processes: Processes) -> Dict[str, float]:
        """The means, over the images of all processes."""
        *sums, images = processes.sum([*self.numbers().values(), self.images])
        return OrderedDict((name, value / max(images, 1)) for name, value in zip(self.sums, sums))


class _Log:
    """Log lines of an epoch, as timm's script writes them.

    Args:
        interval: updates between them.
        updates_per_epoch: how many there are.
    """

    def __init__(self, interval: int, updates_per_epoch: int) -> None:
        self.interval, self.updates_per_epoch = interval, updates_per_epoch
        self.losses, self.update_time, self.data_time = AverageMeter(), AverageMeter(), AverageMeter()
        self.data_start = self.update_start = time.time()

    def loaded(self) -> None:
        """A batch is there."""
        self.data_time.update(time.time() - self.data_start)

    def updated(self, epoch: int, update: int, terms: _Means, lr: float) -> None:
        """An update is done; ``terms`` are those of its batches."""
        self.losses.update((terms.sums['loss'] / terms.images).item(), terms.images)
        now = time.time()
        self.update_time.update(now - self.update_start)
        self.update_start = self.data_start = now
        if update % self.interval == 0 or update == self.updates_per_epoch - 1:
            _logger.info(
                f'Train: {epoch} [{update:>4d}/{self.updates_per_epoch} '
                f'({100.0 * (update + 1) / self.updates_per_epoch:>3.0f}%)]  '
                f'Loss: {self.losses.val:#.3g} ({self.losses.avg:#.3g})  '
                f'Time: {self.update_time.val:.3f}s, {terms.images / self.update_time.val:>7.2f}/s  '
                f'({self.update_time.avg:.3f}s, {terms.images / self.update_time.avg:>7.2f}/s)  '
                f'LR: {lr:.3e}  '
                f'Data: {self.data_time.val:.3f} ({self.data_time.avg:.3f})'
            )
