"""Where a run's images are, and the datasets that timm makes of them."""

import argparse
import logging
import os
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Sequence, Tuple

from PIL import ImageMode
from timm.data import ImageDataset, create_dataset

from ...data.glyphs import read_glyphs
from ...errors import LIBRARY_ERRORS, UsageError, usage_errors
from ..args.arguments import Arguments
from ..student import InputConfig
from .class_folders import (
    EVAL_NAMES,
    TRAIN_NAMES,
    find_split,
    find_training_split,
    number_classes,
    read_class_map,
    scan_split,
)
from .digits import write_digits
from .glyphs import GlyphImages, find_glyphs
from .images import CheckedImages, LabelRange, LabelSet

__all__ = ['READERS', 'TORCH_DATASETS', 'DataSource', 'create_split', 'resolve_data', 'with_defaults']

_logger = logging.getLogger('train')

READERS = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
# Those of torchvision that timm knows: of the first it takes the test images for any split but "train" and "training".
_TWO_SPLITS = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')
_FOLDERS = ('image_folder', 'folder')
TORCH_DATASETS = (*_TWO_SPLITS, 'imagenet', 'inaturalist', 'inat', 'places365', *_FOLDERS)


@dataclass(frozen=True)
class DataSource:
    """Where images are.

    Attributes:
        dataset: name for timm's ``create_dataset``; empty for an image folder.
        folder: root of the dataset, or None where timm chooses it.
        split_folders: of an image folder, the folder of each split.
        class_map: of an image folder, the index of each class in every split; of others what ``--class-map`` says.
        defaults: what the data say of arguments that a command leaves open, by name.
    """

    dataset: str
    folder: Optional[str]
    split_folders: Dict[str, str] = field(default_factory=dict)
    class_map: Any = ''
    defaults: Dict[str, Any] = field(default_factory=dict)


def resolve_data(args: argparse.Namespace) -> DataSource:
    """Finds the dataset and its splits: writes the digits, and checks what is there.

    Args:
        args: arguments of ``train.py`` or ``validate.py``.

    Returns:
        Where the images are.

    Raises:
        UsageError: if there is no such folder, split or dataset, the classes of the splits differ, or the digits cannot
            be written.
    """
    reader, _, name = args.dataset.partition('/')
    if reader.lower() in ('', 'digits', 'glyphs', 'torch'):
        for flag, given in (('--target-key', args.target_key), ('--target-format', args.target_format)):
            if given:
                raise UsageError(f'{flag} is for datasets of samples with fields: hfds/, hfids/, tfds/ and wds/')
        if args.task == 'multilabel':
            raise UsageError('--task multilabel needs a dataset of several labels: hfds/, hfids/, tfds/ or wds/<name>')
    if args.dataset == 'digits':
        return _image_folder(args, '', write_digits(args.data_dir or 'data', args.digits_train_size, args.seed))
    if args.dataset == 'glyphs':
        return _glyphs(args)
    if not args.dataset and not args.data_dir:
        raise UsageError('no dataset: give --data-dir, or --dataset digits')
    if not args.dataset:
        if not os.path.exists(args.data_dir):
            raise UsageError(f'dataset folder {args.data_dir} does not exist: check --data-dir')
        return _image_folder(args, '', args.data_dir)
    if reader.lower() not in READERS or not name:
        known = ', '.join(['digits', 'glyphs', *(f'{known}/<name>' for known in READERS)])
        raise UsageError(f'--dataset {args.dataset} is not one of {known}; leave it out for an image folder')
    if reader.lower() == 'torch':
        _check_torch(args, name.split('/', 1)[-1].lower())
        if name.lower() in _FOLDERS:
            return _image_folder(args, args.dataset, args.data_dir)
    return DataSource(args.dataset, args.data_dir, class_map=args.class_map)


def with_defaults(args: Arguments, source: DataSource) -> Arguments:
    """Arguments with the values that the data give to those that the command leaves open.

    Args:
        args: arguments of ``train.py``.
        source: where the images are.

    Returns:
        A value for every argument; ``given`` stays as it was.
    """
    found = dict(source.defaults)
    if args.in_chans or args.img_size:  # which say something else of the input
        found.pop('input_size', None)
    return Arguments(args.given, **{**vars(args), **{key: found[key] for key in found if getattr(args, key) is None}})


def _glyphs(args: argparse.Namespace) -> DataSource:
    if not args.data_dir:
        raise UsageError('--dataset glyphs needs --data-dir, a folder that python -m timm_gpd.data.glyphs wrote')
    splits = _splits(args)
    defaults = find_glyphs(args.data_dir, splits)
    _warn_of_one_split(splits, len(set(splits)))
    return DataSource('glyphs', args.data_dir, defaults=defaults)


def _warn_of_one_split(splits: Sequence[str], different: int) -> None:
    if different < len(splits):
        _logger.warning(f'{" and ".join(splits)} are the same images: the metrics tell nothing about others')


def _splits(args: argparse.Namespace) -> Tuple[str, ...]:
    """Names of the splits that are read; the first one numbers the classes."""
    names = (getattr(args, 'train_split', ''), args.val_split)
    return tuple(name for name in names if name)


def _numbers_alone(args: argparse.Namespace) -> bool:
    """Whether a split is read without that of training, by ``validate.py``, and nothing says which classes it has."""
    return not hasattr(args, 'train_split') and not args.valid_labels


def _check_torch(args: argparse.Namespace, name: str) -> None:
    if name not in TORCH_DATASETS:
        raise UsageError(f'--dataset torch/{name} is none that timm knows: choose of {", ".join(TORCH_DATASETS)}')
    if args.class_map:
        raise UsageError(f"--class-map is for timm's own readers: torch/{name} numbers its classes itself")
    known = (*TRAIN_NAMES, *EVAL_NAMES, 'test')
    for split in _splits(args) if name in _TWO_SPLITS else ():
        if split not in known:
            raise UsageError(f'torch/{name} has no split {split!r}: choose of {", ".join(known)}')


def _image_folder(args: argparse.Namespace, dataset: str, root: Optional[str]) -> DataSource:
    splits = _splits(args)
    if not root or not os.path.exists(root):
        raise UsageError(f'--dataset {dataset} needs a folder: check --data-dir')
    if os.path.isfile(root):
        if len(splits) > 1:
            raise UsageError(f'{root} is one file, which has no splits: give --data-dir a folder with a folder of each')
        return DataSource(dataset, root, {splits[0]: root}, args.class_map)
    with usage_errors('check --data-dir', OSError):
        folders = {split: find_split(root, split, alone=len(splits) == 1) for split in splits}
        extensions = (getattr(args, 'input_key', None) or '').split(';')
        extensions = [part for part in extensions if part]
        found = {split: scan_split(folder, extensions) for split, folder in folders.items()}
        if _numbers_alone(args) and not args.class_map:
            training = find_training_split(found[splits[0]])
            if training is not None:  # whose classes are those of the model
                found = {'train': scan_split(training, extensions), **found}
    _warn_of_one_split(splits, len(set(folders.values())))
    class_map = read_class_map(args.class_map, folders[splits[0]]) if args.class_map else {}
    if getattr(args, 'real_labels', '') and all(split.classes == ('',) for split in found.values()):
        return DataSource(dataset, root, folders, args.class_map)  # labels go by the names of the files
    indices = number_classes(found, class_map)
    if dataset and any(split.classes != found[splits[0]].classes for split in found.values()):
        raise UsageError(
            f'the splits of {root} have different classes, which {dataset} numbers in each: leave out --dataset'
        )
    return DataSource(dataset, root, folders, '' if dataset else indices)


def create_split(
    args: argparse.Namespace,
    source: DataSource,
    input_config: InputConfig,
    num_classes: int,
    split: str,
    is_training: bool,
) -> Any:
    """One split of the dataset, through timm's factory, or of glyphs.

    Args:
        args: arguments of ``train.py`` or ``validate.py``.
        source: where the images are.
        input_config: the model's input.
        num_classes: the model's classes.
        split: name of the split.
        is_training: whether it is trained on, which shuffles a stream of images.

    Returns:
        The dataset. Every label is checked as it is loaded; images that cannot be read are counted, where timm's
        reader opens one at a time.

    Raises:
        UsageError: if the dataset cannot be read or has other classes than the model.
    """
    if source.dataset == 'glyphs':
        dataset = _open_glyphs(args, source, input_config, split, is_training)
    else:
        dataset = _open(args, source, input_config, split, is_training)
    highest, count = _count_classes(dataset)
    if highest >= num_classes:
        raise UsageError(
            f'the {split} split has {count} classes and the model {num_classes}: set --num-classes'
            if highest < count
            else f'the {split} split has the label {highest} and the model {num_classes} classes: check --class-map'
        )
    if 0 < count < num_classes and (is_training or _numbers_alone(args)):
        what = 'some are never trained' if is_training else 'they are its first ones, if --class-map does not tell'
        _logger.warning(f'the {split} split has {count} classes and the model {num_classes}: {what}')
    if isinstance(dataset, ImageDataset):
        dataset = CheckedImages(dataset, split, args.max_bad_images)
    if args.task == 'multilabel':
        dense = args.target_format == 'multihot'
        dataset.target_transform = LabelSet(num_classes, split, dense)
    else:
        dataset.target_transform = LabelRange(num_classes, split)
    return dataset


def _open_glyphs(
    args: argparse.Namespace, source: DataSource, input_config: InputConfig, split: str, is_training: bool
) -> GlyphImages:
    wanted, (channels, height, width) = source.defaults['input_size'], input_config.input_size
    if [channels, height, width] != wanted:
        raise UsageError(
            f'the glyphs are of {wanted[1]} x {wanted[2]} grey pixels, and the model takes {channels} x {height} x '
            f'{width}: set --input-size {" ".join(map(str, wanted))}'
        )
    glyphs = read_glyphs(source.folder or '', split)
    return GlyphImages(glyphs, is_training, is_augmented=not (is_training and args.no_aug))


def _open(
    args: argparse.Namespace, source: DataSource, input_config: InputConfig, split: str, is_training: bool
) -> Any:
    """A dataset of one of timm's readers, or of torchvision."""
    channels = input_config.input_size[0]
    mode = args.input_img_mode or ('RGB' if channels == 3 else 'L')
    bands = ImageMode.getmode(mode).bands
    folder = source.split_folders.get(split)
    if args.input_img_mode and len(bands) != channels:
        raise UsageError(f'--input-img-mode {mode} has {len(bands)} channels, and the model {channels}')
    if folder is not None and len(bands) != channels:
        raise UsageError(
            f'images of a folder are read as grey or RGB, and the model takes {channels} channels: set --input-img-mode'
            f'{" RGBA or CMYK" if channels == 4 else ""}'
        )
    keys = dict(input_key=args.input_key, target_key=args.target_key, target_format=args.target_format)
    with usage_errors('check --data-dir, --dataset and the names of the splits', *LIBRARY_ERRORS, ImportError):
        return create_dataset(
            source.dataset,
            root=folder or source.folder,
            split=split,
            search_split=False,  # it has been found
            is_training=is_training,
            class_map=source.class_map,
            download=args.dataset_download,
            trust_remote_code=args.dataset_trust_remote_code,
            batch_size=args.batch_size,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            repeats=args.epoch_repeats if is_training else 0,
            seed=args.seed,
            input_img_mode=mode,
            **{name: value for name, value in keys.items() if value is not None},
        )


def _count_classes(dataset: Any) -> Tuple[int, int]:
    """Highest index and number of a dataset's classes, as far as it tells: -1 and 0 where it does not."""
    reader = getattr(dataset, 'reader', dataset)
    for name in ('class_to_idx', 'class_name_to_idx'):
        classes = getattr(reader, name, None)
        if classes:
            return max(classes.values()), len(set(classes.values()))
    return -1, 0
