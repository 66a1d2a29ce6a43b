"""Loaders of a run, through timm's factories."""

import argparse
from typing import Any, Dict, Optional, Tuple

import torch
import torch.distributed as dist
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_loader

from ...command_line import flag_of
from ...errors import UsageError, usage_errors
from ..student import InputConfig
from .datasets import DataSource, create_split
from .posterize import posterize_to_black

__all__ = ['check_loaders', 'create_eval_loader', 'create_train_loader', 'mean_batch_size', 'uses_mixup']


def check_loaders(args: argparse.Namespace, world_size: int = 1) -> None:
    """Checks what the arguments say of batches, before anything is created.

    Args:
        args: arguments of ``train.py``.
        world_size: processes that train together.

    Raises:
        UsageError: if two arguments do not go together.
    """
    splits, sizes = args.aug_splits, args.train_img_sizes
    if splits == 1 or splits < 0:
        raise UsageError(f'--aug-splits must be 0 or at least 2, but is {splits}')
    for refused, reason in (
        (splits and args.no_prefetcher, '--aug-splits needs the prefetcher, which puts the views into one batch'),
        (splits and uses_mixup(args), '--aug-splits compares views of an image: leave out --mixup and --cutmix'),
        (splits and args.no_aug, '--aug-splits augments all views but the first: leave out --no-aug'),
        (splits and sizes, '--aug-splits and --train-img-sizes do not go together'),
        (args.mixup_mode == 'half' and args.no_prefetcher, '--mixup-mode half needs the prefetcher: choose another'),
        (args.split_bn and not (splits or args.resplit), '--split-bn needs --aug-splits or --resplit'),
        (args.split_bn and args.sync_bn, '--split-bn and --sync-bn do not go together: choose one'),
        (args.aug_repeats and world_size == 1, '--aug-repeats needs several processes, among which it deals the views'),
    ):
        if refused:
            raise UsageError(reason)
    for name in ('train_batch_sizes', 'train_size_probs'):
        values = getattr(args, name)
        if values is not None and len(values) != len(sizes or []):
            raise UsageError(f'{flag_of(name)} has {len(values)} values and --train-img-sizes {len(sizes or [])}')
    if args.train_batches_per_epoch is not None and not sizes:
        raise UsageError('--train-batches-per-epoch needs --train-img-sizes')


def mean_batch_size(args: argparse.Namespace, loader: Any) -> float:
    """Mean number of images of a batch, which differs from ``--batch-size`` where image sizes change.

    Args:
        args: arguments of ``train.py``.
        loader: from :func:`create_train_loader`.
    """
    return getattr(loader.batch_sampler, 'average_batch_size', float(args.batch_size))


def _common(args: argparse.Namespace, input_config: InputConfig, device: torch.device) -> Dict[str, Any]:
    return dict(
        input_size=input_config.input_size,
        mean=input_config.mean,
        std=input_config.std,
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=device,
        img_dtype=getattr(torch, args.model_dtype or 'float32'),
        use_prefetcher=not args.no_prefetcher,
        distributed=dist.is_initialized(),
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
        A loader of images (B, in_chans, H, W), normalised, and of class indices (B,), or a number per class
        (B, num_classes) where labels are several or mixed; and what mixes its batches: None where the loader does it,
        or nobody. With ``--aug-splits`` a batch is all images, then all images again in another view, and so on.

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
            multi_label=args.task == 'multilabel',
        )
        mixup_fn, collate_fn = (mixup, None) if args.no_prefetcher else (None, mixup)
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = input_config.interpolation
    dataset = create_split(args, source, input_config, num_classes, args.train_split, is_training=True)
    if args.aug_splits:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
    errors = (ValueError, TypeError, AssertionError, KeyError)
    with usage_errors('check the arguments of augmentation and image sizes', *errors), posterize_to_black():
        loader = create_loader(
            dataset,
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            re_split=args.resplit,
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
            num_aug_repeats=args.aug_repeats,
            num_aug_splits=args.aug_splits,
            interpolation=interpolation,
            collate_fn=collate_fn,
            worker_seeding=args.worker_seeding,
            input_size_choices=args.train_img_sizes,
            batch_size_choices=args.train_batch_sizes,
            batch_choice_weights=args.train_size_probs,
            batch_choice_seed=args.seed,
            batch_choice_schedule=args.train_size_schedule,
            batch_schedule_epochs=args.epochs if args.train_size_schedule == 'progressive' else None,
            batch_schedule_spread=args.train_size_schedule_spread,
            batch_schedule_random_mix=args.train_size_random_mix,
            num_batches=args.train_batches_per_epoch,
            **_common(args, input_config, device),
        )
    if len(loader) == 0:
        raise UsageError(f'{len(dataset)} training images do not fill a batch of {args.batch_size}: lower --batch-size')
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
        A loader of images (B, in_chans, H, W), normalised, and targets, unmixed; None where the split has no name.

    Raises:
        UsageError: if the dataset cannot be read or has other classes than the model.
    """
    if not args.val_split:
        return None
    return create_loader(
        create_split(args, source, input_config, num_classes, args.val_split, is_training=False),
        batch_size=getattr(args, 'validation_batch_size', None) or args.batch_size,
        is_training=False,
        interpolation=input_config.interpolation,
        crop_pct=input_config.crop_pct,
        crop_mode=input_config.crop_mode,
        crop_border_pixels=getattr(args, 'crop_border_pixels', None),
        **_common(args, input_config, device),
    )
