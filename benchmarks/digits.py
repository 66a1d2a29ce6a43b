#!/usr/bin/env python3
"""Trains the digits student alone and with a dynamic teacher, and prints their accuracy side by side.

Every run is one ``train.py`` process; runs whose folder is complete are not repeated. Exit codes: 0 done, 1 a run failed.

    python benchmarks/digits.py --seeds 5 --jobs 2
"""
import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, List

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def train(config: str, seed: int, output: str, extra: List[str]) -> Dict[str, float]:
    """Runs one training, on one core, and returns its last validation and how long it took in seconds."""
    experiment = f'{config}-{seed}'
    folder = os.path.join(output, experiment)
    log = os.path.join(output, f'{experiment}.log')
    if not os.path.isdir(os.path.join(folder, 'student')):
        command = [
            sys.executable, os.path.join(ROOT, 'train.py'), '--config', os.path.join(ROOT, 'configs', f'{config}.yaml'),
            '--seed', str(seed), '--output', output, '--experiment', experiment, *extra]
        start = time.time()
        with open(log, 'w') as file:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'}).returncode
        if code:
            sys.exit(f'{experiment} failed with exit code {code}: see {log}')
        with open(os.path.join(folder, 'seconds.txt'), 'w') as file:
            file.write(f'{time.time() - start:.1f}')
    with open(os.path.join(folder, 'summary.csv'), newline='') as file:
        row = list(csv.DictReader(file))[-1]
    with open(os.path.join(folder, 'seconds.txt')) as file:
        seconds = float(file.read())
    return {'top1': float(row['eval_top1']), 'teacher': float(row.get('eval_teacher_top1') or 'nan'),
            'seconds': seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--configs', nargs='+', default=['digits', 'digits_gpd'], help='names in configs/')
    parser.add_argument('--seeds', type=int, default=1, metavar='N', help='seeds 0 to N-1')
    parser.add_argument('--jobs', type=int, default=2, metavar='N', help='runs at a time, one core each')
    parser.add_argument('--output', default=os.path.join('output', 'digits'), metavar='DIR', help='where runs go')
    parser.add_argument('extra', nargs='*', metavar='ARG', help='after --: more arguments for every train.py')
    args = parser.parse_args()
    os.makedirs(args.output, exist_ok=True)
    jobs = [(config, seed) for seed in range(args.seeds) for config in args.configs]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {job: pool.submit(train, *job, args.output, args.extra) for job in jobs}
        results = {job: future.result() for job, future in tqdm(futures.items(), unit='run', disable=None)}

    print('| seed | ' + ' | '.join(args.configs) + ' |\n|---|' + '---|' * len(args.configs))
    for seed in range(args.seeds):
        print(f'| {seed} | ' + ' | '.join(f'{results[config, seed]["top1"]:.2f}' for config in args.configs) + ' |')
    for name, key, digits in (
            ('student top-1 (%)', 'top1', 2), ('dynamic teacher top-1 (%)', 'teacher', 2), ('seconds', 'seconds', 0)):
        cells = []
        for config in args.configs:
            values = [results[config, seed][key] for seed in range(args.seeds)]
            spread = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
            cells.append('' if values[0] != values[0] else f'{statistics.mean(values):.{digits}f}{spread}')
        print(f'| {name} | ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main()
