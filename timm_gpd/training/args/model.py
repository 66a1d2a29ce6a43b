"""Flags of the model and of the images that it takes."""

import argparse

from timm.utils import ParseKwargs

__all__ = ['add_train_model', 'add_validate_model']


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
    group.add_argument(
        '--model-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='NAME=VALUE',
        help='arguments of the model',
    )
    group.add_argument('--channels-last', action='store_true', help='channels_last memory layout')
    group.add_argument('--fast-norm', action='store_true', help="timm's normalisation layers in half precision")
    return group


def add_train_model(parser: argparse.ArgumentParser) -> None:
    group = _add_model(parser)
    group.add_argument('--model', default='resnet50', metavar='MODEL', help='student; <arch>_gpd means <arch>')
    group.add_argument('--pretrained', action='store_true', help='start from pretrained weights')
    group.add_argument('--pretrained-path', default=None, metavar='FILE', help='load this file as pretrained weights')
    group.add_argument(
        '--pretrained-cfg-overlay',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='NAME=VALUE',
        help="values over those of the model's pretrained_cfg, such as num_classes=10",
    )
    group.add_argument('--initial-checkpoint', default='', metavar='FILE', help='load this checkpoint first')
    group.add_argument('--head-init-scale', type=float, default=None, metavar='S', help='factor of the classifier')
    group.add_argument('--head-init-bias', type=float, default=None, metavar='B', help='biases of the classifier')
    group.add_argument('--grad-checkpointing', action='store_true', help='recompute activations in backward')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='batch size of a process')
    group.add_argument('-vb', '--validation-batch-size', type=int, default=None, metavar='N', help='for validation')


def add_validate_model(parser: argparse.ArgumentParser) -> None:
    group = _add_model(parser)
    group.add_argument(
        '--model',
        '-m',
        default='dpn92',
        metavar='MODEL',
        help='timm model, <arch>_gpd, hf-hub:<repo> or local-dir:<folder>',
    )
    group.add_argument('--pretrained', action='store_true', help='use pretrained weights')
    group.add_argument('--checkpoint', default='', metavar='FILE', help='training checkpoint of that model')
    group.add_argument('--use-ema', action='store_true', help='use the averaged weights of the checkpoint')
    group.add_argument('--use-teacher', action='store_true', help='validate the dynamic teacher of the checkpoint')
    group.add_argument('--reparam', action='store_true', help='merge branches that the model can merge')
    group.add_argument('--test-pool', action='store_true', help='pool over larger images than the model was made for')
    group.add_argument('--use-train-size', action='store_true', help='the size of training images, not of test images')
    group.add_argument(
        '--crop-mode', default=None, choices=['squash', 'border', 'center'], help="crop (default: the model's)"
    )
    group.add_argument('--crop-border-pixels', type=int, default=None, metavar='N', help='pixels to cut off the border')
    group.add_argument('-b', '--batch-size', type=int, default=256, metavar='N', help='batch size of a process')
