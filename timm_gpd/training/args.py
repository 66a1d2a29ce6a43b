"""Command lines of ``train.py`` and ``validate.py``: timm's flag names and defaults, plus ``--gpd``."""

import argparse
import os
from typing import Any, List, NoReturn, Optional

import yaml
from timm.utils import ParseKwargs

from ..command_line import Parser
from ..distillers import DISTILLERS
from ..errors import UsageError
from ..losses import GPD_LOSSES
from ..models.variants import plain_name
from ..teacher.dynamic_teacher import SCALES
from ..version import __version__

__all__ = ['Arguments', 'parse_train_args', 'parse_validate_args']

EXIT_CODES = 'exit codes: 0 done, 2 bad input (one line says what to do; nothing was overwritten), 1 anything else'


class Arguments(argparse.Namespace):
    """A command as it was given. Read-only: what is made of it is a value of its own, beside it."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f'arguments are read-only: {name} stays as it was given')

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f'arguments are read-only: {name} stays as it was given')


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Dataset')
    parser.add_argument('data', nargs='?', metavar='DIR', help='dataset folder (deprecated, use --data-dir)')
    group.add_argument('--data-dir', metavar='DIR', help='dataset folder')
    group.add_argument(
        '--dataset',
        metavar='NAME',
        default='',
        help='"<type>/<name>" as in timm, "digits" for scikit-learn\'s digits, empty for a folder',
    )
    group.add_argument('--val-split', metavar='NAME', default='validation', help='split to validate on')
    group.add_argument('--class-map', metavar='FILE', default='', help='class name to index mapping')
    group.add_argument(
        '--max-bad-images',
        type=float,
        default=0.01,
        metavar='SHARE',
        help='end the run when more than this share of the images of a split cannot be read',
    )
    group.add_argument('--dataset-download', action='store_true', help='let torch/ and tfds/ datasets download')
    group.add_argument('--input-img-mode', default=None, help='image mode, such as RGB or L (default: by channels)')
    group.add_argument(
        '--digits-train-size',
        type=int,
        default=300,
        metavar='N',
        help='digits: training images, stratified and chosen by --seed; the rest validate',
    )


def _add_model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group('Model')
    group.add_argument('--num-classes', type=int, default=None, metavar='N', help="classes (default: the model's)")
    group.add_argument('--gp', default=None, metavar='POOL', help="global pooling type (default: the model's)")
    group.add_argument('--img-size', type=int, default=None, metavar='N', help='image size in pixels')
    group.add_argument('--in-chans', type=int, default=None, metavar='N', help='image channels')
    group.add_argument('--input-size', type=int, nargs=3, default=None, metavar='N', help='channels, height, width')
    group.add_argument('--crop-pct', type=float, default=None, metavar='PCT', help='center crop for validation')
    group.add_argument('--mean', type=float, nargs='+', default=None, help='mean pixel value')
    group.add_argument('--std', type=float, nargs='+', default=None, help='standard deviation of pixel values')
    group.add_argument('--interpolation', default='', metavar='NAME', help='resize interpolation')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='arguments of the model')
    group.add_argument('--channels-last', action='store_true', help='channels_last memory layout')
    return group


def _add_device(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Device')
    group.add_argument('--device', default='cuda', help='device to use')
    group.add_argument('--amp', action='store_true', help='automatic mixed precision')
    group.add_argument('--amp-dtype', default='float16', choices=['float16', 'bfloat16'], help='its lower precision')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes')
    group.add_argument('--pin-mem', action='store_true', help='pin memory in the data loader')
    group.add_argument('--no-prefetcher', action='store_true', help='disable the prefetcher')


def _add_gpd(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Gap Preserving Distillation')
    group.add_argument('--gpd', action='store_true', help='train with a dynamic teacher')
    group.add_argument('--gpd-ratio', type=int, default=2, metavar='R', help='its expansion ratio')
    group.add_argument('--gpd-branches', type=int, default=1, metavar='M', help='its branches per convolution')
    group.add_argument(
        '--gpd-noise',
        type=float,
        default=0.0,
        metavar='STD',
        help="function-preserving noise, relative to each weight's standard deviation",
    )
    group.add_argument(
        '--gpd-scale',
        default='student',
        choices=SCALES,
        help='whose weights are stored: learning rates keep their meaning for "student"',
    )
    group.add_argument(
        '--gpd-loss', default='sce', choices=list(GPD_LOSSES), help='how the student learns from the dynamic teacher'
    )
    group.add_argument('--gpd-weight', type=float, default=3.0, metavar='W', help='weight of that loss')


def _add_static_teacher(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Static teacher')
    group.add_argument(
        '--kd-model-name',
        default=None,
        metavar='MODEL',
        help='timm model, hf-hub:<repo> or local-dir:<folder>, pretrained',
    )
    group.add_argument('--kd-model-path', default=None, metavar='FILE', help='load this checkpoint into it instead')
    group.add_argument(
        '--kd-distill-type',
        default='logit',
        metavar='NAMES',
        help=f'losses, separated by commas: {", ".join(DISTILLERS)}',
    )
    group.add_argument(
        '--kd-loss-args',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='NAME=VALUE',
        help='their hyperparameters, such as alpha=1 beta=2, or dkd.weight=2 where several have one',
    )
    group.add_argument(
        '--distill-loss-weight',
        type=float,
        default=None,
        metavar='B',
        help="weight of the static teacher's losses (default: 1, or 1 - A where A is given)",
    )
    group.add_argument('--task-loss-weight', type=float, default=None, metavar='A', help='weight of the task loss')
    group.add_argument('--kd-temperature', type=float, default=4.0, help='temperature of the loss logit (kd)')


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Optimizer')
    group.add_argument('--opt', default='sgd', metavar='NAME', help='optimizer')
    group.add_argument('--opt-eps', type=float, default=None, help='its epsilon')
    group.add_argument('--opt-betas', type=float, nargs='+', default=None, help='its betas')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, help='its other arguments')
    group.add_argument('--momentum', type=float, default=0.9, help='its momentum')
    group.add_argument('--weight-decay', type=float, default=2e-5, help='weight decay')
    group.add_argument('--clip-grad', type=float, default=None, metavar='NORM', help='gradient clipping')
    group.add_argument('--clip-mode', default='norm', choices=['norm', 'value', 'agc'], help='what is clipped')
    group.add_argument('--layer-decay', type=float, default=None, help='layer-wise learning rate decay')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches per update')
    group.add_argument('--grad-checkpointing', action='store_true', help='recompute activations in backward')


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Learning rate schedule')
    group.add_argument('--sched', default='cosine', metavar='NAME', help='scheduler')
    group.add_argument('--sched-on-updates', action='store_true', help='step it on updates, not epochs')
    group.add_argument('--lr', type=float, default=None, help='learning rate; overrides --lr-base')
    group.add_argument('--lr-base', type=float, default=0.1, help='lr = lr_base * batch / lr_base_size')
    group.add_argument('--lr-base-size', type=int, default=256, help='batch size that --lr-base is for')
    group.add_argument(
        '--lr-base-scale',
        default='',
        choices=['', 'linear', 'sqrt'],
        help='how the learning rate grows with the batch (default: by optimizer)',
    )
    group.add_argument('--lr-noise', type=float, nargs='+', default=None, help='noise on and off, epoch shares')
    group.add_argument('--lr-noise-pct', type=float, default=0.67, help='noise limit')
    group.add_argument('--lr-noise-std', type=float, default=1.0, help='noise standard deviation')
    group.add_argument('--lr-cycle-mul', type=float, default=1.0, help='cycle length multiplier')
    group.add_argument('--lr-cycle-decay', type=float, default=0.5, help='decay per cycle')
    group.add_argument('--lr-cycle-limit', type=int, default=1, help='number of cycles')
    group.add_argument('--lr-k-decay', type=float, default=1.0, help='k-decay of cosine and poly')
    group.add_argument('--warmup-lr', type=float, default=1e-5, help='learning rate that the warmup starts from')
    group.add_argument('--min-lr', type=float, default=0, help='lowest learning rate')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='epochs')
    group.add_argument('--start-epoch', type=int, default=None, metavar='N', help='epoch to start from')
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], help='of multistep')
    group.add_argument('--decay-epochs', type=float, default=90, metavar='N', help='interval of step')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, help='factor of step and multistep')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='warmup')
    group.add_argument('--warmup-prefix', action='store_true', help='put the warmup before the schedule')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at the lowest rate')
    group.add_argument('--patience-epochs', type=int, default=10, metavar='N', help='of plateau')


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Augmentation and regularization')
    group.add_argument('--no-aug', action='store_true', help='no training augmentation')
    group.add_argument('--train-crop-mode', default=None, help='crop mode in training')
    group.add_argument('--scale', type=float, nargs='+', default=[0.08, 1.0], help='random resize scale')
    group.add_argument('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], help='random aspect ratio')
    group.add_argument('--hflip', type=float, default=0.5, help='horizontal flip probability')
    group.add_argument('--vflip', type=float, default=0.0, help='vertical flip probability')
    group.add_argument('--color-jitter', type=float, default=0.4, help='color jitter')
    group.add_argument('--color-jitter-prob', type=float, default=None, help='its probability')
    group.add_argument('--grayscale-prob', type=float, default=None, help='random grayscale probability')
    group.add_argument('--gaussian-blur-prob', type=float, default=None, help='gaussian blur probability')
    group.add_argument('--aa', default=None, metavar='POLICY', help='AutoAugment or RandAugment policy')
    group.add_argument('--reprob', type=float, default=0.0, help='random erasing probability')
    group.add_argument('--remode', default='pixel', help='random erasing mode')
    group.add_argument('--recount', type=int, default=1, help='random erasing count')
    group.add_argument('--mixup', type=float, default=0.0, help='mixup alpha')
    group.add_argument('--cutmix', type=float, default=0.0, help='cutmix alpha')
    group.add_argument('--cutmix-minmax', type=float, nargs='+', default=None, help='cutmix ratios')
    group.add_argument('--mixup-prob', type=float, default=1.0, help='probability of mixup or cutmix')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, help='probability of cutmix among both')
    group.add_argument('--mixup-mode', default='batch', help='batch, pair or elem')
    group.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N', help='epoch to turn mixup off')
    group.add_argument('--smoothing', type=float, default=0.1, help='label smoothing')
    group.add_argument('--bce-loss', action='store_true', help='binary cross-entropy')
    group.add_argument('--bce-sum', action='store_true', help='sum it over classes')
    group.add_argument('--bce-target-thresh', type=float, default=None, help='threshold of its targets')
    group.add_argument('--train-interpolation', default='random', help='resize interpolation in training')
    group.add_argument('--drop', type=float, default=0.0, metavar='PCT', help='dropout rate')
    group.add_argument('--drop-path', type=float, default=None, metavar='PCT', help='stochastic depth rate')
    group.add_argument('--drop-block', type=float, default=None, metavar='PCT', help='drop block rate')
    group.add_argument('--bn-momentum', type=float, default=None, help='BatchNorm momentum')
    group.add_argument('--bn-eps', type=float, default=None, help='BatchNorm epsilon')


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Run')
    group.add_argument('--model-ema', action='store_true', help='track a moving average of the weights')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, help='its decay')
    group.add_argument('--model-ema-warmup', action='store_true', help='warm its decay up')
    group.add_argument(
        '--torchcompile',
        nargs='?',
        default=None,
        const='inductor',
        metavar='BACKEND',
        help='compile what is trained (default backend: inductor)',
    )
    group.add_argument('--torchcompile-mode', default=None, metavar='MODE', help='mode of torch.compile')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='random seed')
    group.add_argument('--worker-seeding', default='all', help='worker seed mode')
    group.add_argument('--val-interval', type=int, default=1, metavar='N', help='epochs between validations')
    group.add_argument(
        '--recovery-interval', type=int, default=0, metavar='N', help='updates between recovery checkpoints'
    )
    group.add_argument('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
    group.add_argument('--output', default='', metavar='DIR', help='output folder (default: ./output/train)')
    group.add_argument('--experiment', default='', metavar='NAME', help='sub-folder (default: time, model, size)')
    group.add_argument('--eval-metric', default='top1', help='metric of the best checkpoint')


def _train_parser() -> argparse.ArgumentParser:
    parser = Parser(description='Train a timm model, with --gpd by Gap Preserving Distillation.', epilog=EXIT_CODES)
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file of default arguments')
    parser.add_argument('--version', action='version', version=__version__)
    _add_gpd(parser)
    _add_static_teacher(parser)
    _add_data(parser)
    parser.add_argument('--train-split', metavar='NAME', default='train', help='split to train on')
    model = _add_model(parser)
    model.add_argument('--model', default='resnet50', metavar='MODEL', help='student; <arch>_gpd means <arch>')
    model.add_argument('--pretrained', action='store_true', help='start from pretrained weights')
    model.add_argument('--pretrained-path', default=None, metavar='FILE', help='load this file as pretrained weights')
    model.add_argument('--initial-checkpoint', default='', metavar='FILE', help='load this checkpoint first')
    model.add_argument('--resume', default='', metavar='FILE', help='continue the run of this checkpoint')
    model.add_argument('--no-resume-opt', action='store_true', help='without its optimizer state')
    model.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='batch size')
    model.add_argument('-vb', '--validation-batch-size', type=int, default=None, metavar='N', help='for validation')
    _add_optimizer(parser)
    _add_schedule(parser)
    _add_augmentation(parser)
    _add_device(parser)
    _add_run(parser)
    parser.add_argument('--log-interval', type=int, default=50, metavar='N', help='batches between log lines')
    return parser


def _validate_parser() -> argparse.ArgumentParser:
    parser = Parser(description='Validate a timm model or a training checkpoint.', epilog=EXIT_CODES)
    parser.add_argument('--version', action='version', version=__version__)
    _add_data(parser)
    model = _add_model(parser)
    model.add_argument(
        '--model',
        '-m',
        default='resnet50',
        metavar='MODEL',
        help='timm model, <arch>_gpd, hf-hub:<repo> or local-dir:<folder>',
    )
    model.add_argument('--checkpoint', default='', metavar='FILE', help='training checkpoint of that model')
    model.add_argument('--pretrained', action='store_true', help='use pretrained weights')
    model.add_argument('--use-ema', action='store_true', help='use the averaged weights of the checkpoint')
    model.add_argument('-b', '--batch-size', type=int, default=256, metavar='N', help='batch size')
    _add_device(parser)
    parser.add_argument('--seed', type=int, default=42, metavar='S', help='digits: seed that chose the training images')
    parser.add_argument('--results-file', default='', metavar='FILE', help='write the results there, as JSON')
    parser.add_argument('--log-interval', type=int, default=10, metavar='N', help='batches between log lines')
    return parser


def parse_train_args(argv: Optional[List[str]] = None) -> Arguments:
    """Arguments of ``train.py``: defaults, then the values of ``--config``, then the command line.

    Args:
        argv: the command line, without the program's name; default that of this process.

    Returns:
        A value for every argument. ``model`` is the plain architecture, and ``data_dir`` the folder wherever it stood.

    Raises:
        UsageError: if something cannot be understood or is out of range.
    """
    parser = _train_parser()
    config = parser.parse_known_args(argv)[0].config
    if config:
        parser.set_defaults(**_read_config(config, parser))
    values = vars(parser.parse_args(argv))
    for name in (
        'gpd_ratio',
        'gpd_branches',
        'batch_size',
        'epochs',
        'grad_accum_steps',
        'val_interval',
        'checkpoint_hist',
        'log_interval',
    ):
        if values[name] < 1:
            raise UsageError(f'--{name.replace("_", "-")} must be a positive integer, but is {values[name]}')
    if not values['gpd_noise'] >= 0:
        raise UsageError(f'--gpd-noise must be at least 0, but is {values["gpd_noise"]}')
    return Arguments(
        **{**values, 'model': plain_name(values['model']), 'data_dir': values['data_dir'] or values['data']}
    )


def parse_validate_args(argv: Optional[List[str]] = None) -> Arguments:
    """Arguments of ``validate.py``.

    Args:
        argv: the command line, without the program's name; default that of this process.

    Returns:
        A value for every argument; ``data_dir`` is the folder wherever it stood.

    Raises:
        UsageError: if something cannot be understood.
    """
    values = vars(_validate_parser().parse_args(argv))
    return Arguments(**{**values, 'data_dir': values['data_dir'] or values['data']})


def _read_config(path: str, parser: argparse.ArgumentParser) -> Any:
    if not os.path.isfile(path):
        raise UsageError(f'config file {path} does not exist: check --config')
    try:
        with open(path) as file:
            config = yaml.safe_load(file) or {}
    except yaml.YAMLError as error:
        raise UsageError(f'config file {path} is not valid YAML: {" ".join(str(error).split())}')
    known = {action.dest for action in parser._actions}
    unknown = sorted(set(config) - known - {'versions'})  # a run's args.yaml is a config, and notes versions
    if unknown:
        raise UsageError(f'config file {path} has unknown arguments: {", ".join(unknown)} (see --help)')
    config.pop('versions', None)
    config.pop('config', None)
    return config
