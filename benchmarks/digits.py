#!/usr/bin/env python3
"""Trains the digits student alone and with a dynamic teacher, and prints their accuracy side by side.

Every run is one ``train.py`` process; runs whose folder is complete are not repeated.
Exit codes: 0 done, 1 a run failed.

    python benchmarks/digits.py --seeds 5 --jobs 2
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, List, Tuple

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

Results = Dict[Tuple[str, int], Dict[str, float]]


def config_arguments(config: str) -> List[str]:
    """Arguments of ``train.py`` that choose a file in ``configs/``."""
    return ['--config', os.path.join(ROOT, 'configs', f'{config}.yaml')]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that the digits benchmarks share."""
    parser.add_argument('--seeds', type=int, default=1, metavar='N', help='seeds 0 to N-1')
    parser.add_argument('--jobs', type=int, default=2, metavar='N', help='runs at a time, one core each')
    parser.add_argument('--output', default=os.path.join('output', 'digits'), metavar='DIR', help='where runs go')
    parser.add_argument('extra', nargs='*', metavar='ARG', help='after --: more arguments for every train.py')


def measure(runs: Dict[Tuple[str, int], List[str]], args: argparse.Namespace) -> Results:
    """Trains what is not yet trained.

    Args:
        runs: arguments of ``train.py`` by name and seed.
        args: from a parser with :func:`add_arguments`.

    Returns:
        By name and seed: ``top1`` of the student and of the dynamic ``teacher`` (NaN if there is none) in percent, and
        ``seconds`` of the run.
    """
    os.makedirs(args.output, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {
            run: pool.submit(_train, *run, [*arguments, *args.extra], args.output) for run, arguments in runs.items()
        }
        return {run: future.result() for run, future in tqdm(futures.items(), unit='run', disable=None)}


def summarize(results: Results, name: str, key: str, digits: int = 2) -> str:
    """Mean and standard deviation of a run over its seeds, empty if it has no such value."""
    values = [result[key] for (run, _), result in results.items() if run == name]
    if any(value != value for value in values):
        return ''
    spread = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{spread}'


def _train(name: str, seed: int, arguments: List[str], output: str) -> Dict[str, float]:
    """Runs one training, on one core, and returns its last validation and how long it took in seconds."""
    experiment = f'{name}-{seed}'
    folder = os.path.join(output, experiment)
    log = os.path.join(output, f'{experiment}.log')
    if not os.path.isdir(os.path.join(folder, 'student')):
        command = [
            sys.executable,
            os.path.join(ROOT, 'train.py'),
            *arguments,
            '--seed',
            str(seed),
            '--output',
            output,
            '--experiment',
            experiment,
        ]
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        start = time.time()
        with open(log, 'w') as file:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'}
            ).returncode
        if code:
            sys.exit(f'{experiment} failed with exit code {code}: see {log}')
        with open(os.path.join(folder, 'seconds.txt'), 'w') as file:
            file.write(f'{time.time() - start:.1f}')
    with open(os.path.join(folder, 'summary.csv'), newline='') as file:
        row = list(csv.DictReader(file))[-1]
    with open(os.path.join(folder, 'seconds.txt')) as file:
        seconds = float(file.read())
    return {
        'top1': float(row['eval_top1']),
        'teacher': float(row.get('eval_teacher_top1') or 'nan'),
        'seconds': seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--configs', nargs='+', default=['digits', 'digits_gpd'], help='names in configs/')
    add_arguments(parser)
    args = parser.parse_args()
    results = measure(
        {(config, seed): config_arguments(config) for seed in range(args.seeds) for config in args.configs}, args
    )

    print('| seed | ' + ' | '.join(args.configs) + ' |\n|---|' + '---|' * len(args.configs))
    for seed in range(args.seeds):
        print(f'| {seed} | ' + ' | '.join(f'{results[config, seed]["top1"]:.2f}' for config in args.configs) + ' |')
    for name, key, digits in (
        ('student top-1 (%)', 'top1', 2),
        ('dynamic teacher top-1 (%)', 'teacher', 2),
        ('seconds', 'seconds', 0),
    ):
        print(f'| {name} | ' + ' | '.join(summarize(results, config, key, digits) for config in args.configs) + ' |')


if __name__ == '__main__':
    main()
