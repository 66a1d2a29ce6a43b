"""Flags of teachers that change as the student trains."""

import argparse

from ...task import EmaTeacherConfig

__all__ = ['add_adapting_teachers']


def add_adapting_teachers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Teachers that adapt')
    group.add_argument(
        '--ema-teacher',
        action='store_true',
        help='let a moving average of the student teach it, by --kd-distill-type; behind those of --kd-model-name',
    )
    group.add_argument(
        '--ema-teacher-prob',
        type=float,
        default=EmaTeacherConfig.prob,
        metavar='P',
        help='probability that a tensor of it moves in a step',
    )
    group.add_argument(
        '--ema-teacher-momentum',
        type=float,
        default=EmaTeacherConfig.momentum,
        metavar='M',
        help='what a tensor that moves keeps of itself, at the start; it rises to 1 by a cosine',
    )
    group.add_argument(
        '--kd-online-modules',
        action='store_true',
        help='let small modules in the static teacher train along with the student, and the teacher stay near it',
    )
