#!/usr/bin/env python3
"""Trains robust digits students by several ways, each with a dynamic teacher and without, and attacks them.

    python benchmarks/robust.py measure --seeds 3 --results robust.jsonl  # resumable
    python benchmarks/robust.py report --results robust.jsonl             # the table

For every seed a static teacher, half as wide again, is trained adversarially first, on the student's images. Every run
is ``train.py`` and then ``validate.py --adv pgd --adv-steps 20`` on the 899 test images, in a process of its own, and
one line of JSON in ``--results``: what it was, what came out, its processor time, the commands, commit and versions.
Processes are forked, as importing torch takes longer than a short run. Lines that are there are not run again. Exit
codes: 0 done, 1 a run failed.
"""

import argparse
import json
import os
import platform
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Tuple

import timm
import torch
from tqdm import tqdm

from machine import processor_name

ROOT = Path(__file__).resolve().parents[1]

TEACHER = 'static teacher'
ATTACK = ['--adv', 'pgd', '--adv-eps', '16/255', '--adv-step', '8/255', '--adv-steps', '3']
JUDGE = ['--adv', 'pgd', '--adv-eps', '16/255', '--adv-step', '2/255', '--adv-steps', '20']
GPD = ['--gpd', '--gpd-noise', '0.5']
STATIC = ['--kd-model-name', 'local-dir:{teacher}']
AS_PUBLISHED = ['--task-loss-weight', '0', '--distill-loss-weight', '1']
DGAD = [*ATTACK, *STATIC, *AS_PUBLISHED, '--kd-distill-type', 'dgad']
IGDM = [*ATTACK, *STATIC, *AS_PUBLISHED, '--kd-distill-type', 'adaad,igdm']
# Flags of train.py behind the configuration.
WAYS: Dict[str, List[str]] = {
    TEACHER: [*ATTACK, '--model-kwargs', 'channels=[12,24,48,96]', 'stem_width=6'],
    'no attack': [],
    'adversarial': ATTACK,
    'adversarial, GPD': [*ATTACK, *GPD],
    'dgad': DGAD,
    'dgad, GPD': [*DGAD, *GPD],
    'adaad + igdm': IGDM,
    'adaad + igdm, GPD': [*IGDM, *GPD],
    'GPD, --gpd-loss dgad': [*ATTACK, *GPD, '--gpd-loss', 'dgad'],
    'GPD, --gpd-loss igdm': [*ATTACK, *GPD, '--gpd-loss', 'igdm'],
}

Trial = Tuple[str, int]  # way and seed
Record = Dict[str, Any]


def read(path: Path) -> Dict[Trial, Record]:
    """The lines that are there."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(record['way'], record['seed']): record for record in map(json.loads, lines)}


def measure(path: Path, seeds: int, epochs: int, jobs: int, output: Path) -> None:
    """Runs what has no line yet: seed by seed, the static teacher first."""
    found = read(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)

    def run(trial: Trial) -> None:
        record = train_and_attack(*trial, epochs, output)
        with open(path, 'a') as file:
            file.write(json.dumps(record) + '\n')

    with tqdm(total=seeds * len(WAYS) - len(found), unit='run', disable=None) as progress:
        for seed in range(seeds):
            for ways in ([TEACHER], [way for way in WAYS if way != TEACHER]):
                missing = [(way, seed) for way in ways if (way, seed) not in found or must_be_there(way, seed, output)]
                with ThreadPoolExecutor(jobs) as pool:
                    for _ in pool.map(run, missing):
                        progress.update()


def must_be_there(way: str, seed: int, output: Path) -> bool:
    """Whether a static teacher has a line, and its weights are elsewhere."""
    return way == TEACHER and not (output / f'{way}-{seed}' / 'student').is_dir()


def train_and_attack(way: str, seed: int, epochs: int, output: Path) -> Record:
    """One run, in a process of its own and on one core."""
    name = f'{way}-{seed}'
    data = ['--data-dir', str(output / 'data'), '--seed', str(seed), '--digits-train-size', '888']
    student = output / name / 'student'
    shutil.rmtree(output / name, ignore_errors=True)  # of a run that was interrupted
    flags = [flag.format(teacher=output / f'{TEACHER}-{seed}' / 'student') for flag in WAYS[way]]
    train = ['train.py', '--config', str(ROOT / 'configs' / 'digits.yaml'), *data, '--epochs', str(epochs)]
    train += ['--warmup-epochs', '1', '--val-split', '', '--output', str(output), '--experiment', name, *flags]
    validate = ['validate.py', '--model', f'local-dir:{student}', '--pretrained', '--dataset', 'digits', *data]
    validate += ['--split', 'test', '--device', 'cpu', '--workers', '0', '--batch-size', '500', *JUDGE]
    with tempfile.TemporaryFile('w+') as out:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            os._exit(run_commands([train, validate]))
        _, status, usage = os.wait4(child, 0)
        out.seek(0)
        printed = out.read()
    if status:
        sys.exit(f'{name} failed with exit code {os.waitstatus_to_exitcode(status)}: {printed[-500:]}')
    result = json.loads(printed.rpartition('--result\n')[2])
    return {
        'way': way,
        'seed': seed,
        'epochs': epochs,
        'top1': result['top1'],
        'robust_top1': result['robust_top1'],
        'processor_seconds': round(usage.ru_utime + usage.ru_stime, 1),
        'commands': [
            ' '.join(command).replace(f'{ROOT}{os.sep}', '').replace(str(output), 'output')
            for command in (train, validate)
        ],
        'commit': subprocess.run(
            ['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        'processor': processor_name(),
        'versions': {'torch': torch.__version__, 'timm': timm.__version__, 'python': platform.python_version()},
    }


def run_commands(commands: List[List[str]]) -> int:
    """Runs programs of the project one after another in this process. Returns the exit code."""
    sys.path.insert(0, str(ROOT))
    for command in commands:
        sys.argv = command
        try:
            runpy.run_path(str(ROOT / command[0]), run_name='__main__')
        except SystemExit as ending:
            if ending.code:
                return 1
        finally:
            sys.stdout.flush()
    return 0


def report(found: Dict[Trial, Record]) -> str:
    """The table: means and deviations over seeds, and the robust top-1 over that of plain adversarial training."""
    lines = ['| way | seeds | clean top-1 | PGD-20 top-1 | over adversarial | seconds |', '|---|---|---|---|---|---|']
    for way in WAYS:
        records = {seed: record for (name, seed), record in found.items() if name == way}
        if not records:
            continue
        plain = {seed: record for (name, seed), record in found.items() if name == 'adversarial'}
        over = [records[seed]['robust_top1'] - plain[seed]['robust_top1'] for seed in records if seed in plain]
        cells = [
            *(spread([record[key] for record in records.values()]) for key in ('top1', 'robust_top1')),
            '' if way in (TEACHER, 'adversarial') else spread(over, '+'),
            f'{statistics.mean(record["processor_seconds"] for record in records.values()):.0f}',
        ]
        lines.append(f'| {way} | {len(records)} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def spread(values: List[float], sign: str = '') -> str:
    """Mean and standard deviation, empty of no values."""
    if not values:
        return ''
    deviation = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{sign}.1f}{deviation}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    for name in ('measure', 'report'):
        command = commands.add_parser(name)
        command.add_argument('--results', type=Path, default=Path('robust.jsonl'), metavar='FILE', help='JSON lines')
    command = commands.choices['measure']
    command.add_argument('--seeds', type=int, default=3, metavar='N', help='seeds 0 to N-1')
    command.add_argument('--epochs', type=int, default=4, metavar='N', help='of every run')
    command.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at a time, one core each')
    command.add_argument('--output', type=Path, default=Path('output', 'robust'), metavar='DIR', help='where runs go')
    args = parser.parse_args()
    if args.command == 'measure':
        torch.set_num_threads(1)
        measure(args.results, args.seeds, args.epochs, args.jobs, args.output.resolve())
    else:
        print(report(read(args.results)))


if __name__ == '__main__':
    main()
