"""Metrics of ``validate.py`` beside timm's: some classes only, reassessed labels, and averages over classes."""

import argparse
import os
from typing import Any, Dict, List, Optional

import torch
from timm.data import RealLabelsImagenet
from timm.task import ClassificationEvaluator

from ..errors import UsageError, usage_errors
from .processes import Processes

__all__ = ['ExtendedEvaluator', 'read_real_labels', 'read_valid_labels']


class ExtendedEvaluator(ClassificationEvaluator):
    """timm's evaluator of images of one class, with what ``validate.py`` adds.

    Args:
        device: of the model's output.
        processes: those that share the images.
        max_samples: images of this process that are none of another.
        valid_labels: indices of the classes that images have; their labels are positions in this list.
        real_labels: what the images show: ``top1`` and ``top5`` are by these labels then, over images that have any.
        average: how precision, recall and F1 are averaged over classes; none of them without it.
    """

    def __init__(
        self,
        device: torch.device,
        processes: Processes,
        *,
        max_samples: Optional[int] = None,
        valid_labels: Optional[List[int]] = None,
        real_labels: Optional[RealLabelsImagenet] = None,
        average: Optional[str] = None,
    ) -> None:
        self.processes, self.valid_labels, self.real_labels = processes, valid_labels, real_labels
        self.average = average
        self.predicted: List[torch.Tensor] = []
        self.targets: List[torch.Tensor] = []
        super().__init__(device, max_samples=max_samples)

    @torch.no_grad()
    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            output: logits (B, num_classes).
            target: class indices (B,).
        """
        if self.valid_labels is not None:
            output = output[:, self.valid_labels]
        before = self.num_samples
        super().update(output, target)
        count = self.num_samples - before  # the rest is padding
        if self.real_labels is not None:
            self.real_labels.add_result(output[:count])
        if self.average:
            self.predicted.append(output[:count].argmax(-1).cpu())
            self.targets.append(target[:count].cpu())

    def compute(self, distributed: bool = False) -> Dict[str, float]:
        """The metrics over the images of all processes, in percent."""
        metrics = super().compute(distributed)
        if self.real_labels is not None:
            for k, correct in self.real_labels.is_correct.items():
                right, count = self.processes.sum([float(sum(correct)), float(len(correct))])
                metrics[f'top{k}'] = 100 * right / max(count, 1)
        if self.average:
            metrics.update(self._averages(self.average))
        return metrics

    def _averages(self, average: str) -> Dict[str, float]:
        try:
            from sklearn.metrics import precision_recall_fscore_support
        except ImportError:
            raise UsageError('--metrics-avg needs scikit-learn: pip install "timm-gpd[demo]"')
        own = torch.cat(self.predicted).tolist(), torch.cat(self.targets).tolist()
        pairs = self.processes.gather_everywhere(own)
        predicted, targets = ([label for pair in pairs for label in pair[part]] for part in (0, 1))
        values = precision_recall_fscore_support(targets, predicted, average=average, zero_division=0)
        return {f'{average}_{name}': 100 * value for name, value in zip(('precision', 'recall', 'f1_score'), values)}


def read_valid_labels(path: str, num_classes: int) -> Optional[List[int]]:
    """Reads ``--valid-labels``.

    Args:
        path: a text file of class indices, one a line; empty for none.
        num_classes: the model's classes.

    Returns:
        The indices.

    Raises:
        UsageError: if a line is none, or the model lacks the class.
    """
    if not path:
        return None
    labels = []
    with open(path) as file, usage_errors('check --valid-labels', UnicodeDecodeError):
        for number, line in enumerate(file, start=1):
            text = line.strip()
            if not text.isdecimal() or int(text) >= num_classes:
                raise UsageError(f'line {number} of {path} is {text!r}, and no index of {num_classes} classes')
            labels.append(int(text))
    if len(set(labels)) < len(labels) or not labels:
        raise UsageError(f'{path} has {"one class twice" if labels else "no classes"}: check --valid-labels')
    return labels


def read_real_labels(args: argparse.Namespace, dataset: Any, processes: Processes) -> Optional[RealLabelsImagenet]:
    """Reads ``--real-labels``.

    Args:
        args: arguments of ``validate.py``.
        dataset: ImageNet's validation split; which image is which is told by the names of its files.
        processes: those that share the images; each takes every so many.

    Returns:
        timm's evaluator of these labels; None without the flag.

    Raises:
        UsageError: if they are not labels of these images.
    """
    if not args.real_labels:
        return None
    kinds = (ValueError, TypeError, KeyError, AssertionError, AttributeError, UnicodeDecodeError)
    with usage_errors('check --real-labels and --data-dir', *kinds):
        names = [os.path.basename(name) for name in dataset.filenames(basename=True)]
        try:
            labels = RealLabelsImagenet(names, real_json=args.real_labels)
        except AssertionError:
            raise UsageError(f'{args.real_labels} has not as many labels as there are images, which are {len(names)}')
    strangers = [name for name in names if name not in labels.real_labels]
    if strangers:
        raise UsageError(f'--real-labels are of ILSVRC2012_val_00000001.JPEG and so on, and not of {strangers[0]}')
    labels.filenames = names[processes.rank :: processes.world_size]
    return labels
