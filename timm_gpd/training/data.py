"""Datasets and loaders of a run, through timm's factories."""
import argparse
import os
from typing import Any, Dict, Tuple

import torch
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader

from ..errors import UsageError, usage_errors
from .digits import write_digits

__all__ = ['create_eval_loader', 'create_train_loader', 'prepare_dataset', 'uses_mixup']


def prepare_dataset(args: argparse.Namespace) -> None:
    """Makes sure that there is a dataset: writes the digits, and checks that a folder is one.

    Raises:
        UsageError: if the folder does not exist.
    """
    if args.dataset == 'digits':
        args.data_dir = write_digits(args.data_dir or 'data', args.digits_train_size, args.seed)
        args.dataset = ''
    if not args.dataset:
        if not args.data_dir:
            raise UsageError('no dataset: give --data-dir, or --dataset digits')
        if not os.path.exists(args.data_dir):
            raise UsageError(f'dataset folder {args.data_dir} does not exist: check --data-dir')


def _create_dataset(args: argparse.Namespace, data_config: Dict[str, Any], split: str, is_training: bool):
    mode = args.input_img_mode or ('RGB' if data_config['input_size'][0] == 3 else 'L')
    with usage_errors('check --data-dir, --dataset and the names of the splits', RuntimeError, ValueError, OSError,
                      AssertionError, ImportError, IndexError):
        dataset = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            input_img_mode=mode,
        )
    classes = getattr(dataset.reader, 'class_to_idx', None) if hasattr(dataset, 'reader') else None
    if classes and len(classes) > args.num_classes:
        raise UsageError(
            f'the {split} split has {len(classes)} classes and the model {args.num_classes}: set --num-classes')
    return dataset


def _common(args: argparse.Namespace, data_config: Dict[str, Any], device: torch.device) -> Dict[str, Any]:
    return dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=device,
        use_prefetcher=not args.no_prefetcher,
    )


def uses_mixup(args: argparse.Namespace) -> bool:
    """Whether targets are mixed, and so soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def create_train_loader(args: argparse.Namespace, data_config: Dict[str, Any], device: torch.device) -> Tuple[Any, Any]:
    """Training loader, and the mixup function to apply to its batches (None where the loader does it, or nobody).

    Raises:
        UsageError: if the dataset cannot be read or has other classes than the model.
    """
    mixup_fn, collate_fn = None, None
    if uses_mixup(args):
        mixup_class = Mixup if args.no_prefetcher else FastCollateMixup
        mixup = mixup_class(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
        mixup_fn, collate_fn = (mixup, None) if args.no_prefetcher else (None, mixup)
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config['interpolation']
    dataset = _create_dataset(args, data_config, args.train_split, is_training=True)
    if len(dataset) < args.batch_size:
        raise UsageError(f'{len(dataset)} training images do not fill a batch of {args.batch_size}: lower --batch-size')
    loader = create_loader(
        dataset,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.,
        auto_augment=args.aa,
        interpolation=interpolation,
        collate_fn=collate_fn,
        worker_seeding=args.worker_seeding,
        **_common(args, data_config, device),
    )
    return loader, mixup_fn


def create_eval_loader(args: argparse.Namespace, data_config: Dict[str, Any], device: torch.device) -> Any:
    """Validation loader.

    Raises:
        UsageError: if the dataset cannot be read or has other classes than the model.
    """
    return create_loader(
        _create_dataset(args, data_config, args.val_split, is_training=False),
        batch_size=getattr(args, 'validation_batch_size', None) or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        **_common(args, data_config, device),
    )
