"""``summary.csv``: a row of metrics for every validated epoch, in timm's columns."""

import csv
import os
from typing import Dict, List, Mapping

from ...errors import UsageError
from .files import replaced_file, write_csv

__all__ = ['Summary', 'summary_row']


def summary_row(
    epoch: int,
    train: Mapping[str, float],
    validation: Mapping[str, float],
    lr: float,
) -> Dict[str, float]:
    """An epoch's metrics under the names and in the order of timm's ``summary.csv``.

    Args:
        epoch: index of the epoch, from 0.
        train: means of the loss and of its terms over the epoch.
        validation: what validation found; nothing where there was none.
        lr: mean learning rate at the end of the epoch.

    Returns:
        ``epoch``, ``train_<name>``, ``eval_<name>`` and ``lr``.
    """
    return {
        'epoch': epoch,
        **{f'train_{name}': value for name, value in train.items()},
        **{f'eval_{name}': value for name, value in validation.items()},
        'lr': lr,
    }


class Summary:
    """The file, which has one set of columns and each epoch once. It is replaced as a whole whenever it changes.

    Args:
        path: of the file; it need not be there yet.
        has_phases: whether epochs differ in what they tell: a column is then empty where an epoch has nothing.
    """

    def __init__(self, path: str, has_phases: bool = False) -> None:
        self.path, self.has_phases = path, has_phases

    def rows(self) -> List[Dict[str, str]]:
        """All rows, in the order of epochs, as text by column."""
        if not os.path.isfile(self.path):
            return []
        with open(self.path, newline='') as file:
            return list(csv.DictReader(file))

    def write(self, row: Mapping[str, float]) -> None:
        """Adds an epoch. Where it or later ones are there already, they have been run again, and give way.

        Args:
            row: from :func:`summary_row`.

        Raises:
            UsageError: if the rows that are there have other columns.
        """
        before = self._rows_before(int(row['epoch']))
        columns = list(before[0] if before else row)
        if self.has_phases:
            fewer, more = sorted((columns, list(row)), key=len)
            columns = more + [column for column in fewer if column not in more]
        elif before and before[0].keys() != row.keys():
            missing, new = before[0].keys() - row.keys(), row.keys() - before[0].keys()
            changes = [f'no {", ".join(sorted(missing))}'] * bool(missing) + [', '.join(sorted(new))] * bool(new)
            raise UsageError(
                f'{self.path} has rows of a run with other columns, and this one has {" but ".join(changes)}: '
                'resume with the arguments of that run, or into a folder of its own (--experiment)'
            )
        self._replace([*before, row], columns)

    def truncate(self, epoch: int) -> None:
        """Forgets an epoch and all later ones, which will be run again.

        Args:
            epoch: index of the first epoch that goes, from 0.
        """
        rows, before = self.rows(), self._rows_before(epoch)
        if len(before) < len(rows):
            self._replace(before, list(rows[0]))

    def _rows_before(self, epoch: int) -> List[Dict[str, str]]:
        return [row for row in self.rows() if int(row['epoch']) < epoch]

    def _replace(self, rows: List[Mapping[str, object]], columns: List[str]) -> None:
        with replaced_file(self.path) as partial, open(partial, 'w', newline='') as file:
            write_csv(file, rows, columns)
