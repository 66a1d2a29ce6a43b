"""The static teachers that a command names."""

import argparse
from typing import List, Optional, Union

import torch

from ..command_line import flag_of
from ..errors import UsageError
from ..task import EmaTeacherConfig, StaticTeacherConfig
from ..task.static_teacher import ClassMap

__all__ = ['read_static_teachers']

_OF_ONE = ('kd_model_path', 'kd_img_size', 'kd_class_map', 'kd_dtype', 'kd_device')


def read_static_teachers(args: argparse.Namespace) -> List[Union[StaticTeacherConfig, EmaTeacherConfig]]:
    """What ``--kd-model-name``, the flags of each teacher and ``--ema-teacher`` say.

    Args:
        args: arguments of ``train.py``.

    Returns:
        One for every name, and last the moving average; none where there are none.

    Raises:
        UsageError: if names and values of another flag do not match, or a value is none.
    """
    average: List[Union[StaticTeacherConfig, EmaTeacherConfig]] = []
    if args.ema_teacher:
        average.append(EmaTeacherConfig(args.ema_teacher_prob, args.ema_teacher_momentum, args.seed))
    if not args.kd_model_name:
        if args.kd_model_path:
            raise UsageError('--kd-model-path needs --kd-model-name, the architecture of that checkpoint')
        return average
    names = args.kd_model_name.split(',')
    if '' in names:
        raise UsageError(f'--kd-model-name {args.kd_model_name} has a name that is empty: leave out that comma')
    of_each = {argument: _values(argument, getattr(args, argument), len(names)) for argument in _OF_ONE}
    return [
        StaticTeacherConfig(
            name,
            path=of_each['kd_model_path'][index],
            img_size=_read_size(of_each['kd_img_size'][index]),
            class_map=_read_class_map(of_each['kd_class_map'][index]),
            device=_read_device(of_each['kd_device'][index]),
            dtype=_read_dtype(of_each['kd_dtype'][index]),
            cache=args.kd_cache,
            online_modules=args.kd_online_modules,
        )
        for index, name in enumerate(names)
    ] + average


def _values(argument: str, value: Optional[str], count: int) -> List[Optional[str]]:
    """One value for every teacher: a single one is of all, but for a file of weights."""
    if not value:
        return [None] * count
    is_path = argument in ('kd_model_path', 'kd_class_map')
    values = [text or None for text in value.split(',')] if count > 1 or not is_path else [value]
    if len(values) == 1 and argument != 'kd_model_path':
        return values * count
    if len(values) != count:
        raise UsageError(
            f'{flag_of(argument)} has {len(values)} values and --kd-model-name {count} teachers: give one for each, '
            'separated by commas; an empty one is none'
        )
    return values


def _read_size(text: Optional[str]) -> Optional[int]:
    return None if text is None else int(text)


def _read_dtype(text: Optional[str]) -> Optional[torch.dtype]:
    return None if text is None else getattr(torch, text)


def _read_device(text: Optional[str]) -> Optional[torch.device]:
    try:
        return None if text is None else torch.device(text)
    except RuntimeError:
        raise UsageError(f'--kd-device {text} is no device: give one as in cuda:1 or cpu')


def _read_class_map(path: Optional[str]) -> Optional[ClassMap]:
    """A line for every class of the student: numbers of the teacher's classes."""
    if path is None:
        return None
    try:
        with open(path, encoding='utf-8') as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'--kd-class-map {path} cannot be read: {getattr(error, "strerror", None) or "it is no text"}')
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.split() or not all(word.isdecimal() for word in line.split()):
            raise UsageError(
                f"--kd-class-map {path}, line {number}: {line!r} is not the number of a class of the static teacher's, "
                'or several with blanks between them'
            )
        rows.append([int(word) for word in line.split()])
    return rows
