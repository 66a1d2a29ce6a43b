"""One epoch of training and one pass of validation, for any of timm's tasks."""
import argparse
import logging
import math
import time
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import TrainingTask
from timm.utils import AverageMeter, CheckpointSaver, NativeScaler, accuracy, dispatch_clip_grad

from ..errors import UsageError
from ..losses import check_finite
from .cpu import tune_cpu

__all__ = ['Compute', 'create_compute', 'mean_lr', 'train_one_epoch', 'validate']

_logger = logging.getLogger('train')


@dataclass
class Compute:
    """Where and in which precision a run computes."""
    device: torch.device
    autocast: Callable[[], Any] = nullcontext
    loss_scaler: Optional[NativeScaler] = None
    memory_format: torch.memory_format = torch.contiguous_format

    def prepare(self, *tensors: torch.Tensor) -> List[torch.Tensor]:
        """Moves a batch to the device, images into the memory format."""
        return [
            tensor.to(self.device, memory_format=self.memory_format if tensor.dim() == 4 else torch.preserve_format)
            for tensor in tensors
        ]


def create_compute(args: argparse.Namespace) -> Compute:
    """Reads ``--device``, ``--amp``, ``--amp-dtype`` and ``--channels-last``. Tunes the process for the CPU.

    Raises:
        UsageError: if the device is not there.
    """
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f'device {args.device} cannot be used: {str(error).splitlines()[0]} (try --device cpu)')
    if device.type == 'cpu':
        tune_cpu()
    compute = Compute(device)
    if args.channels_last:
        compute.memory_format = torch.channels_last
    if args.amp:
        dtype = getattr(torch, args.amp_dtype)
        compute.autocast = lambda: torch.autocast(device.type, dtype)
        if dtype == torch.float16:
            compute.loss_scaler = NativeScaler(device=device.type)
    return compute


def train_one_epoch(
        epoch: int,
        task: TrainingTask,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        args: argparse.Namespace,
        lr_scheduler: Any = None,
        saver: Optional[CheckpointSaver] = None,
        mixup_fn: Optional[Callable] = None,
) -> Dict[str, float]:
    """Trains for one epoch.

    Args:
        epoch: index of the epoch, from 0.
        task: what is trained; its result's ``loss`` is minimised, and every other scalar is averaged for the log.
        loader: batches of images (B, in_chans, H, W) and targets.
        optimizer: over the task's trainable module.
        compute: device and precision.
        args: ``grad_accum_steps``, ``clip_grad``, ``clip_mode``, ``mixup_off_epoch``, ``log_interval`` and
            ``recovery_interval`` are used.
        lr_scheduler: timm scheduler; stepped on every update.
        saver: writes recovery checkpoints.
        mixup_fn: mixes a batch, where the loader does not.

    Returns:
        Mean of the loss and of each of its terms, weighted by batch size.

    Raises:
        FloatingPointError: if the loss is NaN or infinite; names its terms that are.
    """
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        if mixup_fn is not None:
            mixup_fn.mixup_enabled = False
        elif getattr(loader, 'mixup_enabled', False):
            loader.mixup_enabled = False
    task.train()
    means = _ScalarMeans()
    loss_meter, update_time, data_time = AverageMeter(), AverageMeter(), AverageMeter()
    batches = len(loader)
    updates_per_epoch = -(-batches // args.grad_accum_steps)
    num_updates = epoch * updates_per_epoch
    samples = 0
    optimizer.zero_grad()
    data_start = update_start = time.time()
    for index, (images, target) in enumerate(loader):
        update = index // args.grad_accum_steps
        # The last update of an epoch may have fewer batches than the others.
        accumulated = min(args.grad_accum_steps, batches - update * args.grad_accum_steps)
        last_batch = index == batches - 1
        needs_update = last_batch or (index + 1) % args.grad_accum_steps == 0
        images, target = compute.prepare(images, target)
        if mixup_fn is not None:
            images, target = mixup_fn(images, target)
        data_time.update(time.time() - data_start)

        with nullcontext() if needs_update else task.no_sync():
            with compute.autocast():
                result = task(images, target)
            _backward(result['loss'] / accumulated, task, optimizer, compute, args, needs_update)
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
            update_time.update(time.time() - update_start)
            update_start = time.time()
            if update % args.log_interval == 0 or last_batch:
                lr = mean_lr(optimizer)
                _logger.info(
                    f'Train: {epoch} [{update:>4d}/{updates_per_epoch} '
                    f'({100. * (update + 1) / updates_per_epoch:>3.0f}%)]  '
                    f'Loss: {loss_meter.val:#.3g} ({loss_meter.avg:#.3g})  '
                    f'Time: {update_time.val:.3f}s, {samples / update_time.val:>7.2f}/s  '
                    f'({update_time.avg:.3f}s, {samples / update_time.avg:>7.2f}/s)  '
                    f'LR: {lr:.3e}  '
                    f'Data: {data_time.val:.3f} ({data_time.avg:.3f})')
            if saver is not None and args.recovery_interval and (update + 1) % args.recovery_interval == 0:
                saver.save_recovery(epoch, batch_idx=update)
            if lr_scheduler is not None:
                lr_scheduler.step_update(num_updates=num_updates, metric=loss_meter.avg)
            samples = 0
        data_start = time.time()
    return means.compute()


def _backward(
        loss: torch.Tensor,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        args: argparse.Namespace,
        needs_update: bool,
) -> None:
    clipped = task.get_clip_parameters(exclude_head='agc' in args.clip_mode) if args.clip_grad is not None else None
    if compute.loss_scaler is not None:
        compute.loss_scaler(
            loss, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=clipped,
            need_update=needs_update)
        return
    loss.backward()
    if needs_update:
        if clipped is not None:
            dispatch_clip_grad(clipped, value=args.clip_grad, mode=args.clip_mode)
        optimizer.step()


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate of an optimizer's parameter groups."""
    rates = [group['lr'] for group in optimizer.param_groups]
    return sum(rates) / len(rates)


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


@torch.inference_mode()
def validate(
        models: Dict[str, nn.Module],
        loader: Any,
        compute: Compute,
        log_interval: int,
) -> Dict[str, float]:
    """Validates several models in one pass over the images.

    Args:
        models: by the prefix of their metrics; the plain one is ``''``.
        loader: batches of images (B, in_chans, H, W) and class indices (B,).
        compute: device and precision.
        log_interval: batches between log lines.

    Returns:
        For every prefix ``loss``, and ``top1`` and ``top5`` in percent.
    """
    meters = {prefix + name: AverageMeter() for prefix in models for name in ('loss', 'top1', 'top5')}
    batch_time = AverageMeter()
    for model in models.values():
        model.eval()
    end = time.time()
    for index, (images, target) in enumerate(loader):
        images, target = compute.prepare(images, target)
        for prefix, model in models.items():
            with compute.autocast():
                output = model(images)
                if isinstance(output, (tuple, list)):
                    output = output[0]
                loss = F.cross_entropy(output, target)
            top1, top5 = accuracy(output, target, topk=(1, 5))
            for name, value in (('loss', loss), ('top1', top1), ('top5', top5)):
                meters[prefix + name].update(value.item(), images.shape[0])
        batch_time.update(time.time() - end)
        end = time.time()
        if index % log_interval == 0 or index == len(loader) - 1:
            for prefix in models:
                name = f'Test ({prefix.rstrip("_")})' if prefix else 'Test'
                loss, top1, top5 = (meters[prefix + key] for key in ('loss', 'top1', 'top5'))
                _logger.info(
                    f'{name}: [{index:>4d}/{len(loader) - 1}]  '
                    f'Time: {batch_time.val:.3f} ({batch_time.avg:.3f})  '
                    f'Loss: {loss.val:>7.3f} ({loss.avg:>6.3f})  '
                    f'Acc@1: {top1.val:>7.3f} ({top1.avg:>7.3f})  '
                    f'Acc@5: {top5.val:>7.3f} ({top5.avg:>7.3f})')
    return OrderedDict((name, meter.avg) for name, meter in meters.items())
