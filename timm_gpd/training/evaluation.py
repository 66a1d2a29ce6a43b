"""Validation: models on images, and what a run reports after an epoch."""

import logging
import time
from collections import OrderedDict
from typing import Any, Dict

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import TrainingTask
from timm.utils import AverageMeter, accuracy

from .compute import Compute
from .task import get_validation_models

__all__ = ['Evaluation', 'validate']

_logger = logging.getLogger('train')


class Evaluation:
    """Validates what a task trains: student, dynamic teacher, their gap, and the static teacher.

    Args:
        task: the task; its static teacher, if any, is validated once, here.
        loader: batches of images (B, in_chans, H, W) and class indices (B,).
        compute: device and precision.
        log_interval: batches between log lines.
        ema: validate the moving average, where there is one.
    """

    def __init__(
        self,
        task: TrainingTask,
        loader: Any,
        compute: Compute,
        log_interval: int,
        ema: bool = True,
    ) -> None:
        self.ema = ema
        self.task, self.loader, self.compute, self.log_interval = task, loader, compute, log_interval
        self.static: Dict[str, float] = {}
        static_teacher = getattr(task, 'teacher', None)  # as timm's distillation tasks call it
        if static_teacher is not None:
            metrics = self._validate({'static_': static_teacher})
            self.static = {'static_top1': metrics['static_top1']}

    def _validate(self, models: Dict[str, nn.Module]) -> Dict[str, float]:
        return validate(models, self.loader, self.compute, self.log_interval)

    def __call__(self) -> Dict[str, float]:
        """Validates the models as they are now.

        Returns:
            What :func:`validate` gives: the student's metrics without prefix, the dynamic teacher's with ``teacher_``.
            ``gap`` is the dynamic teacher's lead in top-1, and ``static_top1`` the static teacher's, in percent.
        """
        metrics = self._validate(get_validation_models(self.task, ema=self.ema and self.task.has_ema()))
        if 'teacher_top1' in metrics:
            metrics['gap'] = metrics['teacher_top1'] - metrics['top1']
        metrics.update(self.static)
        return metrics


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
                losses, first, fifth = (meters[prefix + key] for key in ('loss', 'top1', 'top5'))
                _logger.info(
                    f'{name}: [{index:>4d}/{len(loader) - 1}]  '
                    f'Time: {batch_time.val:.3f} ({batch_time.avg:.3f})  '
                    f'Loss: {losses.val:>7.3f} ({losses.avg:>6.3f})  '
                    f'Acc@1: {first.val:>7.3f} ({first.avg:>7.3f})  '
                    f'Acc@5: {fifth.val:>7.3f} ({fifth.avg:>7.3f})'
                )
    return OrderedDict((name, meter.avg) for name, meter in meters.items())
