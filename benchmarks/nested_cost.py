#!/usr/bin/env python3
"""Measures a step of training with ratios between against its floor: one step of each plain model that must run.

As step_cost.py does it: in one process, in turns, ratios of the same turn; the median over turns.

    python benchmarks/nested_cost.py --models resnet18
"""

import argparse
import copy
import statistics
from typing import Callable, Dict, Sequence

from step_cost import Bench, median_ratio, time_in_turns
from timm_gpd import GapPreservingTask, expand

RATIO = 3


class NestedBench(Bench):
    """Steps of plain models of several ratios, and of tasks that train them together."""

    def plain_models(self, ratios: Sequence[int]) -> Callable[[], None]:
        """One training step of the plain model of each ratio."""
        steps = []
        for ratio in ratios:
            model = copy.deepcopy(self.student) if ratio == 1 else expand(self.student, ratio, scale='teacher').wide
            steps.append(self.plain(self._to_device(model)))

        def step() -> None:
            for part in steps:
                part()

        return step

    def method(self, method: str, drawn: Sequence[int], branches: int) -> Callable[[], None]:
        """One training step of a task whose draw is always the same."""
        task = GapPreservingTask(
            self.student,
            ratio=RATIO,
            method=method,
            num_branches=branches,
            device=self.device,
            verbose=False,
        )
        if task.ratios is not None:
            task.ratios.draw = lambda: tuple(drawn)
        return self.step_of(task)


def step_parser(description: str) -> argparse.ArgumentParser:
    """A parser of what says which steps are timed, and how often."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--models', nargs='+', default=['resnet18'])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--mode', default='fp32')
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--size', type=int, default=128, help='pixels of a side')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--warmup', type=int, default=2)
    return parser


def main() -> None:
    parser = step_parser(__doc__.splitlines()[0])
    parser.add_argument('--branches', type=int, default=1)
    args = parser.parse_args()
    for name in args.models:
        bench = NestedBench(name, args.device, args.mode, args.batch, args.size, ratio=RATIO)
        # A floor, and the step that must run these models.
        rows: Dict[str, Sequence[int]] = {'joint': (3, 1), 'sandwich': (3, 2, 1), 'netaug': (2, 1)}
        steps = {f'floor {ratios}': bench.plain_models(ratios) for ratios in rows.values()}
        for method, ratios in rows.items():
            drawn = ratios[1:-1] if method == 'sandwich' else ratios[:1]
            steps[method] = bench.method(method, drawn, args.branches)
        times = time_in_turns(bench, steps, args.repeats, args.warmup)
        for method, ratios in rows.items():
            floor = times[f'floor {ratios}']
            print(
                f'{args.device} {name} {args.mode} {args.batch} at {args.size} px, ratio {RATIO}, M = {args.branches}, '
                f'{method}, models of ratios {ratios}: floor {statistics.median(floor):.3f} s, time '
                f'{median_ratio(times[method], floor):.3f}',
                flush=True,
            )


if __name__ == '__main__':
    main()
