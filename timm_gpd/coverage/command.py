"""Which of timm's architectures expand exactly: ``python -m timm_gpd.coverage``.

Every architecture is planned on the meta device. Those that are small enough are also compared numerically with their
planned teachers, in evaluation and training mode, and read back from them; where even the two smallest of a module are
too large, with fewer blocks, and the table says so. The smallest of each module goes the whole path of a user: its
gradients, joint steps, extraction, checkpoint, copies and noise. What was found is kept, line by line, in a cache, so
that an interrupted sweep goes on where it stopped; it starts again when timm, torch or the rules have changed. Then the
page is written.

Exit codes:
    0: every architecture that has a classifier is planned, exact where it was compared, and whole where it was walked.
    1: some are unsupported or inexact, or fail on the path; the page lists them.
    2: the arguments are wrong.
"""

import argparse
import warnings
from pathlib import Path
from typing import Optional, Sequence

import timm

from .architectures import timm_modules
from .cache import Cache
from .report import status_of, table
from .sweep import sweep
from .whole_path import CHECKS

__all__ = ['main']


def _parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    """Command line arguments; ends the program with code 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_gpd.coverage', description="Finds out which of timm's architectures expand exactly."
    )
    parser.add_argument('--modules', nargs='+', metavar='MODULE', help='modules of timm to sweep (default: all)')
    parser.add_argument('--models', nargs='+', metavar='MODEL', help='architectures to sweep (default: all of those)')
    parser.add_argument('--ratio', type=int, default=2, help='expansion ratio (default: %(default)s)')
    parser.add_argument(
        '--max-params',
        type=float,
        default=40,
        metavar='M',
        help='millions of parameters up to which an architecture is compared too; a comparison holds '
        'about 50 bytes for each at ratio 2 (default: %(default)s)',
    )
    parser.add_argument('--smallest', type=int, metavar='N', help='compare only the N smallest of each module')
    parser.add_argument('--jobs', type=int, default=1, help='worker processes (default: %(default)s)')
    parser.add_argument(
        '--cache',
        type=Path,
        default=Path('.coverage-cache/coverage.jsonl'),
        help='JSON lines that a sweep adds to and goes on from (default: %(default)s)',
    )
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
    """Sweeps and writes the table.

    Args:
        arguments: those of the command line (default: this process's).

    Returns:
        The exit code, 0 or 1.

    Raises:
        SystemExit: with code 2 if the arguments are wrong, which it has printed by then.
    """
    options = _parse(arguments)
    modules = {
        module: [name for name in timm.list_models(module=module) if not options.models or name in options.models]
        for module in options.modules or timm_modules()
    }
    modules = {module: names for module, names in modules.items() if names}
    names = [name for names in modules.values() for name in names]
    cache = Cache(options.cache, options.ratio)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sweep(cache, modules, options.ratio, options.max_params * 1e6, options.smallest, options.jobs)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(table(cache, modules, options.ratio))
    failed = [name for name in names if status_of(cache, name) in ('unsupported', 'inexact')]
    broken = [name for name in names if any(cache.get('path', name).get(check) for check in CHECKS)]
    print(
        f'{options.output}: {len(names)} architectures, {len(failed)} unsupported or inexact, '
        f'{len(broken)} that fail on the whole path'
    )
    return 1 if failed or broken else 0
