"""Flags of where, in which precision and in how many processes a program computes."""

import argparse

__all__ = ['add_device', 'add_train_device']


def add_device(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What both programs take; returns the group."""
    group = parser.add_argument_group('Device')
    group.add_argument('--device', default='cuda', help='device to use')
    group.add_argument('--amp', action='store_true', help='automatic mixed precision')
    group.add_argument('--amp-dtype', default='float16', choices=['float16', 'bfloat16'], help='its lower precision')
    group.add_argument(
        '--model-dtype',
        default=None,
        choices=['float32', 'float16', 'bfloat16'],
        help='precision of weights and images, without --amp (default: float32)',
    )
    group.add_argument(
        '--torchcompile',
        nargs='?',
        default=None,
        const='inductor',
        metavar='BACKEND',
        help='compile what is computed (default backend: inductor)',
    )
    group.add_argument('--torchcompile-mode', default=None, metavar='MODE', help='mode of torch.compile')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes')
    group.add_argument('--pin-mem', action='store_true', help='pin memory in the data loader')
    group.add_argument('--no-prefetcher', action='store_true', help='disable the prefetcher')
    return group


def add_train_device(parser: argparse.ArgumentParser) -> None:
    group = add_device(parser)
    group.add_argument(
        '--device-modules', nargs='+', default=None, metavar='MODULE', help='Python modules that bring a device'
    )
    group.add_argument('--no-ddp-bb', action='store_true', help='do not broadcast buffers between processes')
    group.add_argument('--synchronize-step', action='store_true', help='wait for the device at the end of every step')
    group.add_argument('--local_rank', '--local-rank', type=int, default=0, help='index of the process on its machine')
    group.add_argument('--worker-seeding', default='all', choices=['all', 'part'], help='worker seed mode')
    group.add_argument(
        '--use-multi-epochs-loader', action='store_true', help='data loading processes stay from epoch to epoch anyway'
    )
