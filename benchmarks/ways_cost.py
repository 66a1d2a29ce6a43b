#!/usr/bin/env python3
"""Measures a step of every way of training a shared teacher against its floor, and writes a table into docs/cost.md.

A floor is what cannot be avoided: one training step of each plain model that must run, and of a paused teacher one
forward pass. As step_cost.py does it: in one process, in turns, ratios of the same turn, the median over turns; on the
CPU in processor time, which other programs disturb less.

    python benchmarks/ways_cost.py --models resnet18
"""

import argparse
import copy
import os
import statistics
from functools import partial
from typing import Any, Callable, Dict, Sequence

import torch
from timm.task import ClassificationTask

from cost_report import ROOT, load_results, write_report
from machine import device_name
from step_cost import ProcessorBench, median_ratio, time_in_turns
from timm_gpd import expand, hand_over
from timm_gpd.task.gap_control import Switch

Step = Callable[[], None]


class Decided(Switch):
    """A switch that computes what it would decide, and decides as it was told: a share of steps is paused."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.step = every, 0

    def decide(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        terms = super().decide(student, teacher, target)
        self.step += 1
        is_paused = self.every > 0 and self.step % self.every == 0
        return {**terms, 'paused': torch.full_like(terms['paused'], float(is_paused))}


class WayBench(ProcessorBench):
    """Steps of ways of training, and their floors."""

    def plain_models(self, ratios: Sequence[int]) -> Step:
        """One training step of the plain model of each ratio."""
        return _in_turn(*(self.plain(self._plain_model(ratio)) for ratio in ratios))

    def paused_floor(self) -> Step:
        """A training step of the plain student, and a forward pass of the plain wide model."""
        wide = self._plain_model(self.ratio).train()

        def forward() -> None:
            with torch.no_grad(), self._autocast():
                wide(self.x)

        return _in_turn(forward, self.plain(copy.deepcopy(self.student)))

    def way(self, **arguments: Any) -> Step:
        """A step of a task."""
        return self.step_of(self.task(**arguments))

    def nested(self, method: str, drawn: Sequence[int], **arguments: Any) -> Step:
        """A step of a task with ratios between, whose draw is always the same."""
        task = self.task(method=method, **arguments)
        assert task.ratios is not None
        task.ratios.draw = lambda: tuple(drawn)
        return self.step_of(task)

    def half_a_window(self) -> Step:
        """A step of joint training, and one of the student that has been handed over to plain training."""
        joint = self.task()
        plain = ClassificationTask(joint.get_student(), criterion=torch.nn.CrossEntropyLoss(), device=self.device)
        optimizers = [torch.optim.SGD(task.get_trainable_module().parameters(), lr=1e-3) for task in (joint, plain)]
        hand_over(joint, optimizers[0], plain, optimizers[1])
        return _in_turn(self.step_of(joint), self.step_of(plain))

    def _plain_model(self, ratio: int) -> torch.nn.Module:
        if ratio == 1:
            return copy.deepcopy(self.student)
        return self._to_device(expand(self.student, ratio, scale='teacher').wide)


def _in_turn(*steps: Step) -> Step:
    def step() -> None:
        for part in steps:
            part()

    return step


def ways(bench: WayBench) -> Dict[str, Dict[str, Any]]:
    """Every way: what its floor is in words, its floor, and a step of it, or a ``count`` of steps."""
    both, all_three = partial(bench.plain_models, (2, 1)), partial(bench.plain_models, (3, 2, 1))
    paused = bench.paused_floor
    return {
        'joint': dict(models='2, 1', floor=both, step=bench.way),
        'joint, ratio 3': dict(
            models='3, 1', floor=partial(bench.plain_models, (3, 1)), step=partial(bench.way, ratio=3)
        ),
        'scale balanced': dict(models='2, 1', floor=both, step=partial(bench.way, scale='balanced')),
        'sandwich, n = 1, ratio 3': dict(
            models='3, 2, 1', floor=all_three, step=partial(bench.nested, 'sandwich', (2,), ratio=3)
        ),
        'netaug, 2 of ratio 3 drawn': dict(
            models='2, 1', floor=both, step=partial(bench.nested, 'netaug', (2,), ratio=3)
        ),
        'switch, no step paused': dict(models='2, 1', floor=both, step=partial(bench.way, gap_control=Decided(0))),
        'switch, half of the steps paused': dict(
            models='2, 1 and 1, forward of 2',
            count=2,
            floor=lambda: _in_turn(both(), paused()),
            step=lambda: _twice(bench.way(gap_control=Decided(2))),
        ),
        'switch, all steps paused': dict(
            models='1, forward of 2', floor=paused, step=partial(bench.way, gap_control=Decided(1))
        ),
        'phases, half of the steps joint': dict(
            models='2, 1 and 1',
            count=2,
            floor=lambda: _in_turn(both(), bench.plain_models((1,))),
            step=bench.half_a_window,
        ),
    }


def _twice(step: Step) -> Step:
    return _in_turn(step, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['resnet18'])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--mode', default='fp32')
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--size', type=int, default=128, help='pixels of a side')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--output', default=os.path.join(ROOT, 'docs'), metavar='FOLDER')
    args = parser.parse_args()
    results = load_results(args.output)
    for name in args.models:
        bench = WayBench(name, args.device, args.mode, args.batch, args.size)
        for way, made in ways(bench).items():
            steps = {'floor': made['floor'](), 'plain': bench.plain_models((1,)), way: made['step']()}
            times = time_in_turns(bench, steps, args.repeats, args.warmup)
            row = dict(
                way=way,
                models=made['models'],
                floor=statistics.median(times['floor']),
                ratio=median_ratio(times[way], times['floor']),
                over_plain=median_ratio(times[way], times['plain']) / made.get('count', 1),
                setting=f'{args.device} {name} {args.mode}, {args.batch} at {args.size} px',
                processor=device_name(args.device),
                torch=torch.__version__,
            )
            print(f'{row["setting"]}, {way}: {row["ratio"]:.3f} of the floor', flush=True)
            results.setdefault('ways', {})[f'{row["setting"]}, {way}'] = row
            write_report(results, args.output)


if __name__ == '__main__':
    main()
