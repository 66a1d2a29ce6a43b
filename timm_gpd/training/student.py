"""The student that a command names, and the images that it takes."""

import argparse
import dataclasses
import logging
from typing import Any, Callable, Dict, Tuple, cast

import torch.nn as nn
from timm import create_model
from timm.data import resolve_data_config

from ..errors import UsageError, usage_errors

__all__ = ['InputConfig', 'count_classes', 'create_student', 'resolve_input', 'set_input']

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
    """

    input_size: Tuple[int, int, int]
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    interpolation: str
    crop_pct: float


def count_classes(model: nn.Module) -> int:
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
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else 3)
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else None
    with usage_errors(
        'check --model, --model-kwargs, --pretrained and the checkpoint options',
        RuntimeError,
        ValueError,
        TypeError,
        OSError,
        AssertionError,
        KeyError,
    ):
        student = create_model(
            args.model,
            pretrained=args.pretrained or bool(args.pretrained_path),
            pretrained_cfg_overlay=overlay,
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
    if not count_classes(student):
        raise UsageError(f'{args.model} has no classifier: set --num-classes')
    if args.grad_checkpointing:
        cast(Callable[..., None], student.set_grad_checkpointing)(enable=True)
    _logger.info(f'Model {args.model} created, param count:{sum(p.numel() for p in student.parameters())}')
    return student


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
        config = resolve_data_config(vars(args), model=model)
    for key in ('mean', 'std'):  # as timm's loader does where the config is of other channels than the model
        if len(config[key]) != config['input_size'][0]:
            config[key] = (sum(config[key]) / len(config[key]),) * config['input_size'][0]
    return InputConfig(**{field.name: config[field.name] for field in dataclasses.fields(InputConfig)})


def set_input(student: nn.Module, config: InputConfig) -> None:
    """Writes into a student's ``pretrained_cfg`` what it is trained on, so that whoever loads it feeds it alike.

    Args:
        student: timm model; its ``pretrained_cfg`` is changed in place.
        config: its input.
    """
    cast(Dict[str, Any], student.pretrained_cfg).update(dataclasses.asdict(config), num_classes=count_classes(student))
