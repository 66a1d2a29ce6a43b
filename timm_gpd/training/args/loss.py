"""Flags of the task loss."""

import argparse

from timm.loss import CLASS_WEIGHT_METHOD_KINDS, LOSS_TYPES

__all__ = ['add_loss']


def _methods(kind: str) -> str:
    return ', '.join(method for method, weights in CLASS_WEIGHT_METHOD_KINDS.items() if weights == kind)


def add_loss(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Task loss')
    group.add_argument(
        '--loss', default=None, choices=LOSS_TYPES, help='loss (default: ce, or bce where --task is multilabel)'
    )
    group.add_argument(
        '--smoothing', type=float, default=None, help='label smoothing (default: 0.1, or 0 where --task is multilabel)'
    )
    group.add_argument('--jsd-loss', action='store_true', help='--loss jsd, between the views of --aug-splits')
    group.add_argument('--bce-loss', action='store_true', help='--loss bce')
    group.add_argument('--bce-sum', action='store_true', help='bce: sum over classes')
    group.add_argument('--bce-target-thresh', type=float, default=None, help='bce: threshold of its targets')
    group.add_argument('--bce-pos-weight', type=float, default=None, help='--loss-pos-weight as a number')
    group.add_argument(
        '--class-stats', default=None, metavar='FILE', help='JSON of pos_counts, images of every class, and num_samples'
    )
    group.add_argument(
        '--loss-pos-weight',
        default=None,
        metavar='W',
        help=f'weight of positive terms: a number, numbers, a file, or from --class-stats: {_methods("pos_weight")}',
    )
    group.add_argument(
        '--loss-class-weight',
        default=None,
        metavar='W',
        help=f'weight of classes: a number, numbers, a file, or from --class-stats: {_methods("class_weight")}',
    )
    group.add_argument('--loss-weight-power', type=float, default=1.0, help='exponent of neg_pos and inv_freq')
    group.add_argument('--loss-weight-beta', type=float, default=0.999, help='beta of effective_num')
    group.add_argument('--loss-weight-max', type=float, default=None, help='upper bound of weights from --class-stats')
    group.add_argument('--asl-gamma-pos', type=float, default=1.0, help='asl: focus on positives')
    group.add_argument('--asl-gamma-neg', type=float, default=4.0, help='asl: focus on negatives')
    group.add_argument('--asl-clip', type=float, default=0.05, help='asl: margin of negatives')
    group.add_argument(
        '--asl-reduction', default='batchmean', choices=['batchmean', 'sum', 'mean'], help='asl: sum or mean of terms'
    )
    group.add_argument('--poly-epsilon', type=float, default=2.0, help='poly: coefficient')
    group.add_argument('--poly-gamma', type=float, default=0.0, help='poly: focus, multilabel')
    group.add_argument('--poly-alpha', type=float, default=None, help='poly: balance of positives, multilabel')
    group.add_argument('--twoway-tp', type=float, default=4.0, help='twoway: temperature of positives')
    group.add_argument('--twoway-tn', type=float, default=1.0, help='twoway: temperature of negatives')
    group.add_argument('--db-neg-scale', type=float, default=2.0, help='db: scale of negative logits')
    group.add_argument('--db-init-bias', type=float, default=0.05, help="db: shift by a class's frequency")
    group.add_argument('--db-focal-gamma', type=float, default=2.0, help='db: focus')
