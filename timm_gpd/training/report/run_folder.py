"""The folder of a run: all that it takes to read and to repeat it."""

import logging
import os
import tempfile
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Dict, Iterator, List, Optional

import timm
import torch
import yaml
from timm.models import safe_model_name
from timm.task import TrainingTask

from ...errors import UsageError
from ...student_folder import PLOT, read_metrics, save_student
from ...version import __version__
from ..args.arguments import Arguments
from ..processes import Processes
from ..student import InputConfig
from ..task import get_student
from .files import remove_partial_files, replaced_file
from .plot import GapPlot
from .summary import Summary, summary_row

__all__ = ['RunFolder']

_logger = logging.getLogger('train')

# Arguments that decide which columns summary.csv has.
OF_COLUMNS = ('gpd', 'task', 'kd_model_name', 'kd_distill_type')


class RunFolder:
    """``<output>/<experiment>/`` and the files of a run in it: ``docs/run_folder.md`` lists them.

    Args:
        args: arguments of the run.
        input_config: input of the student, for the default name.
        processes: those that train together; the first one writes, the others know the path.

    Raises:
        UsageError: if the folder cannot be written, or holds another run than the one that is resumed.

    Attributes:
        path: of the folder.
        summary: its ``summary.csv``.
    """

    def __init__(self, args: Arguments, input_config: InputConfig, processes: Optional[Processes] = None) -> None:
        name = args.experiment or '-'.join(
            [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(input_config.input_size[-1])]
        )
        self.is_primary = processes is None or processes.is_primary
        name = name if processes is None else processes.share(name)
        self.path = os.path.join(args.output or os.path.join('output', 'train'), name)
        self.args, self.given = dict(vars(args)), args.given
        self.results: List[Dict[str, Any]] = []
        self.summary = Summary(self.file('summary.csv'), has_phases=bool(args.gpd and args.gpd_epochs))
        self.plot = GapPlot(self.file(PLOT), args.model)
        if self.is_primary:
            self._prepare(args.resume)

    def _prepare(self, resume: str) -> None:
        own = os.path.dirname(os.path.abspath(resume)) == os.path.abspath(self.path) if resume else False
        if os.path.exists(self.file('args.yaml')):
            if not (own or resume == 'auto'):
                raise UsageError(
                    f'{self.path} holds another run: choose another --experiment, or --resume its last.pth.tar'
                )
            self._check_columns()
        there = self.path
        while not os.path.exists(there):
            there = os.path.dirname(there) or os.curdir
        with self._writing(), tempfile.TemporaryFile(dir=there):
            pass

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(f'cannot write to {self.path}: {error.strerror}; choose another --output')

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _check_columns(self) -> None:
        """A run that goes on has the columns of the rows that are there."""
        with open(self.file('args.yaml')) as file:
            before = yaml.safe_load(file) or {}
        names = OF_COLUMNS if self.args['kd_model_name'] else OF_COLUMNS[:-1]
        for name in names if self.summary.rows() else ():
            old, new = before.get(name), self.args.get(name)
            if name in before and old != new:
                raise UsageError(
                    f'{self.path} holds a run with {name} {old!r}, and this one has {new!r}: resume with the arguments '
                    'of that run, or into a folder of its own (--experiment)'
                )

    def open(self) -> None:
        """Makes the folder, and notes the command as it was given, with every default, and the versions.

        ``train.py --config args.yaml`` repeats the run.
        """
        if not self.is_primary:
            return
        with self._writing():
            os.makedirs(self.path, exist_ok=True)
        remove_partial_files(self.path)
        versions = dict(timm_gpd=__version__, timm=timm.__version__, torch=str(torch.__version__))
        with replaced_file(self.file('args.yaml')) as partial, open(partial, 'w') as file:
            yaml.safe_dump({**self.given, 'versions': versions}, file, default_flow_style=False)

    def truncate(self, epoch: int) -> None:
        """Forgets what ``summary.csv`` says of an epoch and of all later ones, which will be run again.

        Args:
            epoch: index of the first epoch that goes, from 0.
        """
        if self.is_primary:
            self.summary.truncate(epoch)

    def has_results(self) -> bool:
        """Whether any epoch has been written. The first process knows."""
        return bool(self.summary.rows())

    def write_epoch(
        self,
        epoch: int,
        train: Dict[str, float],
        validation: Dict[str, float],
        lr: float,
    ) -> Dict[str, float]:
        """Adds a row to ``summary.csv``, and now and then draws ``gap.png`` anew.

        Args:
            epoch: index of the epoch, from 0.
            train: means of the loss and of its terms over the epoch.
            validation: what validation found; nothing where there was none.
            lr: mean learning rate at the end of the epoch.

        Returns:
            The row, by column.

        Raises:
            UsageError: if the file has rows with other columns.
        """
        row = summary_row(epoch, train, validation, lr)
        if self.is_primary:
            self.summary.write(row)
            self.plot.update(self.summary.rows())
        self.results.append({'epoch': epoch, 'train': train, **({'validation': validation} if validation else {})})
        return row

    def best_results(self, metric: str, lower_is_better: bool, count: int = 10) -> List[Dict[str, Any]]:
        """The best epochs, best first, as timm's script prints them; those that have the metric."""
        found = [(row.get('validation', row['train']).get(metric), row) for row in self.results]
        known = [(value, row) for value, row in found if value is not None]
        return [row for _, row in sorted(known, key=lambda pair: pair[0], reverse=not lower_is_better)][:count]

    def finish(self, task: TrainingTask) -> None:
        """Writes the last epoch's student, the averaged one where there is an average, and the plot."""
        if not self.is_primary:
            return
        self.plot.update(self.summary.rows(), last=True)
        save_student(
            get_student(task, ema=task.has_ema()),
            self.file('student'),
            self.args,
            read_metrics(self.summary.path),
            self.file(PLOT),
        )
        _logger.info(f'Student written to {self.file("student")}')
