#!/usr/bin/env python3
"""Draws the figures of docs/how_it_works.md into docs/figures/. Their numbers are those of a small layer.

python docs/site/figures.py
"""

from pathlib import Path
from typing import Sequence, Tuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
import torch.nn as nn
from matplotlib.axes import Axes

from timm_gpd import DynamicTeacher, GapPreservingTask

FIGURES = Path(__file__).resolve().parents[1] / 'figures'
STUDENT, REPLICA, TEACHER, STATIC, OPTIMIZER = '#4c72b0', '#9fb3d4', '#dd8452', '#8c8c8c', '#55a868'


class SmallStudent(nn.Module):
    """Three channels, then two: small enough for every number to be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 1)
        self.layer = nn.Conv2d(3, 2, 1, bias=False)
        self.fc = nn.Linear(2, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.8, -0.4, 0.2], [-0.6, 0.4, 1.0]])[..., None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer(self.stem(x)).mean((2, 3)))


def main() -> None:
    torch.manual_seed(0)
    task = GapPreservingTask(SmallStudent(), ratio=2, classifier='fc', verbose=False)
    FIGURES.mkdir(exist_ok=True)
    save(expansion(task.get_dynamic_teacher()), 'expansion')
    save(sharing(task), 'sharing')
    save(step(), 'step')


def save(figure: plt.Figure, name: str) -> None:
    """The same file every time, but for the version of matplotlib."""
    with plt.rc_context({'svg.hashsalt': name}):
        figure.savefig(FIGURES / f'{name}.svg', metadata={'Date': None}, bbox_inches='tight')
    plt.close(figure)


def weights(teacher: DynamicTeacher) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The layer's weight as it is stored, in the student, and in the dynamic teacher."""
    stored = teacher.wide.get_parameter('layer.weight')
    return tuple(
        weight.detach().flatten(1)
        for weight in (stored, teacher.student_parameters()['layer.weight'], teacher.extract_teacher().layer.weight)
    )


def matrix(axes: Axes, values: torch.Tensor, title: str, shared: bool = False) -> None:
    """Numbers on a grid; ``shared`` frames the entries that are the student's, too."""
    axes.imshow(values, cmap='RdBu_r', vmin=-1.6, vmax=1.6)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(column, row, f'{value:.2f}', ha='center', va='center', fontsize=8)
            if shared and row % 2 == column % 2 == 0:
                axes.add_patch(
                    plt.Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=STUDENT, linewidth=2.5)
                )
    axes.set(xticks=[], yticks=[], xlabel=f'{values.shape[1]} inputs', ylabel=f'{values.shape[0]} outputs')
    axes.set_title(title, fontsize=10)


def vector(axes: Axes, values: torch.Tensor, title: str, colors: Sequence[str]) -> None:
    axes.bar(range(len(values)), values, color=colors)
    axes.axhline(0, color='black', linewidth=0.6)
    axes.set(xticks=[], ylim=(-1.4, 1.4))
    axes.set_title(title, fontsize=9)


def expansion(teacher: DynamicTeacher) -> plt.Figure:
    """One layer of a student and of its dynamic teacher, with what goes in and comes out."""
    inputs = torch.tensor([1.0, -0.5, 0.75])
    figure, rows = plt.subplots(2, 3, figsize=(8, 4.6), gridspec_kw=dict(width_ratios=[1, 2.2, 1]))
    _, narrow, wide = weights(teacher)
    models = (
        ('student', narrow, inputs, [STUDENT]),
        ('dynamic teacher', wide, inputs.repeat_interleave(2), [STUDENT, REPLICA]),
    )
    for axes, (name, weight, x, colors) in zip(rows, models):
        vector(axes[0], x, 'channels in', colors)
        matrix(axes[1], weight, f'weight of the {name}')
        vector(axes[2], weight @ x, 'channels out', colors)
    figure.tight_layout()
    return figure


def sharing(task: GapPreservingTask) -> plt.Figure:
    """What is stored after some steps, and the two weights that are computed from it."""
    optimizer = torch.optim.SGD(task.get_learners().parameters(), lr=2.0)
    for _ in range(3):
        optimizer.zero_grad()
        task(torch.randn(8, 1, 4, 4), torch.arange(8) % 2)['loss'].backward()
        optimizer.step()
    stored, narrow, wide = weights(task.get_dynamic_teacher())
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), gridspec_kw=dict(width_ratios=[1.2, 2, 2]))
    matrix(axes[0], narrow, 'student: the framed entries')
    matrix(axes[1], stored, 'stored, and optimised', shared=True)
    matrix(axes[2], wide, 'dynamic teacher: all of them, divided by 2')
    figure.tight_layout()
    return figure


def step() -> plt.Figure:
    """What a step does, one after another, and whose activations it holds meanwhile."""
    boxes = [
        (0, 'forward', STATIC, 2),
        (1, 'forward', TEACHER, 1),
        (2, 'losses,\nbackward', TEACHER, 1),
        (3, 'forward', STUDENT, 0),
        (4, 'losses,\nbackward', STUDENT, 0),
        (5, 'optimizer', OPTIMIZER, 0.5),
    ]
    figure, (lanes, held) = plt.subplots(
        2, 1, figsize=(9, 4.2), sharex=True, gridspec_kw=dict(height_ratios=[2.4, 1], hspace=0.12)
    )
    for start, text, color, lane in boxes:
        lanes.add_patch(plt.Rectangle((start + 0.06, lane + 0.15), 0.88, 0.7, color=color, alpha=0.85))
        lanes.text(start + 0.5, lane + 0.5, text, ha='center', va='center', color='white', fontsize=9)
    arrows = [((0.94, 2.4), (2.3, 1.88), -0.12), ((0.94, 2.5), (4.5, 0.88), -0.12), ((2.5, 1.15), (4.06, 0.1), 0.3)]
    for start, end, bend in arrows:
        lanes.annotate(
            '', end, start, arrowprops=dict(arrowstyle='->', color='0.35', connectionstyle=f'arc3,rad={bend}')
        )
    lanes.text(3.1, 2.45, "the static teacher's logits and features", fontsize=8, color='0.35')
    lanes.text(1.1, 0.5, "the dynamic teacher's logits,\nas constants", fontsize=8, color='0.35')
    lanes.set(
        xlim=(0, 6), ylim=(0, 3), yticks=[0.5, 1.5, 2.5], yticklabels=['student', 'dynamic teacher', 'static teacher']
    )
    lanes.tick_params(length=0)
    held.fill_between([1, 2, 3], [0, 2, 0], color=TEACHER, alpha=0.6)
    held.fill_between([3, 4, 5], [0, 1, 0], color=STUDENT, alpha=0.6)
    held.set(ylim=(0, 2.4), xticks=[], yticks=[0, 1, 2], ylabel='activations held,\nin student widths')
    held.yaxis.label.set_size(8)
    for axes in (lanes, held):
        axes.spines[['top', 'right']].set_visible(False)
    return figure


if __name__ == '__main__':
    main()
