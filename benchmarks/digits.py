#!/usr/bin/env python3
"""Trains a student on scikit-learn's digits, alone and with a dynamic teacher, and prints their accuracy side by side.

Every run is one ``train.py`` process, and a line of ``output/digits.jsonl``; what is there is not run again.
Exit codes: 0 done, 1 a run failed.

    python benchmarks/digits.py --seeds 5 --jobs 2
"""

import argparse
import statistics
from typing import Sequence

from runs import ROOT, Results, Trial
from ways import PLAIN

WAYS = (PLAIN, 'noise 0.5')
LEARNING_RATE, EPOCHS = 0.1, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=1, metavar='N', help='seeds 0 to N-1, of the training images, too')
    parser.add_argument('--jobs', type=int, default=2, metavar='N', help='runs at a time, one core each')
    args = parser.parse_args()
    results = Results(ROOT / 'output' / 'digits.jsonl', ROOT / 'configs' / 'digits.yaml', str(ROOT / 'data'), args.jobs)
    seeds = range(args.seeds)
    records = results.measure([Trial(way, LEARNING_RATE, EPOCHS, seed, 'test') for seed in seeds for way in WAYS])

    def values(way: str, key: str) -> Sequence[float]:
        return [records[Trial(way, LEARNING_RATE, EPOCHS, seed, 'test')][key] for seed in seeds]

    alone, student, teacher = values(PLAIN, 'top1'), values(WAYS[1], 'top1'), values(WAYS[1], 'teacher_top1')
    print('| top-1 (%) of 899 digits | alone | with GPD | its dynamic teacher |\n|---|---|---|---|')
    for seed in seeds:
        print(f'| seed {seed} | {alone[seed]:.2f} | {student[seed]:.2f} | {teacher[seed]:.2f} |')
    if args.seeds > 1:
        spreads = (f'{statistics.mean(v):.2f} ± {statistics.stdev(v):.2f}' for v in (alone, student, teacher))
        print(f'| mean ± deviation | {" | ".join(spreads)} |')
    seconds = [f'{statistics.mean(values(way, "processor_seconds")):.0f}' for way in WAYS]
    print(f'| processor time (s) | {seconds[0]} | {seconds[1]} | |')


if __name__ == '__main__':
    main()
