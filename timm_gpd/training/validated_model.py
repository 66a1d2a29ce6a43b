"""The model that ``validate.py`` is about: a plain one, a published student, or one of those in a checkpoint."""

import argparse
import logging
import os
from typing import Any, Dict

import torch.nn as nn
from timm import create_model
from timm.models import load_checkpoint

from ..command_line import flag_of
from ..errors import LIBRARY_ERRORS, UsageError, one_line, usage_errors
from ..teacher import expand
from .checkpoints import read_checkpoint
from .student import recorded_classes

__all__ = ['load_validated_model']

_logger = logging.getLogger('validate')

_NOT_TORCH = ('.safetensors', '.npz', '.npy')
_ADVICE = 'check --model, --model-kwargs, --num-classes and --checkpoint'


def load_validated_model(args: argparse.Namespace) -> nn.Module:
    """The model that ``--model``, ``--checkpoint``, ``--use-ema`` and ``--use-teacher`` name.

    Args:
        args: arguments of ``validate.py``. Without ``checkpoint`` the model gets its pretrained weights, as in timm.

    Returns:
        The model, on the CPU.

    Raises:
        UsageError: if it cannot be created, has no weights or no classifier, or the checkpoint does not fit it.
    """
    if args.checkpoint and not os.path.isfile(args.checkpoint):
        raise UsageError(f'checkpoint {args.checkpoint} does not exist: check --checkpoint')
    if not args.checkpoint and not args.pretrained:
        _logger.info(f'No --checkpoint: these are the pretrained weights of {args.model}')
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else None)
    options = dict(num_classes=args.num_classes, in_chans=in_chans, global_pool=args.gp)
    with usage_errors(_ADVICE, *LIBRARY_ERRORS):
        model = create_model(
            args.model, pretrained=args.pretrained or not args.checkpoint, **{**options, **args.model_kwargs}
        )
    if not recorded_classes(model):
        raise UsageError(f'{args.model} has no classifier: set --num-classes')
    return _load(model, args) if args.checkpoint else model


def _load(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    path = args.checkpoint
    checkpoint = {} if path.endswith(_NOT_TORCH) else read_checkpoint(path)
    averaged = next((key for key in ('state_dict_ema', 'model_ema') if checkpoint.get(key) is not None), None)
    if args.use_ema and averaged is None:
        raise UsageError(f'{path} holds no averaged weights: leave out --use-ema')
    task_state = checkpoint.get('task_state_ema' if args.use_ema else 'task_state') or {}
    if args.use_teacher and 'dynamic_teacher' not in task_state:
        raise UsageError(
            f'{path} holds no dynamic teacher, which is of a run with --gpd, in the epochs that have one: '
            'leave out --use-teacher'
        )
    try:
        if args.use_teacher:
            settings = task_state['settings']
            teacher = expand(model, settings['ratio'], branches=settings['branches'], scale=settings['scale'])
            teacher.load_state_dict(task_state['dynamic_teacher'])
            model = teacher.extract_teacher()
        else:
            load_checkpoint(model, path, use_ema=args.use_ema)
    except LIBRARY_ERRORS as error:
        origin = _describe_origin(checkpoint)
        raise UsageError(f'{path}{origin} does not fit --model {args.model}: {one_line(error)} ({_ADVICE})') from error
    which = ('averaged ' if args.use_ema else '') + ('dynamic teacher' if args.use_teacher else 'model')
    _logger.info(f'Loaded the {which} of {path}')
    return model


def _describe_origin(checkpoint: Dict[str, Any]) -> str:
    """What a training checkpoint is of, for errors."""
    known = vars(checkpoint['args']) if isinstance(checkpoint.get('args'), argparse.Namespace) else {}
    flags = [
        f'{flag_of(name)} {known[name]}'
        for name in ('model', 'num_classes', 'in_chans', 'img_size')
        if known.get(name) is not None
    ]
    return f', which is of {" ".join(flags)},' if flags else ''
