#!/usr/bin/env python3
"""Trains the digits student with a static teacher, by several losses, each alone and with a dynamic teacher.

For every seed the static teacher is trained first, on the student's images. Every run is one ``train.py`` process; runs
whose folder is complete are not repeated. Exit codes: 0 done, 1 a run failed.

    python benchmarks/digits_distill.py --seeds 3 --jobs 2
"""

import argparse
import os

from digits import add_arguments, config_arguments, measure, summarize

LOSSES = ['kd', 'dkd', 'dist', 'reviewkd', 'ofa']
TEACHER = 'digits_teacher'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--losses', nargs='+', default=LOSSES, metavar='NAME', help='values of --kd-distill-type')
    add_arguments(parser)
    args = parser.parse_args()
    seeds = range(args.seeds)
    results = measure({(TEACHER, seed): config_arguments(TEACHER) for seed in seeds}, args)
    rows = {'no static teacher': ('digits', 'digits_gpd')}
    runs = {(name, seed): config_arguments(name) for seed in seeds for name in ('digits', 'digits_gpd')}
    for loss in args.losses:
        rows[loss] = (loss, f'{loss}_gpd')
        for name, config in zip(rows[loss], ('digits', 'digits_gpd')):
            for seed in seeds:
                student = os.path.join(args.output, f'{TEACHER}-{seed}', 'student')
                runs[name, seed] = [
                    *config_arguments(config),
                    '--kd-distill-type',
                    loss,
                    '--kd-model-name',
                    f'local-dir:{student}',
                ]
    results.update(measure(runs, args))

    print(f'Static teacher: {summarize(results, TEACHER, "top1")} %, {summarize(results, TEACHER, "seconds", 0)} s\n')
    print('| loss | student alone | student with GPD | dynamic teacher | seconds alone | seconds with GPD |')
    print('|---|---|---|---|---|---|')
    for row, (alone, joint) in rows.items():
        cells = [
            summarize(results, alone, 'top1'),
            summarize(results, joint, 'top1'),
            summarize(results, joint, 'teacher'),
            summarize(results, alone, 'seconds', 0),
            summarize(results, joint, 'seconds', 0),
        ]
        print(f'| {row} | {" | ".join(cells)} |')


if __name__ == '__main__':
    main()
