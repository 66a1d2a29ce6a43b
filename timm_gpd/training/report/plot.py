"""``gap.png``: accuracy of student and teachers over epochs, the gap between them, and what controls it."""

import logging
import math
import time
from typing import Any, Dict, List, Sequence

from .files import replaced_file

__all__ = ['GapPlot', 'draw_gap']

_logger = logging.getLogger('train')

# Of the time of a run, in drawing; and seconds in which a run is not worth a plot but its last.
MAX_SHARE, FIRST_AFTER = 0.02, 5.0
METRICS = {'top1': 'top-1', 'map': 'mean average precision'}  # the second of images with several labels
COLORS = {
    'student': 'tab:blue',
    'dynamic teacher': 'tab:orange',
    'static teacher': 'tab:gray',
    'EMA teacher': 'tab:purple',
    'gap': 'tab:green',
    'paused': 'tab:red',
    'factor': 'tab:red',
}
# What controls the gap: columns, with the axis's name, the curve's, and the unit that it is drawn in.
CONTROLS = {
    'train_paused': ('paused steps (%)', 'paused', 100.0),
    'train_gap_factor': ('factor for the gap', 'factor', 1.0),
}


class GapPlot:
    """Draws a run's plot again and again, for at most a fiftieth of its time. Without matplotlib it says so once.

    Args:
        path: of the PNG file.
        title: what stands above the plot.
    """

    def __init__(self, path: str, title: str) -> None:
        self.path, self.title = path, title
        self.next_time = time.monotonic() + FIRST_AFTER
        self.is_possible = True

    def update(self, rows: Sequence[Dict[str, str]], last: bool = False) -> None:
        """Draws the plot, unless that would be too soon after the last drawing.

        Args:
            rows: of ``summary.csv``. Those without an accuracy are skipped, and without any other nothing is drawn.
            last: draw it whatever it costs.
        """
        start = time.monotonic()
        rows = [row for row in rows if any(row.get(f'eval_{metric}') for metric in METRICS)]
        if not rows or not self.is_possible or start < self.next_time and not last:
            return
        try:
            draw_gap(rows, self.path, self.title)
        except ImportError:
            self.is_possible = False
            _logger.warning('gap.png was not drawn: pip install "timm-gpd[demo]" brings matplotlib')
        except OSError as error:  # a plot is not worth a run
            _logger.warning(f'gap.png was not drawn: {error.strerror or error}')
        end = time.monotonic()
        self.next_time = end + (end - start) / MAX_SHARE


def draw_gap(rows: Sequence[Dict[str, str]], path: str, title: str = '') -> Any:
    """Draws top-1 of the student and its teachers, and below it the gap where there is one.

    Below the gap is what controls it, if anything does: the share of paused steps, or the factor for a target.

    Of images with several labels it is the mean average precision.

    The axes fit the later half of the epochs: where earlier ones are out of their range, they are cut off. The best
    epoch of the student and the last one are marked.

    Args:
        rows: of ``summary.csv``, at least one, each with ``eval_top1`` or ``eval_map``.
        path: of the PNG file, which is replaced as a whole.
        title: what stands above the plot.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure  # optional, and slow to import

    epochs = [int(row['epoch']) for row in rows]
    metric = next(metric for metric in METRICS if rows[0].get(f'eval_{metric}'))
    student, teacher, static, average, gap = (
        _column(rows, f'eval_{name}')
        for name in (metric, f'teacher_{metric}', f'static_{metric}', f'ema_teacher_{metric}', 'gap')
    )
    controls = [name for name in CONTROLS if gap and _column(rows, name)]
    best = max(range(len(rows)), key=lambda index: (student[index], index))
    lower = bool(gap) + len(controls)
    figure = Figure(figsize=(7, 4.5 + 2 * lower), layout='constrained')
    panels = figure.subplots(1 + lower, sharex=True, squeeze=False, height_ratios=[2, *[1] * lower])[:, 0]

    top = panels[0]
    _curve(top, epochs, student, best, 'student', f'best in epoch {epochs[best]}')
    if teacher:
        _curve(top, epochs, teacher, best, 'dynamic teacher', 'then')
    if average:
        _curve(top, epochs, average, best, 'EMA teacher', 'then')
    if len(set(static)) > 1:  # it adapts
        _curve(top, epochs, static, best, 'static teacher', 'then')
    elif static:
        label = f'static teacher: {static[-1]:.2f}'
        top.axhline(static[-1], color=COLORS['static teacher'], linestyle='--', label=label)
    top.set(ylabel=f'{METRICS[metric]} (%)', title=title)
    _show_last_epochs(top, [curve for curve in (student, teacher, static, average) if curve], best)
    if gap:
        panels[1].axhline(0, color='black', linewidth=0.8)
        _curve(panels[1], epochs, gap, best, 'gap', 'then')
        panels[1].set(ylabel=f'gap (points of {METRICS[metric]})')
        _show_last_epochs(panels[1], [gap], best)
    for panel, column in zip(panels[2:], controls):
        label, name, unit = CONTROLS[column]
        values = [unit * value for value in _column(rows, column)]
        _curve(panel, epochs, values, best, name, 'then')
        panel.set(ylabel=label)
        _show_last_epochs(panel, [values], best)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(fontsize='small')
    panels[-1].set(xlabel='epoch')
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    with replaced_file(path) as partial:
        figure.savefig(partial, dpi=120, format='png')
    return figure


def _column(rows: Sequence[Dict[str, str]], name: str) -> List[float]:
    """A column's values, NaN in epochs that have none; empty where no epoch has one."""
    values = [float(row.get(name) or 'nan') for row in rows]
    return [] if all(map(math.isnan, values)) else values


def _curve(panel: Any, epochs: List[int], values: List[float], best: int, name: str, when: str) -> None:
    """A curve, with a star where the student was best and a dot at the end."""
    last = max(index for index, value in enumerate(values) if not math.isnan(value))
    end = 'at the end' if last == len(values) - 1 else f'in epoch {epochs[last]}'
    then = '' if math.isnan(values[best]) else f', {values[best]:.2f} {when}'
    color = COLORS[name]
    panel.plot(epochs, values, color=color, label=f'{name}: {values[last]:.2f} {end}{then}')
    panel.plot(epochs[best], values[best], '*', color=color, markersize=13, markeredgecolor='white')
    panel.plot(epochs[last], values[last], 'o', color=color, markersize=5)


def _show_last_epochs(panel: Any, curves: List[List[float]], best: int) -> None:
    """Fits the axis to the later half of all curves, and to their stars."""
    shown = []
    for curve in curves:
        known = [value for value in curve if not math.isnan(value)]
        shown += [*known[len(known) // 2 :], *([] if math.isnan(curve[best]) else [curve[best]])]
    margin = 0.08 * (max(shown) - min(shown)) or 1.0
    panel.set_ylim(min(shown) - margin, max(shown) + margin)
