"""Tables and a picture of what ``distillation.py`` measured."""

import statistics
import sys
from pathlib import Path
from typing import Any, Dict, Sequence

from found import FIRST_FRESH_SEED, best_of_search
from runs import Record, Results
from ways import PLAIN

__all__ = ['confirmed', 'costs_of', 'plot', 'report', 'searched']


def searched(results: Results) -> str:
    """A table of the search: the best top-1 of every way after so many epochs, and its learning rate."""
    best = best_of_search(results)
    rounds = sorted({epochs for way, of_way in best.items() if way != PLAIN for epochs in of_way})
    lines = [f'| way | {" | ".join(f"{epochs} epochs" for epochs in rounds)} |', '|---' * (len(rounds) + 1) + '|']
    last = {way: max(epochs for epochs in of_way if epochs in rounds) for way, of_way in best.items()}
    for way in sorted(best, key=lambda way: (-last[way], -best[way][last[way]].top1)):
        cells = [best[way].get(epochs) for epochs in rounds]
        shown = ['' if found is None else f'{found.top1:.2f} ({found.lr:g})' for found in cells]
        lines.append(f'| {way} | {" | ".join(shown)} |')
    return '\n'.join(lines)


def confirmed(results: Results) -> Dict[Any, Dict[int, Record]]:
    """What was confirmed: records by seed, by way, learning rate and epochs."""
    groups: Dict[Any, Dict[int, Record]] = {}
    for trial, record in results.records.items():
        if trial.seed >= FIRST_FRESH_SEED:
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
