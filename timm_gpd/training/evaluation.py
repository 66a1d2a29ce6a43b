"""What a run reports after an epoch: student, dynamic teacher, their gap, and the static teacher."""
from typing import Any, Dict

import torch
import torch.nn as nn
from timm.task import TrainingTask

from ..task.gap_preserving import GapPreservingTask
from .loop import Compute, validate

__all__ = ['Evaluation']


class Evaluation:
    """Validates what a task trains. Where there is a moving average, that is what is validated.

    Args:
        task: the task; its static teacher, if any, is validated once, here.
        loader: validation batches.
        compute: device and precision.
        log_interval: batches between log lines.
    """

    def __init__(self, task: TrainingTask, loader: Any, compute: Compute, log_interval: int) -> None:
        self.task, self.loader, self.compute, self.log_interval = task, loader, compute, log_interval
        self.static: Dict[str, float] = {}
        if getattr(task, 'teacher', None) is not None:
            metrics = self._validate({'static_': task.teacher})
            self.static = {'static_top1': metrics['static_top1']}

    def _validate(self, models: Dict[str, nn.Module]) -> Dict[str, float]:
        return validate(models, self.loader, self.compute, self.log_interval)

    def __call__(self) -> Dict[str, float]:
        """Metrics without prefix are the student's; ``gap`` is the dynamic teacher's lead in top-1, in percent."""
        ema = self.task.has_ema()
        if isinstance(self.task, GapPreservingTask):
            # As plain models: the two inside the dynamic teacher compute their parameters anew for every batch.
            dynamic_teacher = self.task.get_dynamic_teacher(ema=ema)
            models = {'': dynamic_teacher.extract_student(), 'teacher_': dynamic_teacher.extract_teacher()}
        else:
            models = {'': self.task.get_eval_model(ema=ema)}
        metrics = self._validate(models)
        if 'teacher_top1' in metrics:
            metrics['gap'] = metrics['teacher_top1'] - metrics['top1']
        metrics.update(self.static)
        return metrics
