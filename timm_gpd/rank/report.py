"""A ranking as a table, a chart and JSON."""

import dataclasses
import json
import os
from typing import Any, Dict, List, Sequence

from ..training.report.files import replaced_file
from .students import RankedStudent

__all__ = ['CHART_KINDS', 'draw_chart', 'table', 'write_json']

CHART_KINDS = ('.png', '.pdf', '.svg')
COLUMNS = ('student', 'score', '±', 'relation', 'semantic', 'parameters (M)', 'MACs (M)', 'ms per image')


def table(students: Sequence[RankedStudent]) -> str:
    """Writes a ranking in aligned columns.

    Args:
        students: the best first.

    Returns:
        A line for each, under the names of the columns.
    """
    rows: List[Sequence[str]] = [COLUMNS]
    for student in students:
        cost, deviation = student.cost, student.deviation
        rows.append(
            [
                student.name,
                f'{student.score:.4f}',
                '' if deviation is None else f'{deviation:.4f}',
                f'{student.relation:.4f}',
                f'{student.semantic:.4f}',
                f'{cost.parameters / 1e6:.2f}',
                f'{cost.macs / 1e6:.1f}',
                f'{cost.milliseconds:.2f}',
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )


def write_json(path: str, students: Sequence[RankedStudent], about: Dict[str, Any]) -> None:
    """Writes a ranking as JSON.

    Args:
        path: of the file, which is replaced as a whole.
        students: the best first.
        about: what they were ranked by.

    Raises:
        OSError: if the file cannot be written.
    """
    with replaced_file(path) as partial, open(partial, 'w') as file:
        json.dump({**about, 'students': [dataclasses.asdict(student) for student in students]}, file, indent=2)
        file.write('\n')


def draw_chart(path: str, students: Sequence[RankedStudent], title: str) -> None:
    """Draws a bar for the score of every student, with its deviation.

    Args:
        path: of the file, which is replaced as a whole; its ending, one of ``CHART_KINDS``, says of which kind it is.
        students: the best first.
        title: what stands above the chart.

    Raises:
        ImportError: without matplotlib.
        OSError: if the file cannot be written.
    """
    from matplotlib.figure import Figure  # optional, and slow to import

    figure = Figure(figsize=(7, 1.2 + 0.35 * len(students)), layout='constrained')
    axes = figure.subplots()
    axes.barh(
        [student.name for student in students],
        [student.score for student in students],
        xerr=[student.deviation or 0 for student in students],
        color='tab:blue',
        error_kw=dict(elinewidth=1, capsize=2),
    )
    axes.invert_yaxis()  # the best at the top
    axes.set(xlabel='score (higher is more alike)', title=title)
    with replaced_file(path) as partial:
        figure.savefig(partial, format=os.path.splitext(path)[1].lstrip('.'), dpi=150)
