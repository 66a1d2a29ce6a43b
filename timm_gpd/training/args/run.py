"""Flags of a run: checkpoints, what it reports, and where it writes."""

import argparse

__all__ = ['add_results', 'add_run']


def add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Run')
    group.add_argument('--output', default='', metavar='DIR', help='output folder (default: ./output/train)')
    group.add_argument('--experiment', default='', metavar='NAME', help='sub-folder (default: time, model, size)')
    group.add_argument(
        '--resume',
        default='',
        metavar='FILE',
        help='continue the run of this checkpoint; "auto": that of the last one of --experiment, if there is one',
    )
    group.add_argument('--no-resume-opt', action='store_true', help='without its optimizer state')
    group.add_argument('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep')
    group.add_argument(
        '--save-epochs', type=int, nargs='+', default=[], metavar='N', help='epochs after which milestone-N is kept'
    )
    group.add_argument(
        '--recovery-interval', type=int, default=0, metavar='N', help='updates between recovery checkpoints'
    )
    group.add_argument(
        '--on-nan',
        default='stop',
        choices=['stop', 'skip', 'rewind'],
        help='what a loss or gradient that is not finite leads to',
    )
    group.add_argument('--seed', type=int, default=42, metavar='S', help='random seed')
    group.add_argument('--val-interval', type=int, default=1, metavar='N', help='epochs between validations')
    group.add_argument(
        '--eval-metric', default=None, help='metric of the best checkpoint (default: top1, or map where multilabel)'
    )
    group.add_argument('--log-interval', type=int, default=50, metavar='N', help='batches between log lines')
    group.add_argument('--save-images', action='store_true', help='save a batch of images with every log line')
    group.add_argument('--log-tensorboard', action='store_true', help='log metrics to TensorBoard')
    group.add_argument('--log-wandb', action='store_true', help='log metrics to Weights & Biases')
    group.add_argument('--wandb-project', default=None, metavar='NAME', help='its project')
    group.add_argument('--wandb-tags', nargs='+', default=[], metavar='TAG', help='tags of the run')
    group.add_argument('--wandb-resume-id', default='', metavar='ID', help='run to continue, with --resume')


def add_results(parser: argparse.ArgumentParser) -> None:
    """What ``validate.py`` reports."""
    group = parser.add_argument_group('Results')
    group.add_argument('--results-file', default='', metavar='FILE', help='write the results there')
    group.add_argument('--results-format', default='csv', choices=['csv', 'json'], help='format of that file')
    group.add_argument('--real-labels', default='', metavar='FILE', help='JSON of ImageNet-ReaL labels')
    group.add_argument('--valid-labels', default='', metavar='FILE', help='indices of the classes that images have')
    group.add_argument(
        '--metrics-avg',
        default=None,
        choices=['micro', 'macro', 'weighted'],
        help='precision, recall and F1 as well, averaged over classes like this',
    )
    group.add_argument('--retry', action='store_true', help='halve the batch until it fits into memory')
    group.add_argument('--num-gpu', type=int, default=1, metavar='N', help='GPUs of this process')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='random seed; digits: of the training images')
    group.add_argument(
        '--log-freq',
        '--log-interval',
        dest='log_interval',
        type=int,
        default=10,
        metavar='N',
        help='batches between log lines',
    )
