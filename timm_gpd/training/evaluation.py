"""Validation: models on images, and what a run reports after an epoch."""

import argparse
import logging
import time
from collections import OrderedDict
from functools import partial
from typing import Any, Callable, Dict, Optional

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.task import (
    ClassificationEvaluator,
    MultiLabelClassificationEvaluator,
    TrainingTask,
    evaluation_sample_limit,
)
from timm.utils import AverageMeter

from .attackers import Attacker
from .compute import Compute
from .task import get_teachers, get_validation_models

__all__ = ['Evaluation', 'EvaluatorFactory', 'evaluator_of', 'validate']

_logger = logging.getLogger('train')

EvaluatorFactory = Callable[..., ClassificationEvaluator]

_SHORT = {'loss': 'Loss', 'top1': 'Acc@1', 'top5': 'Acc@5'}


def evaluator_of(args: argparse.Namespace, device: torch.device) -> EvaluatorFactory:
    """What computes the metrics of ``--task``.

    Args:
        args: arguments of ``train.py`` or ``validate.py``.
        device: of the models.

    Returns:
        Makes one of timm's evaluators, of ``max_samples``, the images of this process that no other one has.
    """
    if args.task == 'multilabel':
        return partial(MultiLabelClassificationEvaluator, device, threshold=args.multilabel_threshold)
    return partial(ClassificationEvaluator, device)


class Evaluation:
    """Validates what a task trains: student, dynamic teacher, their gap, and the other teachers.

    Args:
        task: the task; its static teacher, if any, is validated once, here, unless it adapts.
        loader: batches of images (B, in_chans, H, W) and targets; None finds nothing.
        compute: device and precision.
        log_interval: batches between log lines.
        ema: validate the moving average, where there is one.
        create_evaluator: from :func:`evaluator_of` (default: of images of one class).
    """

    def __init__(
        self,
        task: TrainingTask,
        loader: Any,
        compute: Compute,
        log_interval: int,
        ema: bool = True,
        create_evaluator: Optional[EvaluatorFactory] = None,
    ) -> None:
        self.task, self.loader, self.compute, self.log_interval, self.ema = task, loader, compute, log_interval, ema
        self.create_evaluator = create_evaluator or partial(ClassificationEvaluator, compute.device)
        self.ranking = self.create_evaluator().default_metric
        self.static: Dict[str, float] = {}
        frozen = {prefix: each for prefix, each in get_teachers(task).items() if not _adapts(each)}
        if frozen and loader is not None:
            self.static = self._of_teachers(frozen, self._validate(frozen))

    def _validate(self, models: Dict[str, nn.Module]) -> Dict[str, float]:
        return validate(models, self.loader, self.compute, self.log_interval, self.create_evaluator)

    def _of_teachers(self, teachers: Dict[str, nn.Module], metrics: Dict[str, float]) -> Dict[str, float]:
        """Of each the one metric that is reported."""
        return {f'{prefix}{self.ranking}': metrics[f'{prefix}{self.ranking}'] for prefix in teachers}

    def __call__(self) -> Dict[str, float]:
        """Validates the models as they are now.

        Returns:
            What :func:`validate` gives: the student's metrics without prefix, the dynamic teacher's with ``teacher_``.
            ``gap`` is the dynamic teacher's top-1, or mAP of several labels, minus the student's, and ``static_top1``
            or ``static_map`` the static teacher's, ``ema_teacher_top1`` the EMA teacher's, in percent.
        """
        if self.loader is None:
            return {}
        models = get_validation_models(self.task, ema=self.ema and self.task.has_ema())
        adapting = {prefix: each for prefix, each in get_teachers(self.task).items() if _adapts(each)}
        found = self._validate({**models, **adapting})
        of_teachers = self._of_teachers(adapting, found)
        metrics = {name: value for name, value in found.items() if not name.startswith(tuple(adapting))}
        if f'teacher_{self.ranking}' in metrics:
            metrics['gap'] = metrics[f'teacher_{self.ranking}'] - metrics[self.ranking]
        metrics.update({**self.static, **of_teachers})
        return metrics


def _adapts(teacher: nn.Module) -> bool:
    return bool(getattr(teacher, 'adapts', False))  # timm's own teachers do not


@torch.inference_mode()
def validate(
    models: Dict[str, nn.Module],
    loader: Any,
    compute: Compute,
    log_interval: int,
    create_evaluator: Optional[EvaluatorFactory] = None,
    attacker: Optional[Attacker] = None,
) -> Dict[str, float]:
    """Validates several models in one pass over the images, of which each process has its part.

    Args:
        models: by the prefix of their metrics; the plain one is ``''``.
        loader: batches of images (B, in_chans, H, W) and targets.
        compute: device and precision.
        log_interval: batches between log lines, which are of this process's part.
        create_evaluator: gives what computes the metrics, see :func:`evaluator_of` (default: of images of one class).
        attacker: also validates each model on images that this has perturbed against it.

    Returns:
        For every prefix ``loss``, and in percent ``top1`` and ``top5`` or what else the evaluator computes, over the
        images of all processes; on perturbed images with ``robust_`` before these names.
    """
    limit = evaluation_sample_limit(loader)
    create_evaluator = create_evaluator or partial(ClassificationEvaluator, compute.device)
    kinds = [''] if attacker is None else ['', 'robust_']
    evaluators = {prefix + kind: create_evaluator(max_samples=limit) for prefix in models for kind in kinds}
    batch_time = AverageMeter()
    for model in models.values():
        model.eval()
    end = time.time()
    for index, (images, target) in enumerate(loader):
        images, target = compute.prepare(images, target)
        for prefix, model in models.items():
            for kind in kinds:
                shown = images
                if kind and attacker is not None:
                    with torch.inference_mode(False), compute.autocast():
                        shown = attacker(model, images.clone(), target.clone())
                with compute.autocast():
                    output = model(shown)
                evaluators[prefix + kind].update(output[0] if isinstance(output, (tuple, list)) else output, target)
        batch_time.update(time.time() - end)
        end = time.time()
        if index % log_interval == 0 or index == len(loader) - 1:
            for prefix, evaluator in evaluators.items():
                name = f'Test ({prefix.rstrip("_")})' if prefix else 'Test'
                means = [f'{_SHORT.get(key, key)}: {value:>7.3f}' for key, value in evaluator.summary().items()]
                times = f'Time: {batch_time.val:.3f} ({batch_time.avg:.3f})'
                _logger.info('  '.join([f'{name}: [{index:>4d}/{len(loader) - 1}]', times, *means]))
    metrics: Dict[str, float] = OrderedDict()
    for prefix, evaluator in evaluators.items():
        for key, value in evaluator.compute(distributed=dist.is_initialized()).items():
            metrics[prefix + key] = value
    return metrics
