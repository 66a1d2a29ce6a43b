"""Loaders of a run, through timm's factories."""

import argparse
from typing import Any, Dict, Optional, Tuple

import torch
from timm.data import FastCollateMixup, Mixup, create_loader

from ..errors import UsageError
from .datasets import DataSource, create_split
from .student import InputConfig

__all__ = ['create_eval_loader', 'create_train_loader', 'uses_mixup']


def _common(args: argparse.Namespace, input_config: InputConfig, device: torch.device) -> Dict[str, Any]:
    return dict(
        input_size=input_config.input_size,
        mean=input_config.mean,
        std=input_config.std,
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=device,
        use_prefetcher=not args.no_prefetcher,
    )


def uses_mixup(args: argparse.Namespace) -> bool:
    """Whether targets are mixed, and so soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def create_train_loader(
    args: argparse.Namespace,
    source: DataSource,
    input_config: InputConfig,
    num_classes: int,
    device: torch.device,
) -> Tuple[Any, Optional[Mixup]]:
    """Training loader, and the mixup function to apply to its batches.

    Args:
        args: arguments of ``train.py``.
        source: where the images are.
        input_config: the student's input.
        num_classes: the student's classes.
        device: where a prefetching loader puts batches.

    Returns:
        A loader of images (B, in_chans, H, W), normalised, and of class indices (B,) or, mixed, class probabilities
        (B, num_classes); and what mixes its batches: None where the loader does it, or nobody.

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
            num_classes=num_classes,
        )
        mixup_fn, collate_fn = (mixup, None) if args.no_prefetcher else (None, mixup)
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = input_config.interpolation
    dataset = create_split(args, source, input_config, num_classes, args.train_split, is_training=True)
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
        grayscale_prob=args.grayscale_prob or 0.0,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.0,
        auto_augment=args.aa,
        interpolation=interpolation,
        collate_fn=collate_fn,
        worker_seeding=args.worker_seeding,
        **_common(args, input_config, device),
    )
    return loader, mixup_fn


def create_eval_loader(
    args: argparse.Namespace,
    source: DataSource,
    input_config: InputConfig,
    num_classes: int,
    device: torch.device,
) -> Any:
    """Validation loader.

    Args:
        args: arguments of ``train.py`` or ``validate.py``.
        source: where the images are.
        input_config: the model's input.
        num_classes: the model's classes.
        device: where a prefetching loader puts batches.

    Returns:
        A loader of images (B, in_chans, H, W), normalised, and class indices (B,).

    Raises:
        UsageError: if the dataset cannot be read or has other classes than the model.
    """
    return create_loader(
        create_split(args, source, input_config, num_classes, args.val_split, is_training=False),
        batch_size=getattr(args, 'validation_batch_size', None) or args.batch_size,
        is_training=False,
        interpolation=input_config.interpolation,
        crop_pct=input_config.crop_pct,
        **_common(args, input_config, device),
    )
