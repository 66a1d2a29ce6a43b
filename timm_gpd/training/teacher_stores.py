"""What a run says of the stores of its static teachers' outputs: how large they get, and what they were good for."""

import argparse
import os
import shutil
from typing import Any, List, Optional

import torch.nn as nn

from ..errors import UsageError
from ..task.stored_teacher import stored_teachers
from .data.loaders import mean_batch_size, uses_mixup
from .processes import Processes

__all__ = ['describe_stores', 'describe_use']


def describe_stores(
    args: argparse.Namespace,
    static: Optional[nn.Module],
    loader_train: Any,
    loader_eval: Any,
    world_size: int,
    num_epochs: int,
) -> List[str]:
    """How large the stores get, before anything is trained.

    Args:
        args: arguments of ``train.py``.
        static: the static teacher, or several as one; None for none.
        loader_train: timm's loader of training.
        loader_eval: of validation, or None.
        world_size: processes that train together.
        num_epochs: epochs of the run.

    Returns:
        The lines of a log; none where there are no stores.

    Raises:
        UsageError: if the disk has not the room for what may be missing.
    """
    stores = [] if static is None else stored_teachers(static)
    if not stores:
        return []
    is_fixed = args.no_aug and not uses_mixup(args) and not args.train_img_sizes
    if is_fixed:
        images = len(loader_train.dataset)
    else:
        views = max(args.aug_splits, 1) * world_size * num_epochs
        images = round(len(loader_train) * mean_batch_size(args, loader_train)) * views
    images += 0 if loader_eval is None else len(loader_eval.dataset)
    lines, missing = [], 0
    for teacher in stores:
        there = len(teacher.store)
        missing += max(images - there, 0) * teacher.bytes_per_image
        lines.append(
            f'Outputs of the static teacher for {images:,} images, {_bytes(teacher.bytes_per_image)} each, go to '
            f'{teacher.store.folder}: {_bytes(images * teacher.bytes_per_image)}. It holds {there:,}.'
        )
    free = shutil.disk_usage(args.kd_cache).free
    if missing > free:
        raise UsageError(
            f'--kd-cache {args.kd_cache} would grow by {_bytes(missing)}, outputs for {images:,} images, and its disk '
            f'has {_bytes(free)} left: choose another folder, fewer epochs or --no-aug, or losses of logits alone'
        )
    if not is_fixed:
        lines.append(
            'Every epoch shows other images: a later run finds their outputs if it has the same data, --seed and '
            'augmentation.'
        )
    return [*lines, 'The estimate above leaves the static teacher out: it computes only what is not there.']


def describe_use(static: Optional[nn.Module], processes: Processes) -> List[str]:
    """What was read and computed in a run. Every process has to call it.

    Args:
        static: the static teacher, or several as one; None for none.
        processes: those that trained together.

    Returns:
        The lines of a log, one for each store.
    """
    lines = []
    for teacher in [] if static is None else stored_teachers(static):
        read, computed = processes.sum([teacher.read, teacher.computed])
        name = os.path.basename(teacher.store.folder)
        lines.append(f"Static teacher's outputs: {read:,.0f} read from the store {name}, {computed:,.0f} computed")
    return lines


def _bytes(number: float) -> str:
    for unit in ('bytes', 'kB', 'MB', 'GB', 'TB'):
        if number < 1000 or unit == 'TB':
            break
        number /= 1000
    return f'{number:.3g} {unit}'
