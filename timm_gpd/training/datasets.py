"""Where a run's images are, and the datasets that timm makes of them."""

import argparse
import os
from dataclasses import dataclass
from typing import Any, Optional

from timm.data import create_dataset

from ..errors import UsageError, usage_errors
from .digits import write_digits
from .student import InputConfig

__all__ = ['DataSource', 'create_split', 'resolve_data']


@dataclass(frozen=True)
class DataSource:
    """Where images are.

    Attributes:
        dataset: name for timm's ``create_dataset``; empty for an image folder.
        folder: root of the dataset, or None where timm chooses it.
    """

    dataset: str
    folder: Optional[str]


def resolve_data(args: argparse.Namespace) -> DataSource:
    """Finds the dataset: writes the digits, and checks that a folder is there.

    Args:
        args: arguments of ``train.py`` or ``validate.py``.

    Returns:
        Where the images are.

    Raises:
        UsageError: if there is no such folder, or the digits cannot be written.
    """
    if args.dataset == 'digits':
        return DataSource('', write_digits(args.data_dir or 'data', args.digits_train_size, args.seed))
    if not args.dataset:
        if not args.data_dir:
            raise UsageError('no dataset: give --data-dir, or --dataset digits')
        if not os.path.exists(args.data_dir):
            raise UsageError(f'dataset folder {args.data_dir} does not exist: check --data-dir')
    return DataSource(args.dataset, args.data_dir)


def create_split(
    args: argparse.Namespace,
    source: DataSource,
    input_config: InputConfig,
    num_classes: int,
    split: str,
    is_training: bool,
) -> Any:
    """One split of the dataset, through timm's factory.

    Args:
        args: arguments of ``train.py`` or ``validate.py``.
        source: where the images are.
        input_config: the model's input.
        num_classes: the model's classes.
        split: name of the split.
        is_training: whether it is trained on, which shuffles a stream of images.

    Returns:
        timm's dataset.

    Raises:
        UsageError: if the dataset cannot be read or has other classes than the model.
    """
    mode = args.input_img_mode or ('RGB' if input_config.input_size[0] == 3 else 'L')
    with usage_errors(
        'check --data-dir, --dataset and the names of the splits',
        RuntimeError,
        ValueError,
        OSError,
        AssertionError,
        ImportError,
        IndexError,
    ):
        dataset = create_dataset(
            source.dataset,
            root=source.folder,
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            input_img_mode=mode,
        )
    classes = getattr(dataset.reader, 'class_to_idx', None) if hasattr(dataset, 'reader') else None
    if classes and len(classes) > num_classes:
        raise UsageError(f'the {split} split has {len(classes)} classes and the model {num_classes}: set --num-classes')
    return dataset
