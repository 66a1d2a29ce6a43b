#!/usr/bin/env python3
"""Looks for ways of training that make a student better than plain training: at equal epochs, and at equal cost.

    python -m timm_gpd.data.glyphs data/glyphs
    python benchmarks/study.py search   # successive halving over ways and learning rates, on the validation split
    python benchmarks/study.py lengths  # plain training's learning rate where it takes longer, on the validation split
    python benchmarks/study.py confirm  # the winners and plain training, fresh seeds, on the test split
    python benchmarks/study.py report   # tables, and accuracy against cost as a picture beside the results

What counts was said before it was run. A way gains at equal epochs if over at least five fresh seeds, paired by seed
and each at its own best learning rate, its students' mean top-1 on the test split is above that of plain training by
half a point and by two standard errors of the difference. It gains at equal cost if the same holds against plain
training that took as much processor time, or more. Plain training is a line, not a point: it is confirmed for 1, 2, 4
and 8 times the epochs, and the best way for twice as many.

Every run is one ``train.py`` process, and one line of JSON in ``--results``: what it was, what came out, its processor
time, the command, commit, processor and versions. Lines that are there are not run again, so an interrupted study goes
on where it stopped. A round of the search may run elsewhere, with ``--device cuda`` and many ``--jobs``; what is
confirmed runs on one CPU, as costs are compared. Exit codes: 0 done, 1 a run failed.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

import timm
import torch
from tqdm import tqdm

from machine import processor_name

ROOT = Path(__file__).resolve().parents[1]

PLAIN = 'plain'
# Ways of training: flags behind the configuration of plain training.
WAYS: Dict[str, str] = {
    PLAIN: '',
    'gpd': '--gpd',
    'weight 1': '--gpd --gpd-weight 1',
    'weight falls': '--gpd --gpd-weight-schedule cosine',
    'teacher scale': '--gpd --gpd-scale teacher',
    'balanced': '--gpd --gpd-scale balanced',
    'balanced, share 1/4': '--gpd --gpd-scale balanced --gpd-share-weight 0.25',
    'share 0': '--gpd --gpd-share-weight 0',
    'kl, T = 2': '--gpd --gpd-loss kl --gpd-loss-args temperature=2',
    'kl, standardized': '--gpd --gpd-loss kl --gpd-loss-args temperature=2 standardize=true',
    'dkd': '--gpd --gpd-loss dkd --gpd-weight 1',
    'wttm': '--gpd --gpd-loss wttm --gpd-weight 1',
    'first half': '--gpd --gpd-epochs 0.0-0.5',
    'second half': '--gpd --gpd-epochs 0.5-1.0',
    'last quarter': '--gpd --gpd-epochs 0.75-1.0',
    'ratio 3': '--gpd --gpd-ratio 3',
    'sandwich': '--gpd --gpd-ratio 3 --gpd-method sandwich --gpd-between 1',
    'switch': '--gpd --gpd-switch',
    'gap 0.1, teacher': '--gpd --gpd-gap-target 0.1',
    'gap 0.2, distillation': '--gpd --gpd-gap-target 0.2 --gpd-gap-scales distillation',
    'netaug': '--gpd --gpd-method netaug',
    'netaug, ratio 3': '--gpd --gpd-ratio 3 --gpd-method netaug',
}
LEARNING_RATES = (0.1, 0.2, 0.4, 0.8, 1.6)
FEWEST_EPOCHS = {'last quarter': 4}  # of ways whose window would hold none
LENGTHS = (1, 2, 4, 8)  # of plain training, over the others', each twice the one before
LONGER = 2  # of the best way
SEARCH_SEED, FIRST_FRESH_SEED = 0, 100

Record = Dict[str, Any]


class Trial(NamedTuple):
    """One run.

    Attributes:
        way: a key of ``WAYS``.
        lr: learning rate.
        epochs: of the schedule.
        seed: of the run.
        split: on which the student is measured.
    """

    way: str
    lr: float
    epochs: int
    seed: int
    split: str


class Results:
    """The lines of a study, and the runs that add to them.

    Args:
        path: file of JSON lines.
        config: configuration of plain training, a file.
        data_dir: folder of the data.
        jobs: runs at a time.
        device: where they compute.
    """

    def __init__(self, path: Path, config: Path, data_dir: str, jobs: int, device: str = 'cpu') -> None:
        self.path, self.config, self.data_dir, self.jobs, self.device = path, config, data_dir, jobs, device
        self.lock = threading.Lock()
        lines = path.read_text().splitlines() if path.exists() else []
        self.records: Dict[Trial, Record] = {}
        for record in map(json.loads, lines):
            self.records[Trial(**{name: record[name] for name in Trial._fields})] = record

    def measure(self, trials: Sequence[Trial]) -> Dict[Trial, Record]:
        """Runs what has no line yet. Returns the records of all."""
        missing = sorted((trial for trial in trials if trial not in self.records), key=lambda trial: -trial.epochs)
        with ThreadPoolExecutor(self.jobs) as pool:
            for _ in tqdm(pool.map(self._run, missing), total=len(missing), unit='run', disable=None):
                pass
        return {trial: self.records[trial] for trial in trials}

    def _run(self, trial: Trial) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = self.command(trial)
            seconds = _call([*command, '--output', folder, '--experiment', 'run'])
            with open(Path(folder, 'run', 'summary.csv'), newline='') as file:
                row = list(csv.DictReader(file))[-1]
        record = {
            **trial._asdict(),
            'top1': float(row['eval_top1']),
            'teacher_top1': float(row['eval_teacher_top1']) if row.get('eval_teacher_top1') else None,
            'device': self.device,
            'processor_seconds': round(seconds, 1),
            'command': ' '.join(part.removeprefix(f'{ROOT}{os.sep}') for part in command[1:]),
            'commit': subprocess.run(
                ['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True
            ).stdout.strip(),
            'processor': torch.cuda.get_device_name() if self.device == 'cuda' else processor_name(),
            'versions': {'torch': torch.__version__, 'timm': timm.__version__, 'python': platform.python_version()},
        }
        with self.lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, 'a') as file:
                file.write(json.dumps(record) + '\n')
            self.records[trial] = record

    def command(self, trial: Trial) -> List[str]:
        """The command of a run, without where it writes to."""
        return [
            sys.executable,
            *(str(ROOT / 'train.py'), '--config', str(self.config), '--data-dir', self.data_dir),
            *('--lr', str(trial.lr), '--epochs', str(trial.epochs), '--seed', str(trial.seed)),
            *('--val-split', trial.split, '--val-interval', str(trial.epochs), '--device', self.device),
            *WAYS[trial.way].split(),
        ]


def _call(command: Sequence[str]) -> float:
    """Runs a command on one core. Returns its processor time in seconds."""
    with tempfile.TemporaryFile('w+') as log:
        path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f'{" ".join(command)} failed with exit code {process.returncode}: {log.read()[-500:]}')
    return usage.ru_utime + usage.ru_stime


def search(
    results: Results,
    ways: Sequence[str],
    lrs: Sequence[float],
    rungs: Sequence[int],
    keep: float,
) -> List[Trial]:
    """Successive halving: all ways at all learning rates for few epochs, the best share of them for more, and so on.

    Plain training stays at all its learning rates: it is what the others are compared with. A way that needs more
    epochs than a round has waits for the next one.

    Args:
        results: where lines go.
        ways: keys of ``WAYS``.
        lrs: learning rates to begin with.
        rungs: epochs of each round.
        keep: the share of candidates that goes on.

    Returns:
        The last round's trials, the best first.
    """
    candidates = [(way, lr) for way in ways for lr in lrs]
    ranked: List[Trial] = []
    for number, epochs in enumerate(rungs):
        waiting = [(way, lr) for way, lr in candidates if epochs < FEWEST_EPOCHS.get(way, 0)]
        trials = [
            Trial(way, lr, epochs, SEARCH_SEED, 'validation') for way, lr in candidates if (way, lr) not in waiting
        ]
        found = results.measure(trials)
        ranked = sorted(trials, key=lambda trial: -found[trial]['top1'])
        print(f'round {number}, {epochs} epochs:')
        for trial in ranked:
            print(f'  {found[trial]["top1"]:6.2f}  {trial.way}, lr {trial.lr}')
        others = [(trial.way, trial.lr) for trial in ranked if trial.way != PLAIN]
        kept = others[: max(1, round(len(others) * keep))]
        candidates = [(way, lr) for way, lr in candidates if way == PLAIN] + kept + waiting
    return ranked


def search_lengths(results: Results, epochs: int, lengths: Sequence[int]) -> None:
    """Plain training for longer: at twice the epochs the learning rate that was best before, and half of it.

    Args:
        results: with a search's lines.
        epochs: of one length.
        lengths: of plain training, over ``epochs``.
    """
    for shorter, length in zip(lengths, lengths[1:]):
        lr = best_learning_rate(results, PLAIN, shorter * epochs)
        results.measure([Trial(PLAIN, lr * by, length * epochs, SEARCH_SEED, 'validation') for by in (1, 0.5)])


def best_of_search(results: Results) -> Dict[str, Dict[int, Trial]]:
    """The best run of the search, by way and epochs."""
    best: Dict[str, Dict[int, Trial]] = {}
    for trial, record in results.records.items():
        if trial.seed == SEARCH_SEED:
            of_way = best.setdefault(trial.way, {})
            other = of_way.get(trial.epochs)
            if other is None or record['top1'] > results.records[other]['top1']:
                of_way[trial.epochs] = trial
    return best


def best_learning_rate(results: Results, way: str, epochs: int) -> float:
    """The learning rate of the best run of a way in the search."""
    found = best_of_search(results).get(way, {}).get(epochs)
    if found is None:
        sys.exit(f'nothing is known about {way} for {epochs} epochs: search first, or name other --epochs')
    return found.lr


def confirm(
    results: Results,
    ways: Sequence[str],
    seeds: int,
    epochs: int,
    lengths: Sequence[int],
    split: str,
) -> None:
    """Trains ways and plain training with fresh seeds.

    Args:
        results: with the lines of a search and of the lengths.
        ways: besides plain training, the best first: that one runs ``LONGER`` times as many epochs, too.
        seeds: fresh seeds of each.
        epochs: of each way.
        lengths: of plain training, over ``epochs``.
        split: on which they are measured.
    """
    runs = [(way, best_learning_rate(results, way, epochs), epochs) for way in ways]
    runs += [(PLAIN, best_learning_rate(results, PLAIN, epochs * length), epochs * length) for length in lengths]
    runs += [(ways[0], best_learning_rate(results, ways[0], epochs), epochs * LONGER)] if ways else []
    fresh = range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + seeds)
    results.measure([Trial(*run, seed, split) for run in runs for seed in fresh])


def best_ways(results: Results, epochs: int, count: int) -> List[str]:
    """The best ways besides plain training, by their best run of so many epochs in the search."""
    runs = [of_way[epochs] for way, of_way in best_of_search(results).items() if way != PLAIN and epochs in of_way]
    return [run.way for run in sorted(runs, key=lambda run: -results.records[run]['top1'])[:count]]


def searched(results: Results) -> str:
    """A table of the search: the best top-1 of every way after so many epochs, and its learning rate."""
    best = best_of_search(results)
    rounds = sorted({trial.epochs for of_way in best.values() for trial in of_way.values()})
    rounds = [epochs for epochs in rounds if any(epochs in of_way for way, of_way in best.items() if way != PLAIN)]
    lines = [f'| way | {" | ".join(f"{epochs} epochs" for epochs in rounds)} |', '|---' * (len(rounds) + 1) + '|']
    last = {way: max(epochs for epochs in of_way if epochs in rounds) for way, of_way in best.items()}
    for way in sorted(best, key=lambda way: (-last[way], -results.records[best[way][last[way]]]['top1'])):
        cells = ['' for _ in rounds]
        for place, epochs in enumerate(rounds):
            if epochs in best[way]:
                trial = best[way][epochs]
                cells[place] = f'{results.records[trial]["top1"]:.2f} ({trial.lr:g})'
        lines.append(f'| {way} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def confirmed(results: Results) -> Dict[Any, Dict[int, Record]]:
    """What was confirmed: records by seed, by way, learning rate and epochs."""
    groups: Dict[Any, Dict[int, Record]] = {}
    for trial, record in results.records.items():
        if trial.seed != SEARCH_SEED:
            groups.setdefault((trial.way, trial.lr, trial.epochs), {})[trial.seed] = record
    if not groups:
        sys.exit('nothing is confirmed yet: confirm first')
    return groups


def costs_of(groups: Dict[Any, Dict[int, Record]]) -> Dict[Any, float]:
    """Processor time over that of the shortest plain training, without what plain training takes to start.

    That is read off plain training of several lengths: in long runs it is nothing, and here it would hide what a step
    costs.
    """
    seconds = {key: _mean(group, 'processor_seconds') for key, group in groups.items()}
    plain = sorted((key[2], seconds[key]) for key in groups if key[0] == PLAIN)
    (short, first), (long, last) = plain[0], plain[-1]
    per_epoch = (last - first) / (long - short) if long > short else first / short
    start = first - per_epoch * short
    return {key: (value - start) / (per_epoch * short) for key, value in seconds.items()}


def report(results: Results) -> str:
    """A table of what was confirmed: means over seeds, and paired differences from plain training."""
    groups = confirmed(results)
    costs = costs_of(groups)
    plain = {key: group for key, group in groups.items() if key[0] == PLAIN}
    lines = [
        '| way | learning rate | epochs | seeds | student | dynamic teacher | cost | over plain, equal epochs | '
        'over plain, equal cost |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for key, group in sorted(groups.items(), key=lambda item: -_mean(item[1], 'top1')):
        equal = max((o for o in plain if o[2] == key[2]), key=lambda o: _mean(plain[o], 'top1'), default=None)
        # Within a twentieth: two runs of one command differ by as much.
        longer = [other for other in plain if costs[other] >= costs[key] * 0.95]
        rival = min(longer, key=lambda other: (costs[other], -_mean(plain[other], 'top1')), default=None)
        teacher = [record['teacher_top1'] for record in group.values() if record['teacher_top1'] is not None]
        over = ['' if key[0] == PLAIN or o is None else _difference(group, plain[o]) for o in (equal, rival)]
        lines.append(
            f'| {key[0]} | {key[1]:g} | {key[2]} | {len(group)} | {_spread([r["top1"] for r in group.values()])} | '
            f'{_spread(teacher) if teacher else ""} | {costs[key]:.2f} | {over[0]} | '
            f'{over[1]}{f" ({rival[2]} epochs)" if over[1] else ""} |'
        )
    return '\n'.join(lines)


def plot(results: Results, path: Path) -> None:
    """Draws accuracy against cost: plain training as a line, every way as a point; bars are standard errors."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    groups = confirmed(results)
    costs = costs_of(groups)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout='constrained')
    for way in dict.fromkeys(key[0] for key in groups):
        keys = sorted((key for key in groups if key[0] == way), key=lambda key: costs[key])
        top1 = [[record['top1'] for record in groups[key].values()] for key in keys]
        errors = [statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0 for values in top1]
        axes.errorbar(
            [costs[key] for key in keys],
            [statistics.mean(values) for values in top1],
            errors,
            marker='o',
            capsize=3,
            linestyle='-' if len(keys) > 1 else 'none',
            color='black' if way == PLAIN else None,
            label=way,
        )
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:g}')
    axes.set_xlabel('processor time over that of the shortest plain training')
    axes.set_ylabel('top-1 of the student (%)')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _mean(group: Dict[int, Record], key: str) -> float:
    return statistics.mean(record[key] for record in group.values())


def _spread(values: Sequence[float]) -> str:
    error = f' ± {statistics.stdev(values) / len(values) ** 0.5:.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{error}'


def _difference(group: Dict[int, Record], other: Dict[int, Record]) -> str:
    pairs = [group[seed]['top1'] - other[seed]['top1'] for seed in sorted(group.keys() & other.keys())]
    return f'{_spread(pairs)}, better in {sum(pair > 0 for pair in pairs)} of {len(pairs)}' if pairs else ''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('step', choices=['search', 'lengths', 'confirm', 'report'])
    parser.add_argument('--results', type=Path, default=ROOT / 'docs' / 'results' / 'glyphs.jsonl', metavar='FILE')
    parser.add_argument('--config', type=Path, default=ROOT / 'configs' / 'glyphs.yaml', metavar='FILE')
    parser.add_argument('--data-dir', default='data/glyphs', metavar='DIR')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--jobs', type=int, default=2, metavar='N', help='runs at a time, one core each')
    parser.add_argument(
        '--ways', nargs='+', choices=list(WAYS), metavar='WAY', help='search: all, confirm: the winners'
    )
    parser.add_argument('--lrs', nargs='+', type=float, default=LEARNING_RATES, metavar='LR', help='of the search')
    parser.add_argument('--rungs', nargs='+', type=int, default=[2, 4, 8], metavar='N', help='epochs of each round')
    parser.add_argument('--keep', type=float, default=1 / 4, metavar='SHARE', help='of the candidates of a round')
    parser.add_argument('--winners', type=int, default=3, metavar='N', help='ways that are confirmed')
    parser.add_argument('--seeds', type=int, default=5, metavar='N', help='fresh seeds')
    parser.add_argument('--lengths', nargs='+', type=int, default=LENGTHS, metavar='N', help='of plain training')
    parser.add_argument('--epochs', type=int, default=8, metavar='N', help='of a run that confirms')
    parser.add_argument('--test-split', default='test', metavar='NAME', help='of what is confirmed')
    args = parser.parse_args()
    results = Results(args.results, args.config, args.data_dir, args.jobs, args.device)
    if args.step == 'search':
        search(results, args.ways or list(WAYS), args.lrs, args.rungs, args.keep)
    elif args.step == 'lengths':
        search_lengths(results, args.epochs, args.lengths)
    elif args.step == 'confirm':
        ways = args.ways or best_ways(results, args.epochs, args.winners)
        confirm(results, ways, args.seeds, args.epochs, args.lengths, args.test_split)
    else:
        print(f'{searched(results)}\n\n{report(results)}')
        plot(results, args.results.with_suffix('.png'))


if __name__ == '__main__':
    main()
