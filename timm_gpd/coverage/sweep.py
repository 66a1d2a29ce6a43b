"""Plans, compares and walks architectures, in worker processes if asked, and keeps what it finds in a cache."""

import gc
import multiprocessing
import time
import warnings
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import Pool
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import torch
from tqdm import tqdm

from ..errors import NoClassifierError, UnsupportedModelError, first_line
from ..expansion.planner import plan_expansion
from ..expansion.verify import compare, read_back_error
from .architectures import FEWER, REDUCTIONS, count_parameters, create, create_small, small_arguments
from .cache import Cache, Record
from .whole_path import CHECKS, WholePath

__all__ = ['compare_one', 'path_one', 'plan_one', 'smallest_of', 'sweep']

READ_BACK = 1e-6  # relative; one rounding in float32, where a divisor is no power of two
ALWAYS_COMPARED = 2  # architectures of every module, however large its smallest are
PATH_CLASSES = 10
WORKER_TASKS = 25  # architectures after which a worker process gives its memory back

Modules = Mapping[str, Sequence[str]]


def sweep(
    cache: Cache,
    modules: Modules,
    ratio: int,
    max_parameters: float,
    smallest: Optional[int] = None,
    jobs: int = 1,
) -> None:
    """Plans every architecture, goes the whole path with each module's smallest, and compares those that are small.

    What the cache knows is left out.

    Args:
        cache: what is known; records are added to it.
        modules: module -> the names of its architectures.
        ratio: the expansion ratio.
        max_parameters: how many parameters an architecture that is compared may have.
        smallest: how many of each module are compared, the smallest ones (default: all).
        jobs: worker processes.
    """
    names = [name for module in modules.values() for name in module]
    with _workers(jobs) as pool:
        _run(plan_one, 'plan', {name: {} for name in names}, ratio, pool, cache)
        _run(path_one, 'path', _walked(cache, modules), ratio, pool, cache)
        _run(compare_one, 'compare', _chosen(cache, modules, max_parameters, smallest), ratio, pool, cache)


def plan_one(name: str, ratio: int) -> Record:
    """Plans an architecture on the meta device.

    Args:
        name: a model name of timm.
        ratio: the expansion ratio.

    Returns:
        ``status``: ``'planned'``, ``'unsupported'`` or ``'no classifier'``, and what belongs to it: ``reason``,
        ``parameters``, ``seconds`` of CPU time.
    """
    record: Record = {'model': name, 'step': 'plan'}
    try:
        with torch.device('meta'):
            model = create(name)
    except Exception as error:
        return {**record, 'status': 'no classifier', 'reason': first_line(error)}
    record['parameters'] = sum(parameter.numel() for parameter in model.parameters())
    start = time.process_time()
    try:
        plan_expansion(model, ratio)
    except NoClassifierError as error:
        return {**record, 'status': 'no classifier', 'reason': first_line(error)}
    except UnsupportedModelError as error:
        return {**record, 'status': 'unsupported', 'reason': first_line(error)}
    return {**record, 'status': 'planned', 'seconds': time.process_time() - start}


def compare_one(name: str, ratio: int, **reduction: Any) -> Record:
    """Compares an architecture, or a reduced one, with its planned teacher, in evaluation and training mode.

    Args:
        name: a model name of timm.
        ratio: the expansion ratio.
        **reduction: arguments that make the architecture smaller.

    Returns:
        ``status``: ``'exact'``, ``'inexact'`` or ``'not compared'``, and what belongs to it: ``reason``, ``reduction``,
        and under each mode's name ``error`` and ``sensitivity``.
    """
    record: Record = {'model': name, 'step': 'compare', 'reduction': reduction}
    torch.manual_seed(0)
    try:
        model = create_small(name, **reduction)
        plan = plan_expansion(model, ratio)
        agreements = compare(model, plan)
        read_back = read_back_error(model, plan)
    except UnsupportedModelError as error:
        return {**record, 'status': 'inexact', 'reason': first_line(error)}
    except Exception as error:
        return {**record, 'status': 'not compared', 'reason': first_line(error)}
    for mode, agreement in agreements.items():
        record[mode] = agreement._asdict()
    if read_back > READ_BACK:
        return {**record, 'status': 'inexact', 'reason': f'extraction differs from the student by {read_back:.1e}'}
    if not all(agreement.is_exact for agreement in agreements.values()):
        return {**record, 'status': 'inexact', 'reason': 'the planned teacher differs from the student'}
    return {**record, 'status': 'exact'}


def path_one(name: str, ratio: int, **reduction: Any) -> Record:
    """Goes the whole path with an architecture, or a reduced one, on small images.

    Args:
        name: a model name of timm.
        ratio: the expansion ratio.
        **reduction: arguments that make the architecture smaller.

    Returns:
        For every one of :data:`~timm_gpd.coverage.whole_path.CHECKS` an empty text, or what fails; under
        ``'told_apart'`` the number of tensors whose replicas noise tells apart; and ``reduction``.
    """
    record: Record = {'model': name, 'step': 'path', 'reduction': reduction}
    torch.manual_seed(0)
    try:
        arguments = small_arguments(name, num_classes=PATH_CLASSES, **reduction)
        path = WholePath(partial(create, name, **arguments), ratio)
    except Exception as error:
        return {**record, **dict.fromkeys(CHECKS, _failure(error))}
    for check in CHECKS:
        try:
            result = getattr(path, check)()
        except Exception as error:
            record[check] = _failure(error)
        else:
            record[check] = ''
            record.update({} if result is None else {'told_apart': result})
    return record


def smallest_of(cache: Cache, names: Sequence[str]) -> Optional[str]:
    """The architecture that has the fewest parameters of those that are planned; None if there is none."""
    sizes = [
        (cache.get('plan', name)['parameters'], name)
        for name in names
        if cache.get('plan', name).get('status') == 'planned'
    ]
    return min(sizes)[1] if sizes else None


def _walked(cache: Cache, modules: Modules) -> Dict[str, Record]:
    """The smallest architecture of every module, with fewer blocks where it has many."""
    smallest = {module: smallest_of(cache, names) for module, names in modules.items()}
    return {name: FEWER.get(module, {}) for module, name in smallest.items() if name is not None}


def _failure(error: Exception) -> str:
    return f'{type(error).__name__}: {first_line(error)}'


def _chosen(
    cache: Cache,
    modules: Modules,
    max_parameters: float,
    smallest: Optional[int],
) -> Dict[str, Record]:
    """The architectures to compare, and how each is reduced: planned, at most so large, and the smallest few if asked.

    The smallest few of a module (two unless asked otherwise) are reduced to that size where they can be.
    """
    models: Dict[str, Record] = {}
    for module in modules.values():
        sizes = [
            (cache.get('plan', name)['parameters'], name)
            for name in module
            if cache.get('plan', name).get('status') == 'planned'
        ]
        for position, (size, name) in enumerate(sorted(sizes)[:smallest]):
            if size <= max_parameters:
                models[name] = {}
            elif position < (smallest or ALWAYS_COMPARED):
                for reduction in REDUCTIONS:
                    if count_parameters(name, **reduction) <= max_parameters:
                        models[name] = reduction
    return models


def _run(
    task: Callable[..., Record],
    step: str,
    models: Mapping[str, Record],
    ratio: int,
    pool: Optional[Pool],
    cache: Cache,
) -> None:
    """Runs a task, with keyword arguments, for every architecture that the cache does not know yet."""
    todo = {name: kwargs for name, kwargs in models.items() if not cache.knows(step, name, kwargs)}
    with tqdm(total=len(models), initial=len(models) - len(todo), desc=step, unit='model') as bar:
        for record in _results(task, todo, ratio, pool):
            cache.add(record)
            bar.set_postfix_str(record['model'])
            bar.update()


def _results(
    task: Callable[..., Record], models: Mapping[str, Record], ratio: int, pool: Optional[Pool]
) -> Iterator[Record]:
    if pool is not None:
        yield from pool.imap_unordered(partial(_call, task, ratio), models.items())
        return
    for name, kwargs in models.items():
        yield task(name, ratio, **kwargs)
        gc.collect()


@contextmanager
def _workers(jobs: int) -> Iterator[Optional[Pool]]:
    """Worker processes; None for one, as this process does."""
    if jobs == 1:
        yield None
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context('spawn')
    with context.Pool(jobs, _start_worker, (threads,), maxtasksperchild=WORKER_TASKS) as pool:
        yield pool


def _call(task: Callable[..., Record], ratio: int, model: Tuple[str, Record]) -> Record:
    name, kwargs = model
    return task(name, ratio, **kwargs)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings('ignore')
