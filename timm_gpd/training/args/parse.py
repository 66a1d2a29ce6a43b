"""The parsers of ``train.py`` and ``validate.py``, and what is read from several flags at once."""

import argparse
from typing import Any, Dict, List, Optional

from ...command_line import Parser
from ...errors import UsageError
from ...models.variants import plain_name
from ...version import __version__
from .adapting_teachers import add_adapting_teachers
from .adversarial import add_adversary, add_attack
from .arguments import Arguments
from .augmentation import add_augmentation, add_image_sizes
from .checks import check_flags
from .combinations import check_train_combinations, check_validate_combinations
from .config import read_config
from .data import add_train_data, add_validate_data
from .device import add_device, add_train_device
from .gpd import add_gpd, add_static_teacher
from .loss import add_loss
from .model import add_train_model, add_validate_model
from .optimizer import add_optimizer
from .refused import TRAIN_REFUSED, VALIDATE_REFUSED, add_refused
from .regularization import add_regularization
from .run import add_results, add_run
from .schedule import add_schedule

__all__ = ['parse_train_args', 'parse_validate_args', 'train_parser', 'validate_parser']

EXIT_CODES = (
    'exit codes: 0 done, or told to end by SIGTERM; 2 bad input (one line says what to do; nothing was overwritten); '
    '3 a loss or gradient is not finite; 130 told to end by SIGINT; 1 anything else'
)


def train_parser() -> argparse.ArgumentParser:
    """Parser of ``train.py``."""
    parser = Parser(description='Train a timm model, with --gpd by Gap Preserving Distillation.', epilog=EXIT_CODES)
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file of default arguments')
    parser.add_argument('--version', action='version', version=__version__)
    add_gpd(parser)
    add_static_teacher(parser)
    add_adapting_teachers(parser)
    add_adversary(parser)
    add_train_data(parser)
    add_train_model(parser)
    add_loss(parser)
    add_optimizer(parser)
    add_schedule(parser)
    add_augmentation(parser)
    add_image_sizes(parser)
    add_regularization(parser)
    add_train_device(parser)
    add_run(parser)
    add_refused(parser, TRAIN_REFUSED)
    return parser


def validate_parser() -> argparse.ArgumentParser:
    """Parser of ``validate.py``."""
    parser = Parser(description='Validate a timm model or a training checkpoint.', epilog=EXIT_CODES)
    parser.add_argument('--version', action='version', version=__version__)
    add_validate_data(parser)
    add_validate_model(parser)
    add_attack(parser)
    add_device(parser)
    add_results(parser)
    add_refused(parser, VALIDATE_REFUSED)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Optional[List[str]]) -> argparse.Namespace:
    try:
        return parser.parse_args(argv)
    except ValueError as error:  # of timm's action for such arguments
        if isinstance(error, UsageError):
            raise
        raise UsageError('the arguments of --model-kwargs, --opt-kwargs and their like are NAME=VALUE (see --help)')


def parse_train_args(argv: Optional[List[str]] = None) -> Arguments:
    """Arguments of ``train.py``: defaults, then the values of ``--config``, then the command line.

    Args:
        argv: the command line, without the program's name; default that of this process.

    Returns:
        A value for every argument. ``model`` is the plain architecture, and ``data_dir`` the folder wherever it stood;
        ``loss``, ``loss_pos_weight``, ``smoothing`` and ``eval_metric`` say what others of the arguments make of them.
        ``given`` holds all as they were given.

    Raises:
        UsageError: if something cannot be understood or is out of range.
    """
    parser = train_parser()
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument('-c', '--config', default='')
    config = named.parse_known_args(argv)[0].config
    if config:
        parser.set_defaults(**read_config(config, parser))
    values = vars(_parse(parser, argv))
    given = dict(values)
    check_flags(values, parser)
    multilabel = values['task'] == 'multilabel'
    if values['smoothing'] is None:
        values['smoothing'] = 0.0 if multilabel else 0.1
    if not values['val_split']:
        values['eval_metric'] = 'loss'  # of training, as in timm
    elif values['eval_metric'] is None:
        values['eval_metric'] = 'map' if multilabel else 'top1'
    _resolve_loss(values)
    check_train_combinations(values, parser)
    return Arguments(
        given, **{**values, 'model': plain_name(values['model']), 'data_dir': values['data_dir'] or values['data']}
    )


def _resolve_loss(values: Dict[str, Any]) -> None:
    """Makes ``--loss`` and ``--loss-pos-weight`` of the flags that were there before them."""
    for flag, loss in (('bce_loss', 'bce'), ('jsd_loss', 'jsd')):
        if values[flag]:
            if values['loss'] not in (None, loss):
                raise UsageError(f'--{loss}-loss means --loss {loss}, and not {values["loss"]}: give one of them')
            values['loss'] = loss
    if values['bce_pos_weight'] is not None:
        weight = str(values['bce_pos_weight'])
        if values['loss_pos_weight'] not in (None, weight):
            raise UsageError('--bce-pos-weight means --loss-pos-weight: give one of them')
        values['loss_pos_weight'] = weight


def parse_validate_args(argv: Optional[List[str]] = None) -> Arguments:
    """Arguments of ``validate.py``.

    Args:
        argv: the command line, without the program's name; default that of this process.

    Returns:
        A value for every argument; ``data_dir`` is the folder wherever it stood.

    Raises:
        UsageError: if something cannot be understood or is out of range.
    """
    parser = validate_parser()
    values = vars(_parse(parser, argv))
    check_flags({**values, 'model': None}, parser)  # it may be many models
    check_validate_combinations(values, parser)
    return Arguments(**{**values, 'data_dir': values['data_dir'] or values['data']})
