"""The coverage page: what a sweep has found, as a table in Markdown."""

from collections import Counter
from typing import List, Mapping, Sequence

import timm
import torch

from ..expansion.verify import MODES, ROUNDING, Agreement
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
    names = [name for module in modules.values() for name in module]
    totals = Counter(status_of(cache, name) for name in names)
    classifiers = len(names) - totals['no classifier']
    planned = totals['exact'] + totals['planned only'] + totals['inexact']
    seconds, slowest = max([(0.0, ''), *((cache.get('plan', name).get('seconds', 0.0), name) for name in names)])
    lines = [
        '# Coverage',
        '',
        f'What `python -m timm_gpd.coverage` found with timm {timm.__version__}, '
        f'torch {torch.__version__.split("+")[0]} and ratio {ratio}.',
        '',
        f'Of {len(names)} architectures in {len(modules)} modules, {classifiers} have a '
        f'classifier. {planned} of those ({100 * planned / max(classifiers, 1):.1f} %) plan without error, '
        f'{totals["exact"]} were compared and are exact, {totals["inexact"]} were compared and are not. '
        f'The slowest plan took {seconds:.1f} s of CPU time ({slowest}).',
        '',
        "- *exact*: in float64, with randomised weights and running statistics and no stochastic layer, the teacher's "
        "logits are the student's in evaluation and training mode, and extraction returns the student. The errors are "
        'the worst max \\|T − S\\| / max \\|S\\| of the module.',
        '- *planned only*: planned on the meta device, not compared.',
        '',
        '| module | architectures | exact | planned only | inexact | unsupported | no classifier | error, evaluation '
        '| error, training |',
        '|---|---:|---:|---:|---:|---:|---:|---:|---:|',
        *(_row(cache, module, names) for module, names in modules.items()),
    ]
    reduced = ', '.join(_reduced(cache, names))
    without = ', '.join(f'`{name}`' for name in names if status_of(cache, name) == 'no classifier')
    for title, items in (
        ('Exceptions', _exceptions(cache, names)),
        ('Errors above 1e-12, against what rounding alone does to the student', _rounded(cache, names)),
        ('Too large, and compared with fewer blocks or features', [reduced] if reduced else []),
        ('Without a classifier', [without] if without else []),
    ):
        if items:
            lines += ['', f'## {title}', '', *items]
    return '\n'.join(lines) + '\n'


def _row(cache: Cache, module: str, names: Sequence[str]) -> str:
    counts = Counter(status_of(cache, name) for name in names)
    cells = [module, str(len(names)), *(str(counts[status]) for status in STATUSES)]
    for mode in MODES:
        comparisons = [cache.get('compare', name) for name in names]
        errors = [comparison[mode]['error'] for comparison in comparisons if mode in comparison]
        cells.append(f'{max(errors):.1e}' if errors else '')
    return f'| {" | ".join(cells)} |'


def _exceptions(cache: Cache, names: Sequence[str]) -> List[str]:
    """What is wrong, or could not be compared."""
    lines = []
    for name in names:
        status, plan, comparison = status_of(cache, name), cache.get('plan', name), cache.get('compare', name)
        if status in ('unsupported', 'inexact'):
            lines.append(f'- `{name}`: {status}: {comparison.get("reason") or plan.get("reason")}')
        elif comparison.get('status') == 'not compared':
            lines.append(f'- `{name}`: planned, not compared: {comparison["reason"]}')
    return lines


def _rounded(cache: Cache, names: Sequence[str]) -> List[str]:
    """Errors that are rounding, and more than is usual."""
    lines = []
    for name in names:
        comparison = cache.get('compare', name)
        for mode in MODES:
            if mode in comparison and status_of(cache, name) == 'exact' and comparison[mode]['error'] > ROUNDING:
                agreement = Agreement(**comparison[mode])
                lines.append(f'- `{name}`, {mode}: {agreement.error:.1e}, against {agreement.sensitivity:.1e}')
    return lines


def _reduced(cache: Cache, names: Sequence[str]) -> List[str]:
    """What was compared with arguments that make it smaller."""
    reductions = [(name, cache.get('compare', name).get('reduction')) for name in names]
    return [
        f'`{name}` ({", ".join(f"{key}={value}" for key, value in reduction.items())})'
        for name, reduction in reductions
        if reduction
    ]
