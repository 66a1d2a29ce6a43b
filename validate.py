#!/usr/bin/env python3
"""Validates a timm model, a published student or a training checkpoint. ``validate.py --help`` lists the arguments."""

import argparse
import json
import logging
import os
import sys

import torch.nn as nn
from timm import create_model
from timm.models import load_checkpoint
from timm.utils import setup_default_logging

from timm_gpd.command_line import run_program
from timm_gpd.errors import UsageError, usage_errors
from timm_gpd.training.args import parse_validate_args
from timm_gpd.training.compute import Compute, create_compute
from timm_gpd.training.cpu import tune_process_for
from timm_gpd.training.data import create_eval_loader
from timm_gpd.training.datasets import resolve_data
from timm_gpd.training.evaluation import validate
from timm_gpd.training.student import count_classes, resolve_input

_logger = logging.getLogger('validate')


def main() -> None:
    args = parse_validate_args()
    compute = create_compute(args.device, args.amp, args.amp_dtype, args.channels_last, args.model_dtype)
    undo = tune_process_for(compute.device)
    try:
        run_validation(args, compute)
    finally:
        undo()


def run_validation(args: argparse.Namespace, compute: Compute) -> None:
    model = load_model(args)
    input_config = resolve_input(args, model)
    loader = create_eval_loader(args, resolve_data(args), input_config, count_classes(model), compute.device)
    compute.place(model)
    metrics = validate({'': model}, loader, compute, args.log_interval)
    results = dict(
        model=args.model,
        checkpoint=args.checkpoint,
        **metrics,
        param_count=sum(p.numel() for p in model.parameters()),
        img_size=input_config.input_size[-1],
    )
    if args.results_file:
        with open(args.results_file, 'w') as file:
            json.dump(results, file, indent=4)
    print(f'--result\n{json.dumps(results, indent=4)}')


def load_model(args: argparse.Namespace) -> nn.Module:
    """The model that ``--model`` and ``--checkpoint`` name."""
    if args.checkpoint and not os.path.isfile(args.checkpoint):
        raise UsageError(f'checkpoint {args.checkpoint} does not exist: check --checkpoint')
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else None)
    with usage_errors(
        'check --model, --model-kwargs and --checkpoint',
        RuntimeError,
        ValueError,
        TypeError,
        OSError,
        AssertionError,
        KeyError,
    ):
        model = create_model(
            args.model,
            pretrained=args.pretrained,
            num_classes=args.num_classes,
            in_chans=in_chans,
            global_pool=args.gp,
            **args.model_kwargs,
        )
        if args.checkpoint:
            load_checkpoint(model, args.checkpoint, use_ema=args.use_ema)
    return model


if __name__ == '__main__':
    setup_default_logging()
    sys.exit(run_program('validate.py', main))
