"""Flags of the dynamic teacher and of static teachers."""

import argparse

from timm.utils import ParseKwargs

from ...distillers import ADVERSARIAL_DISTILLERS, DISTILLERS, TOKEN_KINDS
from ...losses import ADVERSARIAL_LOSSES, GPD_LOSSES
from ...task.gap_control import GAP_SCALES
from ...task.gpd_loss import WEIGHT_SCHEDULES
from ...task.nested import METHODS
from ...teacher.dynamic_teacher import SCALES

__all__ = ['add_gpd', 'add_static_teacher']


def add_gpd(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Gap Preserving Distillation')
    group.add_argument('--gpd', action='store_true', help='train with a dynamic teacher')
    group.add_argument('--gpd-ratio', type=int, default=2, metavar='R', help='its expansion ratio')
    group.add_argument('--gpd-branches', type=int, default=1, metavar='M', help='its branches per convolution')
    group.add_argument(
        '--gpd-noise',
        type=float,
        default=None,
        metavar='STD',
        help="function-preserving noise, relative to each weight's standard deviation; default: 0 at ratio 2, and 0.1 "
        'above, where several replicas would stay equal for ever',
    )
    group.add_argument(
        '--gpd-scale',
        default='student',
        choices=SCALES,
        help='whose weights are stored: learning rates keep their meaning for "student", with "balanced" for both',
    )
    group.add_argument(
        '--gpd-share-weight',
        type=float,
        default=1.0,
        metavar='F',
        help="factor, from 0 to 1, of the gradient that wider models' losses give to the student's own entries",
    )
    group.add_argument(
        '--gpd-loss',
        default='sce',
        choices=[*GPD_LOSSES, *ADVERSARIAL_LOSSES],
        help=f'how the student learns from the dynamic teacher; with --adv also {", ".join(ADVERSARIAL_LOSSES)}',
    )
    group.add_argument(
        '--gpd-loss-args',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='NAME=VALUE',
        help='its hyperparameters, such as temperature=4 or standardize=true',
    )
    group.add_argument('--gpd-weight', type=float, default=3.0, metavar='W', help='weight of that loss')
    group.add_argument(
        '--gpd-weight-schedule',
        default='constant',
        choices=WEIGHT_SCHEDULES,
        help='how the weight goes to --gpd-weight-end by the end of training',
    )
    group.add_argument(
        '--gpd-weight-end', type=float, default=0.0, metavar='W', help='weight of that loss at the end, with a schedule'
    )
    group.add_argument(
        '--gpd-epochs',
        default=None,
        metavar='A-B',
        help='train with it from epoch A to before epoch B only, shares of all where there is a decimal point',
    )
    group.add_argument(
        '--gpd-method',
        default='joint',
        choices=METHODS,
        help='what a step trains: student and dynamic teacher, also random ratios between them ("sandwich"), or the '
        'student and one random ratio without distillation ("netaug")',
    )
    group.add_argument(
        '--gpd-between', type=int, default=2, metavar='N', help='ratios between in a step of "sandwich", at most'
    )
    group.add_argument(
        '--gpd-switch',
        action='store_true',
        help="leave out the dynamic teacher's loss, and its backward pass, while the distance of the two is large",
    )
    group.add_argument(
        '--gpd-gap-target',
        type=float,
        default=None,
        metavar='G',
        help="hold the dynamic teacher's lead in the task loss at this",
    )
    group.add_argument(
        '--gpd-gap-scales',
        default='teacher',
        choices=GAP_SCALES,
        help="by a factor of the dynamic teacher's loss, or of --gpd-weight",
    )


def add_static_teacher(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Static teacher')
    group.add_argument(
        '--kd-model-name',
        default=None,
        metavar='MODEL',
        help='timm model, hf-hub:<repo> or local-dir:<folder>, pretrained; several, separated by commas',
    )
    group.add_argument('--kd-model-path', default=None, metavar='FILE', help='load this checkpoint into it instead')
    group.add_argument(
        '--kd-img-size',
        default=None,
        metavar='PIXELS',
        help="side of its images, if not the student's",
    )
    group.add_argument(
        '--kd-class-map',
        default=None,
        metavar='FILE',
        help='a line for every class of the student with the number of its own, or of several',
    )
    group.add_argument('--kd-dtype', default=None, metavar='DTYPE', help="its dtype, if not the student's: bfloat16")
    group.add_argument('--kd-device', default=None, metavar='DEVICE', help='where it runs, if not on --device')
    group.add_argument(
        '--kd-cache',
        default=None,
        metavar='DIR',
        help='store its outputs there, and read those that are there: a later run needs no forward pass of it',
    )
    group.add_argument(
        '--kd-distill-type',
        default='logit',
        metavar='NAMES',
        help=f'losses, separated by commas: {", ".join(DISTILLERS)}, and with --adv '
        f'{", ".join(ADVERSARIAL_DISTILLERS)}; of several teachers "dkd" is from the mean of '
        'their probabilities, and "dkd@2" from the second',
    )
    group.add_argument(
        '--kd-token-distill-type',
        default='soft',
        choices=TOKEN_KINDS,
        help="of the loss token: the teacher's probabilities, or its most probable class",
    )
    group.add_argument(
        '--kd-student-feature-dim', type=int, default=None, metavar='WIDTH', help='checks the width of its embedding'
    )
    group.add_argument(
        '--kd-teacher-feature-dim', type=int, default=None, metavar='WIDTH', help='the same of the static teacher'
    )
    group.add_argument('--kd-loss-type', default='kl', choices=['kl'], help='of the loss logit')
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
    group.add_argument('--kd-temperature', type=float, default=4.0, help='temperature of logit (kd) and token')
