"""Flags of datasets: where images and targets come from."""

import argparse

__all__ = ['add_data', 'add_train_data', 'add_validate_data']


def add_data(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What both programs take; returns the group."""
    group = parser.add_argument_group('Dataset')
    parser.add_argument('data', nargs='?', metavar='DIR', help='dataset folder (deprecated, use --data-dir)')
    group.add_argument('--data-dir', metavar='DIR', help='dataset folder')
    group.add_argument(
        '--dataset',
        metavar='NAME',
        default='',
        help='"<type>/<name>" as in timm, "digits" for scikit-learn\'s digits, "glyphs" for characters of fonts, '
        'empty for a folder',
    )
    group.add_argument('--dataset-download', action='store_true', help='let torch/ and tfds/ datasets download')
    group.add_argument(
        '--dataset-trust-remote-code', action='store_true', help="let a Hugging Face dataset run its repository's code"
    )
    group.add_argument('--class-map', metavar='FILE', default='', help='class name to index mapping')
    group.add_argument('--input-img-mode', default=None, help='image mode, such as RGB or L (default: by channels)')
    group.add_argument('--input-key', default=None, metavar='KEY', help='field of a sample that is the image')
    group.add_argument(
        '--target-key',
        default=None,
        metavar='KEY',
        help='field of a sample that is the target; several, separated by commas, are a binary field per class',
    )
    group.add_argument(
        '--target-format',
        default=None,
        choices=['indices', 'multihot'],
        help='what a multi-label target is: indices of its classes, or a number per class (default: indices)',
    )
    group.add_argument(
        '--task',
        default='classification',
        choices=['classification', 'multilabel'],
        help='whether an image has one class or any number of them',
    )
    group.add_argument(
        '--multilabel-threshold',
        type=float,
        default=0.5,
        metavar='P',
        help='multilabel: probability from which on F1 counts a class as predicted',
    )
    group.add_argument(
        '--max-bad-images',
        type=float,
        default=0.01,
        metavar='SHARE',
        help='share of the images of a split that may be unreadable before the run fails',
    )
    group.add_argument(
        '--digits-train-size',
        type=int,
        default=300,
        metavar='N',
        help='digits: training images, stratified and chosen by --seed',
    )
    return group


def add_train_data(parser: argparse.ArgumentParser) -> None:
    group = add_data(parser)
    group.add_argument('--train-split', metavar='NAME', default='train', help='split to train on')
    group.add_argument('--val-split', metavar='NAME', default='validation', help='split to validate on')
    group.add_argument(
        '--train-num-samples', type=int, default=None, metavar='N', help='images of a streamed training split'
    )
    group.add_argument(
        '--val-num-samples', type=int, default=None, metavar='N', help='images of a streamed validation split'
    )
    group.add_argument(
        '--epoch-repeats',
        type=float,
        default=0.0,
        metavar='N',
        help='times that a streamed dataset is repeated in an epoch',
    )


def add_validate_data(parser: argparse.ArgumentParser) -> None:
    group = add_data(parser)
    group.add_argument(
        '--split', '--val-split', dest='val_split', metavar='NAME', default='validation', help='split to validate on'
    )
    group.add_argument(
        '--num-samples', dest='val_num_samples', type=int, default=None, metavar='N', help='images of a streamed split'
    )
