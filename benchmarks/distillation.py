#!/usr/bin/env python3
"""Looks for ways of training that make a student better than plain training: at equal epochs, and at equal cost.

    python -m timm_gpd.data.glyphs data/glyphs
    python benchmarks/distillation.py search   # successive halving, ways and learning rates, on the validation split
    python benchmarks/distillation.py lengths  # plain training's learning rate where it takes longer, likewise
    python benchmarks/distillation.py confirm  # the winners and plain training, fresh seeds, on the test split
    python benchmarks/distillation.py report   # tables, and accuracy against cost as a picture beside the results

Another student or data set is another ``--config`` with ``--results`` of its own, and losses from a static teacher are
ways that need ``--static-teacher``: docs/results.md and docs/distillation.md have the commands of what they show.

What counts was said before it was run. A way gains at equal epochs if over at least five fresh seeds, paired by seed
and each at its own best learning rate, its students' mean top-1 on the test split is above that of plain training by
half a point and by two standard errors of the difference. It gains at equal cost if the same holds against plain
training that took as much processor time, or more. Plain training is a line, not a point: it is confirmed for several
lengths, by default 1, 2, 4 and 8 times the epochs, and the best way for twice as many.

Every run is one ``train.py`` process, and one line of JSON in ``--results``: what it was, what came out, its processor
time, the command, commit, processor and versions. Lines that are there are not run again, so an interrupted study goes
on where it stopped. A round of the search may run elsewhere, with ``--device cuda`` and many ``--jobs``; what is
confirmed runs on one CPU, as costs are compared. Exit codes: 0 done, 1 a run failed.
"""

import argparse
import statistics
from pathlib import Path
from typing import List, Sequence, Tuple

from distillation_report import plot, report, searched
from found import FIRST_FRESH_SEED, best_learning_rate, best_ways
from runs import ROOT, Results, Trial
from ways import PLAIN, SHARED, STATIC, WAYS

LEARNING_RATES = (0.1, 0.2, 0.4, 0.8, 1.6)
FEWEST_EPOCHS = {'last quarter': 4}  # of ways whose window would hold none
LENGTHS = (1, 2, 4, 8)  # of plain training, over the others', each twice the one before
LONGER = 2  # of the best way, over the others


def search(
    results: Results,
    ways: Sequence[str],
    lrs: Sequence[float],
    rungs: Sequence[int],
    keep: float,
    seeds: int = 1,
) -> List[str]:
    """Successive halving: all ways at all learning rates for few epochs, the best share of them for more, and so on.

    Plain training stays at all its learning rates: it is what the others are compared with. A way that needs more
    epochs than a round has waits for the next one.

    Args:
        results: where lines go.
        ways: keys of ``WAYS``.
        lrs: learning rates to begin with.
        rungs: epochs of each round.
        keep: the share of candidates that goes on.
        seeds: of each run; the mean over them decides.

    Returns:
        The last round's ways, the best first.
    """
    candidates = [(way, lr) for way in ways for lr in lrs]
    ranked: List[Tuple[str, float]] = []
    for number, epochs in enumerate(rungs):
        waiting = [(way, lr) for way, lr in candidates if epochs < FEWEST_EPOCHS.get(way, 0)]
        runs = [candidate for candidate in candidates if candidate not in waiting]
        found = results.measure([_trial(*run, epochs, seed) for run in runs for seed in range(seeds)])
        means = {
            run: statistics.mean(found[_trial(*run, epochs, seed)]['top1'] for seed in range(seeds)) for run in runs
        }
        ranked = sorted(runs, key=lambda run: -means[run])
        print(f'round {number}, {epochs} epochs:')
        for way, lr in ranked:
            print(f'  {means[way, lr]:6.2f}  {way}, lr {lr}')
        others = [(way, lr) for way, lr in ranked if way != PLAIN]
        kept = others[: max(1, round(len(others) * keep))]
        candidates = [(way, lr) for way, lr in candidates if way == PLAIN] + kept + waiting
    return list(dict.fromkeys(way for way, _ in ranked))


def _trial(way: str, lr: float, epochs: int, seed: int) -> Trial:
    """A run of the search."""
    return Trial(way, lr, epochs, seed, 'validation')


def search_lengths(results: Results, epochs: int, lengths: Sequence[int], seeds: int = 1) -> None:
    """Plain training for longer: at twice the epochs the learning rate that was best before, and half of it.

    Args:
        results: with a search's lines.
        epochs: of one length.
        lengths: of plain training, over ``epochs``.
        seeds: of each run.
    """
    for shorter, length in zip(lengths, lengths[1:]):
        lr = best_learning_rate(results, PLAIN, shorter * epochs)
        results.measure([_trial(PLAIN, lr * by, length * epochs, seed) for by in (1, 0.5) for seed in range(seeds)])


def confirm(
    results: Results,
    ways: Sequence[str],
    seeds: int,
    epochs: int,
    lengths: Sequence[int],
    longer: int = LONGER,
) -> None:
    """Trains ways and plain training with fresh seeds.

    Args:
        results: with the lines of a search and of the lengths.
        ways: besides plain training, the best first.
        seeds: fresh seeds of each.
        epochs: of each way.
        lengths: of plain training, over ``epochs``.
        longer: the best way runs so many times the epochs, too.
    """
    runs = [(way, best_learning_rate(results, way, epochs), epochs) for way in ways]
    runs += [(PLAIN, best_learning_rate(results, PLAIN, epochs * length), epochs * length) for length in lengths]
    runs += [(ways[0], best_learning_rate(results, ways[0], epochs), epochs * longer)] if ways else []
    fresh = range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + seeds)
    results.measure([Trial(*run, seed, 'test') for run in runs for seed in fresh])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('step', choices=['search', 'lengths', 'confirm', 'report'])
    parser.add_argument('--results', type=Path, default=ROOT / 'docs' / 'results' / 'glyphs.jsonl', metavar='FILE')
    parser.add_argument('--config', type=Path, default=ROOT / 'configs' / 'glyphs.yaml', metavar='FILE')
    parser.add_argument('--data-dir', default='data/glyphs', metavar='DIR')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--jobs', type=int, default=2, metavar='N', help='runs at a time, one core each')
    parser.add_argument(
        '--ways',
        nargs='+',
        choices=[*WAYS, 'shared', 'static'],
        metavar='WAY',
        help='search: shared, confirm: the best',
    )
    parser.add_argument('--static-teacher', metavar='DIR', help='the student of another run, for the ways "static"')
    parser.add_argument('--lrs', nargs='+', type=float, default=LEARNING_RATES, metavar='LR', help='of the search')
    parser.add_argument('--rungs', nargs='+', type=int, default=[2, 4, 8], metavar='N', help='epochs of each round')
    parser.add_argument('--keep', type=float, default=1 / 4, metavar='SHARE', help='of the candidates of a round')
    parser.add_argument('--search-seeds', type=int, default=1, metavar='N', help='of the search, 0 to N - 1')
    parser.add_argument('--winners', type=int, default=3, metavar='N', help='ways that are confirmed')
    parser.add_argument('--seeds', type=int, default=5, metavar='N', help='fresh seeds')
    parser.add_argument('--lengths', nargs='+', type=int, default=LENGTHS, metavar='N', help='of plain training')
    parser.add_argument('--longer', type=int, default=LONGER, metavar='N', help='the best way again, N times as long')
    parser.add_argument('--epochs', type=int, default=8, metavar='N', help='of a run that confirms')
    parser.add_argument('--extra', default='', metavar='"ARG ..."', help='more arguments of every train.py, as one')
    args = parser.parse_args()
    results = Results(
        args.results, args.config, args.data_dir, args.jobs, args.device, args.static_teacher, args.extra.split()
    )
    if args.step == 'search':
        search(results, _ways(args.ways or ['shared']), args.lrs, args.rungs, args.keep, args.search_seeds)
    elif args.step == 'lengths':
        search_lengths(results, args.epochs, args.lengths, args.search_seeds)
    elif args.step == 'confirm':
        ways = _ways(args.ways) if args.ways else best_ways(results, args.epochs, args.winners)
        confirm(results, ways, args.seeds, args.epochs, args.lengths, args.longer)
    else:
        print(f'{searched(results)}\n\n{report(results)}')
        plot(results, args.results.with_suffix('.png'))


def _ways(names: Sequence[str]) -> List[str]:
    """Names of ways, in place of those of their groups; plain training is beside the shared ones."""
    groups = {'shared': [PLAIN, *SHARED], 'static': list(STATIC)}
    return [way for name in names for way in groups.get(name, [name])]


if __name__ == '__main__':
    main()
