"""The command line of ``python -m timm_gpd.rank``."""

import argparse
import importlib.util
import os
from itertools import islice
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
from timm import create_model
from timm.utils import random_seed

from ..command_line import Parser, run_program
from ..errors import LIBRARY_ERRORS, UsageError, usage_errors
from ..training.args import Arguments, parse_train_args
from ..training.args.checks import FLAGS, check_flags
from ..training.args.data import add_train_data
from ..training.args.value_kinds import Output
from ..training.compute import create_compute
from ..training.data.datasets import DataSource, resolve_data, with_defaults
from ..training.data.loaders import create_train_loader
from ..training.student import InputConfig, resolve_input
from .report import CHART_KINDS, draw_chart, table, write_json
from .students import Batch, random_batches, rank_students

__all__ = ['main', 'parse_rank_args', 'read_batches']

IMAGENET_CLASSES = 1000  # of random labels, where no number is given
EPILOG = (
    'Without --data-dir or --dataset images and labels are random. Nothing is trained, and no weights are downloaded. '
    'exit codes: 0 done, 2 bad input (one line says what to do), 1 anything else'
)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog='timm_gpd.rank',
        description='Rank students by how well they suit a teacher, with random weights (DisWOT, arXiv 2303.15678).',
        epilog=EPILOG,
    )
    group = parser.add_argument_group('Ranking')
    group.add_argument('--teacher', metavar='MODEL', help='timm model, or local-dir:<folder>; of both the shape alone')
    group.add_argument('--students', default='', metavar='MODEL,...', help='what to rank, named as the teacher')
    group.add_argument(
        '--ratios',
        default='',
        metavar='R,...',
        help='rank the wide models of one student, against --teacher or, without it, the student itself',
    )
    group.add_argument('--branches', default='', metavar='M,...', help='rank these numbers of branches, with --ratios')
    group.add_argument('--initializations', type=int, default=3, metavar='N', help='of every network (default: 3)')
    group.add_argument('--batches', type=int, default=1, metavar='N', help='batches of images (default: 1)')
    group.add_argument('--json', metavar='FILE', help='write the ranking as JSON')
    group.add_argument('--plot', metavar='FILE', help='draw a bar chart: .png, .pdf or .svg; needs matplotlib')
    add_train_data(parser)
    group = parser.add_argument_group('Images')
    group.add_argument('--num-classes', type=int, metavar='N', help="classes (default: the data's; random: 1000)")
    group.add_argument('--img-size', type=int, metavar='N', help="image size in pixels (default: the teacher's)")
    group.add_argument('--in-chans', type=int, metavar='N', help="image channels (default: the teacher's)")
    group.add_argument('--input-size', type=int, nargs=3, metavar='N', help='channels, height, width')
    group.add_argument('--mean', type=float, nargs='+', help='mean pixel value')
    group.add_argument('--std', type=float, nargs='+', help='standard deviation of pixel values')
    group.add_argument('-b', '--batch-size', type=int, default=64, metavar='N', help='images of a batch (default: 64)')
    group.add_argument('--seed', type=int, default=0, metavar='S', help='of weights and of batches (default: 0)')
    group.add_argument('--device', default='cpu', help='where to compute (default: cpu)')
    group.add_argument('-j', '--workers', type=int, default=0, metavar='N', help='data loading processes (default: 0)')
    return parser


def parse_rank_args(argv: Optional[List[str]] = None) -> Arguments:
    """Arguments of the command, and of those of ``train.py`` that read data the defaults.

    Args:
        argv: the command line, without the program's name; default that of this process.

    Returns:
        A value for every argument.

    Raises:
        UsageError: if something cannot be understood or is out of range.
    """
    parser = _parser()
    options = vars(parser.parse_args(argv))
    check_flags(options, parser)
    options.update(
        students=_split('--students', options['students']),
        ratios=_integers('--ratios', options['ratios']),
        branches=_integers('--branches', options['branches']),
        data_dir=options['data_dir'] or options['data'],
    )
    widens = options['ratios'] or options['branches']
    for refused, reason in (
        (not options['students'], '--students is empty: name at least one'),
        (not options['teacher'] and not widens, 'no teacher: give --teacher, or --ratios for a student against itself'),
        (options['task'] == 'multilabel', '--task multilabel has no classes that exclude each other: leave it out'),
        (options['batch_size'] < 2, '--batch-size must be at least 2: networks are compared by relations of images'),
    ):
        if refused:
            raise UsageError(reason)
    for name in ('initializations', 'batches'):
        if options[name] < 1:
            raise UsageError(f'--{name} must be a positive integer, but is {options[name]}')
    for flag, models in (('--teacher', [options['teacher'] or '']), ('--students', options['students'])):
        problem = next(filter(None, map(FLAGS['model'], models)), None)
        if problem:
            raise UsageError(f'{flag} {problem}')
    _check_files(options['json'], options['plot'])
    return Arguments(**{**vars(parse_train_args([])), **options, 'no_aug': True})


def _split(flag: str, text: str) -> List[str]:
    parts = [part.strip() for part in text.split(',')] if text else []
    if '' in parts:
        raise UsageError(f'{flag} {text} has an empty place between its commas: leave it out')
    return parts


def _integers(flag: str, text: str) -> List[int]:
    parts = _split(flag, text)
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f'{flag} takes positive integers with commas between them, but got {text}')
    return [int(part) for part in parts]


def _check_files(json: Optional[str], plot: Optional[str]) -> None:
    for flag, path in (('--json', json), ('--plot', plot)):
        problem = None if path is None else Output()(path)
        if problem:
            raise UsageError(f'{flag} {problem}')
    if plot is not None and os.path.splitext(plot)[1] not in CHART_KINDS:
        raise UsageError(f'--plot {plot} must end in {" or ".join(CHART_KINDS)}')
    if plot is not None and importlib.util.find_spec('matplotlib') is None:
        raise UsageError('--plot needs matplotlib: pip install "timm-gpd[demo]"')


def read_batches(args: Arguments) -> Tuple[List[Batch], int, str]:
    """Batches of the training split, shuffled and not augmented; random ones where no data are named.

    Args:
        args: from :func:`parse_rank_args`.

    Returns:
        The batches, the number of classes, and what they are of, in words.

    Raises:
        UsageError: if the data cannot be read, do not tell their classes, or are too few.
    """
    random_seed(args.seed)
    reference = args.teacher or args.students[0]
    has_data = bool(args.dataset or args.data_dir)
    source = resolve_data(args) if has_data else DataSource('', None)
    args = with_defaults(args, source)
    classes = args.num_classes or (len(source.class_map) if isinstance(source.class_map, dict) else 0)
    if has_data and not classes:
        raise UsageError(f'--dataset {args.dataset} does not tell how many classes it has: set --num-classes')
    classes = classes or IMAGENET_CLASSES
    input_config = _input_config(args, reference)
    device = create_compute(args.device).device
    if not has_data:
        batches = random_batches(args.batches, args.batch_size, input_config.input_size, classes, args.seed)
        return [(images.to(device), target) for images, target in batches], classes, 'random images and labels'
    loader, _ = create_train_loader(args, source, input_config, classes, device)
    batches = [(images.to(device), target) for images, target in islice(loader, args.batches)]
    if len(batches) < args.batches:
        raise UsageError(
            f'the {args.train_split} split has {len(batches)} batches of {args.batch_size} images, and --batches is '
            f'{args.batches}: lower one of them'
        )
    return batches, classes, f'images of {args.dataset or args.data_dir}'


def _input_config(args: Arguments, reference: str) -> InputConfig:
    """What the arguments say of the images, and of the rest what the reference was made for."""
    with usage_errors(f'check {reference}', *LIBRARY_ERRORS):
        return resolve_input(args, create_model(reference))


def _run_command(argv: Optional[List[str]]) -> None:
    args = parse_rank_args(argv)
    batches, classes, kind = read_batches(args)
    with usage_errors(''):
        ranked = rank_students(
            args.teacher,
            args.students,
            batches,
            ratios=args.ratios,
            branches=args.branches,
            initializations=args.initializations,
            seed=args.seed,
            num_classes=classes,
        )
    size = ' x '.join(map(str, batches[0][0].shape[1:]))
    against = args.teacher or args.students[0]
    count, plural = len(batches), 'es' if len(batches) > 1 else ''
    title = f'against {against}: {count} batch{plural} of {args.batch_size} {kind}, {size}, {classes} classes'
    print(title)
    print(table(ranked))
    about: Dict[str, Any] = dict(
        teacher=against,
        data=kind,
        batches=count,
        batch_size=args.batch_size,
        input_size=list(batches[0][0].shape[1:]),
        num_classes=classes,
        initializations=args.initializations,
        seed=args.seed,
        device=args.device,
        versions={'torch': torch.__version__, 'timm': timm.__version__},
    )
    with usage_errors('check --json and --plot', OSError):
        if args.json:
            write_json(args.json, ranked, about)
        if args.plot:
            draw_chart(args.plot, ranked, title.replace(': ', '\n', 1))


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command.

    Args:
        argv: its command line, without the program's name; default that of this process.

    Returns:
        The exit code: 0 done, 2 for what the user has to change.
    """
    return run_program('timm_gpd.rank', lambda: _run_command(argv))
