"""Flags of dropout, batch norm and averaged weights."""

import argparse

__all__ = ['add_regularization']


def add_regularization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Dropout, batch norm, averaged weights')
    group.add_argument('--drop', type=float, default=0.0, metavar='PCT', help='dropout rate')
    group.add_argument('--drop-path', type=float, default=None, metavar='PCT', help='stochastic depth rate')
    group.add_argument('--drop-block', type=float, default=None, metavar='PCT', help='drop block rate')
    group.add_argument('--bn-momentum', type=float, default=None, help='BatchNorm momentum')
    group.add_argument('--bn-eps', type=float, default=None, help='BatchNorm epsilon')
    group.add_argument('--sync-bn', action='store_true', help='statistics over the batches of all processes')
    group.add_argument(
        '--dist-bn',
        default='reduce',
        choices=['broadcast', 'reduce', ''],
        help="after an epoch, all processes' statistics become those of the first, or their mean",
    )
    group.add_argument('--split-bn', action='store_true', help='statistics for every view of --aug-splits')
    group.add_argument('--model-ema', action='store_true', help='track a moving average of the weights')
    group.add_argument('--model-ema-force-cpu', action='store_true', help='keep it on the CPU; it is not validated')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, help='its decay')
    group.add_argument('--model-ema-warmup', action='store_true', help='warm its decay up')
