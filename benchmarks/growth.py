#!/usr/bin/env python3
"""Plots how the cost of a GPD step grows with the ratio and with the branches: docs/growth.png and docs/growth.json.

Costs are in steps of the plain student, timed in turns in one process. In theory a ratio r costs 1 + r^2 of them: the
teacher has r times the channels on either side of every layer.

    python benchmarks/growth.py
"""

import argparse
import json
import os
import sys

import matplotlib

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from cost_report import ROOT
from machine import device_name
from step_cost import Bench, median_ratio, time_in_turns

matplotlib.use('Agg')
import matplotlib.pyplot as plt


def measure(arguments: dict, ratio: int, branches: int, repeats: int) -> float:
    """Time of a GPD step over the plain student's."""
    bench = Bench(**arguments, ratio=ratio)
    times = time_in_turns(bench, {name: bench.subject(name) for name in ('student', str(branches))}, repeats)
    return median_ratio(times[str(branches)], times['student'])


def plot(results: dict, path: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=False)
    ratios, costs = zip(*sorted((int(ratio), cost) for ratio, cost in results['ratio'].items()))
    left.plot(ratios, costs, 'o-', label='measured, M = 1')
    left.plot(ratios, [1 + ratio**2 for ratio in ratios], '--', color='gray', label='theory, 1 + r²')
    left.set(xlabel='ratio r', xticks=ratios, ylabel='GPD step / plain student step', ylim=(0, None))
    branches, costs = zip(*sorted((int(count), cost) for count, cost in results['branches'].items()))
    right.plot(branches, costs, 'o-', label='measured, r = 2')
    right.axhline(5, ls='--', color='gray', label='theory without branches, 1 + r²')
    right.set(xlabel='branches M', xticks=branches, ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.suptitle(
        f'{results["model"]}, batch {results["batch"]} at {results["size"]} px, {results["device"]}', fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet18')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--ratios', nargs='+', type=int, default=[1, 2, 3, 4])
    parser.add_argument('--branches', nargs='+', type=int, default=[1, 2, 3, 4, 5, 6])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--output', default=os.path.join(ROOT, 'docs'), metavar='FOLDER')
    args = parser.parse_args()
    cell = dict(name=args.model, device=args.device, mode='fp32', batch=args.batch, size=args.size)
    results = dict(
        model=args.model, batch=args.batch, size=args.size, device=device_name(args.device), ratio={}, branches={}
    )
    for ratio in args.ratios:
        results['ratio'][ratio] = measure(cell, ratio, 1, args.repeats)
        print(f'ratio {ratio}, M = 1: {results["ratio"][ratio]:.2f} student steps', flush=True)
    for branches in args.branches:
        results['branches'][branches] = measure(cell, 2, branches, args.repeats)
        print(f'ratio 2, M = {branches}: {results["branches"][branches]:.2f} student steps', flush=True)
    os.makedirs(args.output, exist_ok=True)
    with open(os.path.join(args.output, 'growth.json'), 'w') as file:
        json.dump(results, file, indent=1)
        file.write('\n')
    plot(results, os.path.join(args.output, 'growth.png'))


if __name__ == '__main__':
    main()
