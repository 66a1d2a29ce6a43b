#!/usr/bin/env python3
"""Measures steps with a switch: a paused one against its floor, and one that is not paused against joint training.

The floor of a paused step is one step of the plain student and one forward pass of the plain wide model. As
step_cost.py does it: in one process, in turns, ratios of the same turn, the median over turns; on the CPU in processor
time, which other programs disturb less.

    python benchmarks/gap_cost.py --models resnet18
"""

import copy
import statistics
import time
from typing import Callable, Dict

import torch

from nested_cost import step_parser
from step_cost import Bench, median_ratio, time_in_turns
from timm_gpd import GapPreservingTask, expand
from timm_gpd.task.gap_control import GapControl, Switch


class Decided(Switch):
    """A switch that computes what it would decide, and decides as it was told."""

    def __init__(self, is_paused: bool) -> None:
        super().__init__()
        self.is_paused = is_paused

    def decide(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        terms = super().decide(student, teacher, target)
        return {**terms, 'paused': torch.full_like(terms['paused'], float(self.is_paused))}


class GapBench(Bench):
    """Steps with a gap control, and what they are held against."""

    def seconds(self, step: Callable[[], None]) -> float:
        if self.device.type != 'cpu':
            return super().seconds(step)
        start = time.process_time()
        step()
        return time.process_time() - start

    def paused_floor(self) -> Callable[[], None]:
        wide = self._to_device(expand(self.student, self.ratio, scale='teacher').wide).train()
        train_student = self.plain(copy.deepcopy(self.student))

        def step() -> None:
            with torch.no_grad(), self._autocast():
                wide(self.x)
            train_student()

        return step

    def controlled(self, gap_control: GapControl) -> Callable[[], None]:
        return self.step_of(
            GapPreservingTask(
                self.student, ratio=self.ratio, gap_control=gap_control, device=self.device, verbose=False
            )
        )


def main() -> None:
    args = step_parser(__doc__.splitlines()[0]).parse_args()
    for name in args.models:
        bench = GapBench(name, args.device, args.mode, args.batch, args.size)
        steps = {
            'floor of paused': bench.paused_floor(),
            'joint': bench.controlled(GapControl()),
            'paused': bench.controlled(Decided(True)),
            'not paused': bench.controlled(Decided(False)),
        }
        times = time_in_turns(bench, steps, args.repeats, args.warmup)
        for step, reference in (('paused', 'floor of paused'), ('not paused', 'joint'), ('paused', 'joint')):
            print(
                f'{args.device} {name} {args.mode} {args.batch} at {args.size} px, {step}: over {reference} '
                f'({statistics.median(times[reference]):.3f} s) {median_ratio(times[step], times[reference]):.3f}',
                flush=True,
            )


if __name__ == '__main__':
    main()
