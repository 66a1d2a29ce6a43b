"""The coverage page: what a sweep has found, as a table in Markdown."""

from collections import Counter
from typing import List, Mapping, Sequence

import timm
import torch

from ..expansion.verify import MODES, ROUNDING, Agreement
from .cache import Cache
from .sweep import smallest_of
from .whole_path import CHECKS

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
        *_whole_paths(cache, modules),
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


def _whole_paths(cache: Cache, modules: Mapping[str, Sequence[str]]) -> List[str]:
    """The smallest architecture of every module on the whole path, a column for each part of it; and what fails."""
    smallest = {module: smallest_of(cache, names) for module, names in modules.items()}
    records = {module: cache.get('path', name) for module, name in smallest.items() if name is not None}
    records = {module: record for module, record in records.items() if record}
    if not records:
        return []
    whole = [module for module, record in records.items() if not any(record[check] for check in CHECKS)]
    lines = [
        '',
        '## The whole path',
        '',
        f'What a user does, with the smallest architecture of each module: {len(whole)} of {len(records)} are whole. '
        'In float64, with randomised weights, running statistics from data and no stochastic layer, on two images of '
        '32 pixels or, where the architecture does not take them, the smallest of a few sizes that it takes:',
        '',
        "- *gradient*: the student's loss gives the stored tensors' replica 0 the plain student's gradient, and "
        'running statistics move alike, bit for bit.',
        '- *steps*: three steps of `GapPreservingTask` with SGD train every tensor that has a gradient.',
        '- *extraction*: `extract_student()`, a new timm model that loads its `state_dict` with `strict=True`, and '
        '`extract_teacher()` have the logits of the models inside, bit for bit.',
        '- *state*: a checkpoint that was saved, and read with `weights_only=True`, makes a new task the same.',
        '- *copies*: so do `deepcopy` and pickle.',
        '- *noise*: in how many tensors `noise=0.1` tells replicas apart: all that sum over replicated inputs and '
        "have replicated outputs. The teacher's function stays within rounding, the student bit for bit. Standardised "
        'weights are not among them: there is no such noise.',
        '',
        f'| module | architecture | {" | ".join(CHECKS)} |',
        f'|---|---|{":---:|" * len(CHECKS)}',
    ]
    for module, record in records.items():
        cells = [
            'fails' if record[check] else str(record['told_apart']) if check == 'noise' else 'yes' for check in CHECKS
        ]
        reduction = ', '.join(f'{key}={value}' for key, value in record['reduction'].items())
        name = f'`{record["model"]}`' + (f' ({reduction})' if reduction else '')
        lines.append(f'| {module} | {name} | {" | ".join(cells)} |')
    failures = [
        f'- `{record["model"]}`, {check}: {record[check]}'
        for record in records.values()
        for check in CHECKS
        if record[check]
    ]
    return [*lines, *(['', *failures] if failures else [])]


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
