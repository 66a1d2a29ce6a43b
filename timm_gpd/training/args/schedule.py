"""Flags of epochs and of the learning rate's schedule."""

import argparse

__all__ = ['DECAY_FNS', 'SCHEDULES', 'add_schedule']

SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none')
DECAY_FNS = ('linear', '1-sqrt', 'cosine', 'power', 'exp')


def add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Epochs and learning rate schedule')
    group.add_argument('--sched', default='cosine', choices=SCHEDULES, help='scheduler')
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
    group.add_argument(
        '--lr-decay-fn', default=None, choices=DECAY_FNS, help='decay of wsd (default: 1-sqrt) and rsqrt (linear)'
    )
    group.add_argument(
        '--lr-stable-timescale', type=float, default=None, metavar='N', help='epochs of rsqrt (default: the warmup)'
    )
    group.add_argument('--warmup-lr', type=float, default=1e-5, help='learning rate that the warmup starts from')
    group.add_argument('--min-lr', type=float, default=0, help='lowest learning rate')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='epochs')
    group.add_argument('--start-epoch', type=int, default=None, metavar='N', help='epoch to start from')
    group.add_argument(
        '--stop-epoch', type=int, default=None, metavar='N', help='stop after this epoch; the schedule stays as it is'
    )
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], help='of multistep')
    group.add_argument(
        '--decay-epochs',
        type=float,
        default=None,
        metavar='N',
        help='interval of step (default: 90), decay phase of wsd and rsqrt; below 1 a share (default: 0.2)',
    )
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, help='factor of step, multistep and plateau')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='warmup')
    group.add_argument('--warmup-prefix', action='store_true', help='put the warmup before the schedule')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at the lowest rate')
    group.add_argument('--patience-epochs', type=int, default=10, metavar='N', help='of plateau')
