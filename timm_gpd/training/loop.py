"""One epoch of training, for any of timm's tasks."""

import argparse
import math
import time
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, Dict, Optional

import torch
from timm.data import Mixup
from timm.task import TrainingTask
from timm.utils import AverageMeter, CheckpointSaver, dispatch_clip_grad

from ..losses import check_finite
from .compute import Compute
from .progress import Progress
from .schedule import mean_lr

__all__ = ['LoopSettings', 'train_one_epoch']


@dataclass(frozen=True)
class LoopSettings:
    """How an epoch is trained.

    Attributes:
        grad_accum_steps: batches of an update.
        clip_grad: limit that gradients are clipped to, None for none.
        clip_mode: what is limited: ``'norm'``, ``'value'``, or ``'agc'``, the norm relative to the weights'.
        mixup_off_epoch: epoch from which on batches are not mixed, 0 for never.
        recovery_interval: updates between recovery checkpoints, 0 for none.
    """

    grad_accum_steps: int = 1
    clip_grad: Optional[float] = None
    clip_mode: str = 'norm'
    mixup_off_epoch: int = 0
    recovery_interval: int = 0

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> 'LoopSettings':
        """What the arguments of ``train.py`` say, under the same names."""
        return cls(**{setting.name: getattr(args, setting.name) for setting in fields(cls)})


def train_one_epoch(
    epoch: int,
    task: TrainingTask,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    compute: Compute,
    settings: LoopSettings = LoopSettings(),
    lr_scheduler: Any = None,
    saver: Optional[CheckpointSaver] = None,
    mixup_fn: Optional[Mixup] = None,
    progress: Optional[Progress] = None,
) -> Dict[str, float]:
    """Trains for one epoch.

    Args:
        epoch: index of the epoch, from 0.
        task: what is trained; its result's ``loss`` is minimised, and every other scalar is averaged for the log.
        loader: batches of images (B, in_chans, H, W) and targets.
        optimizer: over the task's trainable module.
        compute: device and precision.
        settings: accumulation, clipping, recovery.
        lr_scheduler: timm scheduler; stepped on every update.
        saver: writes recovery checkpoints.
        mixup_fn: mixes a batch, where the loader does not.
        progress: shows how far the run is.

    Returns:
        Mean of the loss and of each of its terms, weighted by batch size.

    Raises:
        FloatingPointError: if the loss is NaN or infinite; names its terms that are.
    """
    if settings.mixup_off_epoch and epoch >= settings.mixup_off_epoch:
        if mixup_fn is not None:
            mixup_fn.mixup_enabled = False
        elif getattr(loader, 'mixup_enabled', False):
            loader.mixup_enabled = False
    task.train()
    means = _ScalarMeans()
    loss_meter = AverageMeter()
    batches = len(loader)
    updates_per_epoch = -(-batches // settings.grad_accum_steps)
    num_updates = epoch * updates_per_epoch
    samples, data_seconds = 0, 0.0
    optimizer.zero_grad()
    data_start = update_start = time.time()
    for index, (images, target) in enumerate(loader):
        update = index // settings.grad_accum_steps
        # The last update of an epoch may have fewer batches than the others.
        accumulated = min(settings.grad_accum_steps, batches - update * settings.grad_accum_steps)
        last_batch = index == batches - 1
        needs_update = last_batch or (index + 1) % settings.grad_accum_steps == 0
        images, target = compute.prepare(images, target)
        if mixup_fn is not None:
            images, target = mixup_fn(images, target)
        data_seconds += time.time() - data_start

        with nullcontext() if needs_update else task.no_sync():
            with compute.autocast():
                result = task(images, target)
            _backward(result['loss'] / accumulated, task, optimizer, compute, settings, needs_update)
        means.update(result, images.shape[0])
        samples += images.shape[0]
        if needs_update:
            num_updates += 1
            optimizer.zero_grad()
            task.update_ema(step=num_updates)
            loss = result['loss'].item()
            if not math.isfinite(loss):
                means.check_finite()
            loss_meter.update(loss, images.shape[0])
            seconds, update_start = time.time() - update_start, time.time()
            if progress is not None:
                lr = mean_lr(optimizer)
                progress.step(epoch, update, loss, loss_meter.avg, lr, samples, seconds, data_seconds)
            if saver is not None and settings.recovery_interval and (update + 1) % settings.recovery_interval == 0:
                saver.save_recovery(epoch, batch_idx=update)
            if lr_scheduler is not None:
                lr_scheduler.step_update(num_updates=num_updates, metric=loss_meter.avg)
            samples, data_seconds = 0, 0.0
        data_start = time.time()
    return means.compute()


def _backward(
    loss: torch.Tensor,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    compute: Compute,
    settings: LoopSettings,
    needs_update: bool,
) -> None:
    limit, mode = settings.clip_grad, settings.clip_mode
    clipped = None if limit is None else task.get_clip_parameters(exclude_head='agc' in mode)
    if compute.loss_scaler is not None:
        compute.loss_scaler(
            loss, optimizer, clip_grad=limit, clip_mode=mode, parameters=clipped, need_update=needs_update
        )
        return
    loss.backward()
    if needs_update:
        if limit is not None:
            dispatch_clip_grad(clipped, value=limit, mode=mode)
        optimizer.step()


@dataclass
class _ScalarMeans:
    """Means of a task's scalars, kept on the device: reading them once an epoch does not stall it."""

    sums: Dict[str, torch.Tensor] = field(default_factory=dict)
    count: int = 0

    def update(self, result: Dict[str, torch.Tensor], batch_size: int) -> None:
        self.count += batch_size
        for name, value in result.items():
            if value.dim() == 0:
                self.sums[name] = self.sums.get(name, 0) + value.detach() * batch_size

    def check_finite(self) -> None:
        """Raises a FloatingPointError that names the terms that have been NaN or infinite."""
        check_finite(self.sums)

    def compute(self) -> Dict[str, float]:
        return OrderedDict((name, total.item() / self.count) for name, total in self.sums.items())
