"""Flags of the optimizer."""

import argparse

from timm.utils import ParseKwargs

__all__ = ['add_optimizer']


def add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Optimizer')
    group.add_argument('--opt', default='sgd', metavar='NAME', help='optimizer')
    group.add_argument('--opt-eps', type=float, default=None, help='its epsilon')
    group.add_argument('--opt-betas', type=float, nargs='+', default=None, help='its betas')
    group.add_argument(
        '--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE', help='its other arguments'
    )
    group.add_argument('--momentum', type=float, default=0.9, help='its momentum')
    group.add_argument('--weight-decay', type=float, default=2e-5, help='weight decay')
    group.add_argument('--clip-grad', type=float, default=None, metavar='NORM', help='gradient clipping')
    group.add_argument(
        '--clip-mode',
        default='norm',
        choices=['norm', 'value', 'agc', 'own-norm'],
        help='what is clipped; "own-norm" is the norm of student and dynamic teacher each',
    )
    group.add_argument('--layer-decay', type=float, default=None, help='layer-wise learning rate decay')
    group.add_argument('--layer-decay-min-scale', type=float, default=0, help='lower bound of its factors')
    group.add_argument(
        '--layer-decay-no-opt-scale', type=float, default=None, help='do not train layers of smaller factors than this'
    )
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches per update')
