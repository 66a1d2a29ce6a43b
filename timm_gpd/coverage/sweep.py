"""Which of timm's architectures expand exactly: ``python -m timm_gpd.coverage``.

Every architecture is planned on the meta device. Those that are small enough are also compared numerically with their
planned teachers, in evaluation and training mode, and read back from them; where even the two smallest of a module are
too large, with fewer blocks, and the table says so. What was found is kept, line by line, in a cache, so that an
interrupted sweep goes on where it stopped; it starts again when timm or the rules have changed. Then the table is
written.

Exit codes:
    0: every architecture that has a classifier is planned, and exact where it was compared.
    1: some are unsupported or inexact; the table lists them.
    2: the arguments are wrong.
"""
import argparse
import gc
import hashlib
import json
import multiprocessing
import time
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from tqdm import tqdm

from ..errors import UnsupportedModelError
from ..plan import ExpansionPlan
from ..expansion.planner import NO_CLASSIFIER, plan_expansion
from ..expansion.verify import MODES, ROUNDING, SMALL_IMAGES, compare, relative_error

__all__ = ['create_small', 'main', 'read_back_error', 'timm_modules']

OWN_MODULES = ('rvt', 'variants')  # what this package registers is not timm's
READ_BACK = 1e-6  # relative; one rounding in float32, where a divisor is no power of two
REDUCTIONS = ({'mlp_ratio': 1 / 16}, {'depth': 2})  # arguments that make an architecture smaller; the last that fits
ALWAYS_COMPARED = 2  # architectures of every module, however large its smallest are
WORKER_TASKS = 25  # architectures after which a worker process gives its memory back

Record = Dict[str, Any]


def timm_modules() -> List[str]:
    """Names of timm's model modules, in order."""
    return sorted(module for module in timm.list_modules() if module not in OWN_MODULES)


def create(name: str, **kwargs: Any) -> nn.Module:
    """An untrained architecture; one whose default is no classifier gets ten classes."""
    if not timm.models.get_pretrained_cfg_value(name, 'num_classes'):
        kwargs.setdefault('num_classes', 10)
    return timm.create_model(name, **kwargs)


def create_small(name: str, **kwargs: Any) -> nn.Module:
    """An untrained architecture for images as small as its ``img_size`` argument, where it has one, allows."""
    default = (timm.models.get_pretrained_cfg_value(name, 'input_size') or (3, 224, 224))[-1]
    for size in SMALL_IMAGES:
        if size >= default:
            break
        try:
            with torch.device('meta'), torch.no_grad():
                create(name, img_size=size, **kwargs).eval()(torch.empty(1, 3, size, size))
        except Exception:
            continue
        return create(name, img_size=size, **kwargs)
    return create(name, **kwargs)


@torch.no_grad()
def read_back_error(student: nn.Module, plan: ExpansionPlan) -> float:
    """Largest relative error of a tensor of the student after expansion and extraction: the rounding of its divisor."""
    tensors = dict([*student.named_parameters(), *student.named_buffers()])
    back = plan.extract(plan.expand(tensors))
    return max((
        0. if torch.equal(back[name], tensor) else relative_error(back[name], tensor)
        for name, tensor in tensors.items() if tensor.numel()
    ), default=0.)


# -- one architecture -----------------------------------------------------------------------------------------------


def plan_one(name: str, ratio: int) -> Record:
    """Plans an architecture on the meta device."""
    record: Record = {'model': name, 'step': 'plan'}
    try:
        with torch.device('meta'):
            model = create(name)
    except Exception as error:
        return {**record, 'status': 'no classifier', 'reason': _one_line(error)}
    record['parameters'] = sum(parameter.numel() for parameter in model.parameters())
    start = time.process_time()
    try:
        plan_expansion(model, ratio)
    except UnsupportedModelError as error:
        status = 'no classifier' if NO_CLASSIFIER in str(error) else 'unsupported'
        return {**record, 'status': status, 'reason': _one_line(error)}
    return {**record, 'status': 'planned', 'seconds': time.process_time() - start}


def compare_one(name: str, ratio: int, **reduction: Any) -> Record:
    """Compares an architecture, or a reduced one, with its planned teacher, in evaluation and training mode."""
    record: Record = {'model': name, 'step': 'compare', 'reduction': reduction}
    torch.manual_seed(0)
    try:
        model = create_small(name, **reduction)
        plan = plan_expansion(model, ratio)
        agreements = compare(model, plan)
        read_back = read_back_error(model, plan)
    except UnsupportedModelError as error:
        return {**record, 'status': 'inexact', 'reason': _one_line(error)}
    except Exception as error:
        return {**record, 'status': 'not compared', 'reason': _one_line(error)}
    for mode, agreement in agreements.items():
        record[mode] = agreement._asdict()
    if read_back > READ_BACK:
        return {**record, 'status': 'inexact', 'reason': f'extraction differs from the student by {read_back:.1e}'}
    if not all(agreement.is_exact for agreement in agreements.values()):
        return {**record, 'status': 'inexact', 'reason': 'the planned teacher differs from the student'}
    return {**record, 'status': 'exact'}


def _one_line(error: Exception) -> str:
    return f'{str(error) or type(error).__name__}'.splitlines()[0]


# -- the sweep ------------------------------------------------------------------------------------------------------


class Cache:
    """Records of one timm version, ratio and set of rules, in a file of JSON lines."""

    def __init__(self, path: Path, ratio: int) -> None:
        self.path = path
        self.key = f'{timm.__version__}-r{ratio}-{_fingerprint()}'
        self.records: Dict[Tuple[str, str], Record] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that an interruption cut off
                if record.pop('key', None) == self.key:
                    self.records[record['step'], record['model']] = record

    def add(self, record: Record) -> None:
        self.records[record['step'], record['model']] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open('a') as file:
            file.write(json.dumps({'key': self.key, **record}) + '\n')

    def get(self, step: str, name: str) -> Record:
        return self.records.get((step, name), {})

    def knows(self, step: str, name: str, reduction: Record) -> bool:
        """Whether there is a record of the architecture, whole or reduced like this."""
        record = self.get(step, name)
        return bool(record) and record.get('reduction', {}) in ({}, reduction)


def _fingerprint() -> str:
    """What the outcome depends on in this package: the data, the rules, and all that plans and compares with them."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha1()
    for pattern in ('axes.py', 'plan.py', 'rules/**/*.py', 'expansion/**/*.py'):
        for path in sorted(package.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run(
        task: Callable[..., Record], step: str, models: Mapping[str, Dict], ratio: int, jobs: int, cache: Cache,
) -> None:
    """Runs a task, with keyword arguments, for every architecture that the cache does not know yet."""
    todo = {name: kwargs for name, kwargs in models.items() if not cache.knows(step, name, kwargs)}
    with tqdm(total=len(models), initial=len(models) - len(todo), desc=step, unit='model') as bar:
        for record in _results(task, todo, ratio, jobs):
            cache.add(record)
            bar.set_postfix_str(record['model'])
            bar.update()


def _results(task: Callable[..., Record], models: Mapping[str, Dict], ratio: int, jobs: int) -> Iterator[Record]:
    if jobs == 1:
        for name, kwargs in models.items():
            yield task(name, ratio, **kwargs)
            gc.collect()
        return
    context = multiprocessing.get_context('spawn')
    threads = max(1, torch.get_num_threads() // jobs)
    with context.Pool(jobs, _start_worker, (threads,), maxtasksperchild=WORKER_TASKS) as pool:
        yield from pool.imap_unordered(partial(_call, task, ratio), models.items())


def _call(task: Callable[..., Record], ratio: int, model: Tuple[str, Dict]) -> Record:
    name, kwargs = model
    return task(name, ratio, **kwargs)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings('ignore')


def chosen(
        cache: Cache,
        modules: Mapping[str, Sequence[str]],
        max_parameters: float,
        smallest: Optional[int],
) -> Dict[str, Record]:
    """The architectures to compare, and how each is reduced: planned, at most so large, and the smallest few if asked.

    The smallest few of a module (two unless asked otherwise) are reduced to that size where they can be.
    """
    models = {}
    for module in modules.values():
        sizes = [
            (cache.get('plan', name)['parameters'], name)
            for name in module if cache.get('plan', name).get('status') == 'planned']
        for position, (size, name) in enumerate(sorted(sizes)[:smallest]):
            if size <= max_parameters:
                models[name] = {}
            elif position < (smallest or ALWAYS_COMPARED):
                models.update({name: reduction for reduction in REDUCTIONS if _size(name, reduction) <= max_parameters})
    return models


def _size(name: str, reduction: Record) -> float:
    """Parameters of a reduced architecture; infinitely many if it cannot be reduced like this."""
    try:
        with torch.device('meta'):
            return sum(parameter.numel() for parameter in create(name, **reduction).parameters())
    except Exception:
        return float('inf')


# -- the table ------------------------------------------------------------------------------------------------------


def status_of(cache: Cache, name: str) -> str:
    """What the cache knows of an architecture, in one word of the table."""
    plan, comparison = cache.get('plan', name), cache.get('compare', name)
    if plan.get('status') != 'planned':
        return plan.get('status', 'unknown')
    return {'exact': 'exact', 'inexact': 'inexact'}.get(comparison.get('status'), 'planned only')


def table(cache: Cache, modules: Mapping[str, Sequence[str]], ratio: int) -> str:
    """The coverage page, in Markdown."""
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


STATUSES = ('exact', 'planned only', 'inexact', 'unsupported', 'no classifier')


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    """Command line arguments; ends the program with code 2 if they are wrong."""
    parser = argparse.ArgumentParser(prog='python -m timm_gpd.coverage', description=__doc__.split('\n')[0])
    parser.add_argument('--modules', nargs='+', metavar='MODULE', help='modules of timm to sweep (default: all)')
    parser.add_argument('--models', nargs='+', metavar='MODEL', help='architectures to sweep (default: all of those)')
    parser.add_argument('--ratio', type=int, default=2, help='expansion ratio (default: %(default)s)')
    parser.add_argument('--max-params', type=float, default=40, metavar='M',
                        help='millions of parameters up to which an architecture is compared too; a comparison holds '
                             'about 50 bytes for each at ratio 2 (default: %(default)s)')
    parser.add_argument('--smallest', type=int, metavar='N', help='compare only the N smallest of each module')
    parser.add_argument('--jobs', type=int, default=1, help='worker processes (default: %(default)s)')
    parser.add_argument('--cache', type=Path, default=Path('.coverage-cache/coverage.jsonl'),
                        help='JSON lines that a sweep adds to and goes on from (default: %(default)s)')
    parser.add_argument('--output', type=Path, default=Path('docs/coverage.md'), help='(default: %(default)s)')
    options = parser.parse_args(arguments)
    for name in ('ratio', 'jobs', 'smallest'):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f'--{name} must be at least 1, but is {value}')
    known = timm_modules()
    for module in options.modules or ():
        if module not in known:
            parser.error(f'{module} is not a module of timm {timm.__version__}: see timm.list_modules()')
    for model in options.models or ():
        if not timm.is_model(model):
            parser.error(f'{model} is not an architecture of timm {timm.__version__}: see timm.list_models()')
    return options


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Sweeps and writes the table; returns the exit code."""
    options = parse(arguments)
    warnings.filterwarnings('ignore')
    modules = {
        module: [name for name in timm.list_models(module=module) if not options.models or name in options.models]
        for module in options.modules or timm_modules()
    }
    modules = {module: names for module, names in modules.items() if names}
    names = [name for names in modules.values() for name in names]
    cache = Cache(options.cache, options.ratio)
    run(plan_one, 'plan', {name: {} for name in names}, options.ratio, options.jobs, cache)
    models = chosen(cache, modules, options.max_params * 1e6, options.smallest)
    run(compare_one, 'compare', models, options.ratio, options.jobs, cache)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(table(cache, modules, options.ratio))
    failed = [name for name in names if status_of(cache, name) in ('unsupported', 'inexact')]
    print(f'{options.output}: {len(names)} architectures, {len(failed)} unsupported or inexact')
    return 1 if failed else 0
