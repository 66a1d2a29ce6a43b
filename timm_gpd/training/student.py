"""The student that a command names, and the images that it takes."""

import argparse
import dataclasses
import logging
from typing import Any, Callable, Dict, Tuple, cast

import torch
import torch.nn as nn
from timm import create_model
from timm.data import resolve_data_config
from timm.layers import convert_splitbn_model

from ..errors import LIBRARY_ERRORS, UsageError, usage_errors

__all__ = ['InputConfig', 'check_image_sizes', 'recorded_classes', 'create_student', 'resolve_input', 'set_input']

_logger = logging.getLogger('train')


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """What images a model takes.

    Attributes:
        input_size: channels, height and width in pixels.
        mean: mean of the pixel values of every channel, of 0 to 1.
        std: their standard deviation.
        interpolation: how images are resized.
        crop_pct: share of an image's side that validation keeps.
        crop_mode: how validation brings images into shape: ``'center'``, ``'squash'`` or ``'border'``.
    """

    input_size: Tuple[int, int, int]
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = 'center'


def recorded_classes(model: nn.Module) -> int:
    """Number of classes of a timm model, 0 where it has no classifier."""
    return getattr(model, 'num_classes', 0)


def create_student(args: argparse.Namespace) -> nn.Module:
    """The model that ``--model`` and its options name.

    Args:
        args: arguments of ``train.py``.

    Returns:
        A timm model with a classifier, on the CPU.

    Raises:
        UsageError: if timm cannot create it, or it has no classifier.
    """
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else None)  # None: the model's
    overlay = dict(args.pretrained_cfg_overlay)
    if args.pretrained_path:
        overlay.update(file=args.pretrained_path, num_classes=-1)  # -1: adapt the classifier, whatever its classes
    files = [path for path in (args.pretrained_path, args.initial_checkpoint) if path]
    what = ' and '.join(files) or '--pretrained'
    with usage_errors(f'check --model, --model-kwargs and {what}', *LIBRARY_ERRORS):
        student = create_model(
            args.model,
            pretrained=args.pretrained or bool(args.pretrained_path),
            pretrained_cfg_overlay=overlay or None,
            in_chans=in_chans,
            num_classes=args.num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            drop_block_rate=args.drop_block,
            global_pool=args.gp,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
            checkpoint_path=args.initial_checkpoint,
            **args.model_kwargs,
        )
    if not recorded_classes(student):
        raise UsageError(f'{args.model} has no classifier: set --num-classes')
    _start_head(args, student)
    if args.grad_checkpointing:
        cast(Callable[..., None], student.set_grad_checkpointing)(enable=True)
    if args.split_bn:
        student = convert_splitbn_model(student, max(args.aug_splits, 2))
    _logger.info(f'Model {args.model} created, param count:{sum(p.numel() for p in student.parameters())}')
    return student


def _start_head(args: argparse.Namespace, student: nn.Module) -> None:
    """Applies ``--head-init-scale`` and ``--head-init-bias`` to the classifier, or to each of several."""
    if args.head_init_scale is None and args.head_init_bias is None:
        return
    found = cast(Callable[[], Any], student.get_classifier)()
    heads = found if isinstance(found, (tuple, list)) else (found,)
    with torch.no_grad():
        for head in heads:
            if getattr(head, 'bias', None) is None:
                raise UsageError(f'--head-init-scale and --head-init-bias: the classifier of {args.model} has no bias')
            if args.head_init_scale is not None:
                head.weight.mul_(args.head_init_scale)
                head.bias.mul_(args.head_init_scale)
            if args.head_init_bias is not None:
                head.bias.fill_(args.head_init_bias)


def check_image_sizes(args: argparse.Namespace, student: nn.Module, in_chans: int) -> None:
    """Shows the student an image of every size of ``--train-img-sizes``.

    Args:
        args: arguments of ``train.py``.
        student: timm model, on the CPU.
        in_chans: its channels.

    Raises:
        UsageError: if it does not take one.
    """
    mode = student.training
    student.eval()
    for size in args.train_img_sizes or ():
        with usage_errors(
            f'{args.model} takes no images of {size} pixels: check --train-img-sizes, or see --model-kwargs',
            RuntimeError,
            AssertionError,
            ValueError,
        ):
            with torch.no_grad():
                student(torch.zeros(1, in_chans, size, size))
    student.train(mode)


def resolve_input(args: argparse.Namespace, model: nn.Module) -> InputConfig:
    """Input size, normalisation and resizing: from the arguments, and where they leave it open from the model.

    Args:
        args: arguments of ``train.py`` or ``validate.py``.
        model: timm model.

    Returns:
        The input that the run uses.

    Raises:
        UsageError: if a value does not fit the number of channels.
    """
    with usage_errors('check --input-size, --mean and --std', AssertionError):
        validates = hasattr(args, 'use_train_size')
        values = dict(vars(args))
        if not args.in_chans and not args.input_size:  # for --img-size, timm's are else 3
            values['in_chans'] = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size', (3,))[0]
        channels = args.input_size[0] if args.input_size else values['in_chans'] or 3
        for flag in ('mean', 'std'):
            if len(values[flag] or ()) not in (0, 1, channels):
                raise UsageError(f'--{flag} has {len(values[flag])} values, and images have {channels} channels')
        config = resolve_data_config(values, model=model, use_test_size=validates and not args.use_train_size)
    for key in ('mean', 'std'):  # as timm's loader does where the config is of other channels than the model
        if len(config[key]) != config['input_size'][0]:
            config[key] = (sum(config[key]) / len(config[key]),) * config['input_size'][0]
    if not validates:
        config['crop_mode'] = 'center'  # timm's training script validates so, whatever the model's is
    return InputConfig(**{field.name: config[field.name] for field in dataclasses.fields(InputConfig)})


def set_input(student: nn.Module, config: InputConfig) -> None:
    """Writes into a student's ``pretrained_cfg`` what it is trained on, so that whoever loads it feeds it alike.

    Args:
        student: timm model; its ``pretrained_cfg`` is changed in place.
        config: its input.
    """
    cast(Dict[str, Any], student.pretrained_cfg).update(
        dataclasses.asdict(config), num_classes=recorded_classes(student)
    )
