"""Flags of what is done to training images and batches."""

import argparse

__all__ = ['add_augmentation', 'add_image_sizes']


def add_augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Augmentation')
    group.add_argument('--no-aug', action='store_true', help='no training augmentation')
    group.add_argument(
        '--train-crop-mode', default=None, choices=['rrc', 'rkrc', 'rkrr'], help='crop mode in training (default: rrc)'
    )
    group.add_argument('--scale', type=float, nargs='+', default=[0.08, 1.0], help='random resize scale')
    group.add_argument('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], help='random aspect ratio')
    group.add_argument('--hflip', type=float, default=0.5, help='horizontal flip probability')
    group.add_argument('--vflip', type=float, default=0.0, help='vertical flip probability')
    group.add_argument('--color-jitter', type=float, default=0.4, help='color jitter')
    group.add_argument('--color-jitter-prob', type=float, default=None, help='its probability')
    group.add_argument('--grayscale-prob', type=float, default=None, help='random grayscale probability')
    group.add_argument('--gaussian-blur-prob', type=float, default=None, help='gaussian blur probability')
    group.add_argument('--aa', default=None, metavar='POLICY', help='AutoAugment, RandAugment or AugMix policy')
    group.add_argument(
        '--aug-repeats', type=float, default=0, metavar='N', help='times that an image is in a batch, over processes'
    )
    group.add_argument(
        '--aug-splits', type=int, default=0, metavar='N', help='views of every image in a batch, the first one clean'
    )
    group.add_argument('--reprob', type=float, default=0.0, help='random erasing probability')
    group.add_argument('--remode', default='pixel', choices=['const', 'rand', 'pixel'], help='random erasing mode')
    group.add_argument('--recount', type=int, default=1, help='random erasing count')
    group.add_argument('--resplit', action='store_true', help='do not erase in the first split')
    group.add_argument('--mixup', type=float, default=0.0, help='mixup alpha')
    group.add_argument('--cutmix', type=float, default=0.0, help='cutmix alpha')
    group.add_argument('--cutmix-minmax', type=float, nargs='+', default=None, help='cutmix ratios')
    group.add_argument('--mixup-prob', type=float, default=1.0, help='probability of mixup or cutmix')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, help='probability of cutmix among both')
    group.add_argument(
        '--mixup-mode', default='batch', choices=['batch', 'pair', 'elem', 'half'], help='what shares a ratio'
    )
    group.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N', help='epoch to turn mixup off')
    group.add_argument('--train-interpolation', default='random', help='resize interpolation in training')


def add_image_sizes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Image sizes that change between batches')
    group.add_argument('--train-img-sizes', type=int, nargs='+', default=None, metavar='N', help='sizes in pixels')
    group.add_argument(
        '--train-batch-sizes',
        type=int,
        nargs='+',
        default=None,
        metavar='N',
        help='batch size for every size (default: --batch-size)',
    )
    group.add_argument(
        '--train-size-probs', type=float, nargs='+', default=None, metavar='P', help='their shares (default: equal)'
    )
    group.add_argument(
        '--train-size-schedule',
        default='constant',
        choices=['constant', 'progressive'],
        help='progressive goes from the first size to the last',
    )
    group.add_argument(
        '--train-size-schedule-spread', type=float, default=0.65, help='deviation of progressive, in sizes'
    )
    group.add_argument(
        '--train-size-random-mix', type=float, default=0.1, help='share of sizes that progressive draws at random'
    )
    group.add_argument(
        '--train-batches-per-epoch',
        '--train-steps-per-epoch',
        type=int,
        default=None,
        metavar='N',
        help='batches of an epoch (default: by the number of images)',
    )
    group.add_argument(
        '--variable-batch-loss-scale',
        default='none',
        choices=['none', 'sqrt', 'linear'],
        help='how the loss of a batch grows with its size',
    )
