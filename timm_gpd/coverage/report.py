"""The coverage page: what a sweep has found, as a table in Markdown."""
from collections import defaultdict
from typing import Dict, Mapping, Sequence

import timm
import torch

from ..expansion.verify import MODES, ROUNDING
from .cache import Cache

__all__ = ['status_of', 'table']

STATUSES = ('exact', 'planned only', 'inexact', 'unsupported', 'no classifier')


def status_of(cache: Cache, name: str) -> str:
    """What is known of an architecture.

    Args:
        cache: what is known.
        name: the architecture.

    Returns:
        A column of the table, one of ``STATUSES``, or ``'unknown'``.
    """
    plan, comparison = cache.get('plan', name), cache.get('compare', name)
    if plan.get('status') != 'planned':
        return plan.get('status', 'unknown')
    return comparison['status'] if comparison.get('status') in ('exact', 'inexact') else 'planned only'


def table(cache: Cache, modules: Mapping[str, Sequence[str]], ratio: int) -> str:
    """Writes the coverage page.

    Args:
        cache: what is known.
        modules: module -> the names of its architectures, a row for each.
        ratio: the expansion ratio.

    Returns:
        The page, in Markdown.
    """
    totals: Dict[str, int] = defaultdict(int)
    rows, notes, reduced, rounded, without = [], [], [], [], []
    slowest = (0., '')
    for module, names in modules.items():
        counts: Dict[str, int] = defaultdict(int)
        worst: Dict[str, float] = {}
        for name in names:
            plan, comparison, status = cache.get('plan', name), cache.get('compare', name), status_of(cache, name)
            counts[status] += 1
            totals[status] += 1
            slowest = max(slowest, (plan.get('seconds', 0.), name))
            for mode in MODES:
                if mode in comparison:
                    error, sensitivity = comparison[mode]['error'], comparison[mode]['sensitivity']
                    worst[mode] = max(worst.get(mode, 0.), error)
                    if status == 'exact' and error > ROUNDING:
                        rounded.append(f'- `{name}`, {mode}: {error:.1e}, against {sensitivity:.1e}')
            if comparison.get('reduction'):
                changes = ', '.join(f'{key}={value}' for key, value in comparison['reduction'].items())
                reduced.append(f'`{name}` ({changes})')
            if status == 'no classifier':
                without.append(name)
            elif status in ('unsupported', 'inexact'):
                notes.append(f'- `{name}`: {status}: {comparison.get("reason") or plan.get("reason")}')
            elif comparison.get('status') == 'not compared':
                notes.append(f'- `{name}`: planned, not compared: {comparison["reason"]}')
        cells = [str(counts[status]) for status in STATUSES]
        errors = [f'{worst[mode]:.1e}' if mode in worst else '' for mode in MODES]
        rows.append(f'| {" | ".join([module, str(len(names)), *cells, *errors])} |')
    classifiers = sum(count for status, count in totals.items() if status != 'no classifier')
    planned = totals['exact'] + totals['planned only'] + totals['inexact']
    lines = [
        '# Coverage',
        '',
        f'What `python -m timm_gpd.coverage` found with timm {timm.__version__}, '
        f'torch {torch.__version__.split("+")[0]} and ratio {ratio}.',
        '',
        f'Of {sum(map(len, modules.values()))} architectures in {len(modules)} modules, {classifiers} have a '
        f'classifier. {planned} of those ({100 * planned / max(classifiers, 1):.1f} %) plan without error, '
        f'{totals["exact"]} were compared and are exact, {totals["inexact"]} were compared and are not. '
        f'The slowest plan took {slowest[0]:.1f} s of CPU time ({slowest[1]}).',
        '',
        '- *exact*: in float64, with randomised weights and running statistics and no stochastic layer, the teacher\'s '
        'logits are the student\'s in evaluation and training mode, and extraction returns the student. The errors are '
        'the worst max \\|T − S\\| / max \\|S\\| of the module.',
        '- *planned only*: planned on the meta device, not compared.',
        '',
        '| module | architectures | exact | planned only | inexact | unsupported | no classifier | error, evaluation '
        '| error, training |',
        '|---|---:|---:|---:|---:|---:|---:|---:|---:|',
        *rows,
    ]
    for title, items in (
        ('Exceptions', notes),
        ('Errors above 1e-12, against what rounding alone does to the student', rounded),
        ('Too large, and compared with fewer blocks or features', [', '.join(reduced)] if reduced else []),
        ('Without a classifier', [', '.join(f'`{name}`' for name in without)] if without else []),
    ):
        if items:
            lines += ['', f'## {title}', '', *items]
    return '\n'.join(lines) + '\n'
