"""The folder of a run: all that it takes to read and to repeat it."""

import argparse
import csv
import logging
import os
import tempfile
from datetime import datetime
from typing import Any, Dict, List

import timm
import torch
import yaml
from timm.models import safe_model_name
from timm.task import TrainingTask
from timm.utils import update_summary

from ..errors import UsageError
from ..student_folder import PLOT, read_metrics, save_student
from ..version import __version__
from .student import InputConfig
from .task import get_student

__all__ = ['RunFolder']

_logger = logging.getLogger('train')


class RunFolder:
    """``<output>/<experiment>/`` with ``args.yaml``, ``summary.csv``, checkpoints, ``student/`` and ``gap.png``.

    Args:
        args: arguments of the run.
        input_config: input of the student, for the default name.

    Raises:
        UsageError: if the folder cannot be written, or holds another run than the one that is resumed.
    """

    def __init__(self, args: argparse.Namespace, input_config: InputConfig) -> None:
        name = args.experiment or '-'.join(
            [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(input_config.input_size[-1])]
        )
        self.path = os.path.join(args.output or os.path.join('output', 'train'), name)
        self.args = dict(vars(args))
        self.results: List[Dict[str, Any]] = []
        continued = args.resume and os.path.dirname(os.path.abspath(args.resume)) == os.path.abspath(self.path)
        if os.path.exists(self.file('args.yaml')) and not continued:
            raise UsageError(
                f'{self.path} holds another run: choose another --experiment, or --resume its last.pth.tar'
            )
        try:
            os.makedirs(self.path, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise UsageError(f'cannot write to {self.path}: {error.strerror}; choose another --output')

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def open(self) -> None:
        """Notes the command as it was given, with every default, and the versions.

        ``train.py --config args.yaml`` repeats the run.
        """
        versions = dict(timm_gpd=__version__, timm=timm.__version__, torch=str(torch.__version__))
        with open(self.file('args.yaml'), 'w') as file:
            yaml.safe_dump({**self.args, 'versions': versions}, file, default_flow_style=False)

    def write_epoch(self, epoch: int, train: Dict[str, float], validation: Dict[str, float], lr: float) -> None:
        """Adds a row to ``summary.csv``."""
        path = self.file('summary.csv')
        update_summary(epoch, train, validation, filename=path, lr=lr, write_header=not os.path.exists(path))
        self.results.append({'epoch': epoch, 'train': train, 'validation': validation})

    def best_results(self, metric: str, lower_is_better: bool, count: int = 10) -> List[Dict[str, Any]]:
        """The best epochs, best first, as timm's script prints them."""
        return sorted(self.results, key=lambda row: row['validation'][metric], reverse=not lower_is_better)[:count]

    def finish(self, task: TrainingTask) -> None:
        """Writes the last epoch's student, the averaged one where there is an average, and the plot."""
        self.plot_gap()
        save_student(
            get_student(task, ema=task.has_ema()),
            self.file('student'),
            self.args,
            read_metrics(self.file('summary.csv')),
            self.file(PLOT),
        )
        _logger.info(f'Student written to {self.file("student")}')

    def plot_gap(self) -> None:
        """Plots top-1 of student, dynamic teacher and static teacher over epochs to ``gap.png``."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            _logger.warning('gap.png was not drawn: pip install "timm-gpd[demo]" brings matplotlib')
            return
        with open(self.file('summary.csv'), newline='') as file:
            rows = [row for row in csv.DictReader(file) if row.get('eval_top1')]
        figure = Figure(figsize=(7, 4.5), layout='constrained')
        axes = figure.subplots()
        for column, label, style in (
            ('eval_top1', 'student', '-'),
            ('eval_teacher_top1', 'dynamic teacher', '-'),
            ('eval_static_top1', 'static teacher', '--'),
        ):
            if rows and column in rows[0]:
                values = [float(row[column]) for row in rows]
                axes.plot([int(row['epoch']) for row in rows], values, style, label=f'{label}: {values[-1]:.2f} %')
        axes.set(xlabel='epoch', ylabel='top-1 (%)', title=self.args['model'])
        axes.grid(alpha=0.3)
        axes.legend(loc='lower right')
        figure.savefig(self.file(PLOT), dpi=120)
