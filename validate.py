#!/usr/bin/env python3
"""Validates a timm model, a published student or a training checkpoint. ``validate.py --help`` lists the arguments."""
import json
import logging
import os
import sys

from timm import create_model
from timm.data import resolve_data_config
from timm.models import load_checkpoint
from timm.utils import setup_default_logging

from timm_gpd.command_line import run_program
from timm_gpd.errors import UsageError, usage_errors
from timm_gpd.training.args import parse_validate_args
from timm_gpd.training.data import create_eval_loader, prepare_dataset
from timm_gpd.training.loop import create_compute, validate

_logger = logging.getLogger('validate')


def main() -> None:
    args = parse_validate_args()
    compute = create_compute(args)
    if args.checkpoint and not os.path.isfile(args.checkpoint):
        raise UsageError(f'checkpoint {args.checkpoint} does not exist: check --checkpoint')
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else None)
    with usage_errors('check --model, --model-kwargs and --checkpoint', RuntimeError, ValueError, TypeError, OSError,
                      AssertionError, KeyError):
        model = create_model(
            args.model, pretrained=args.pretrained, num_classes=args.num_classes, in_chans=in_chans,
            global_pool=args.gp, **args.model_kwargs)
        if args.checkpoint:
            load_checkpoint(model, args.checkpoint, use_ema=args.use_ema)
    args.num_classes = model.num_classes
    data_config = resolve_data_config(vars(args), model=model)
    prepare_dataset(args)
    loader = create_eval_loader(args, data_config, compute.device)
    model.to(compute.device, memory_format=compute.memory_format)
    metrics = validate({'': model}, loader, compute, args.log_interval)
    results = dict(
        model=args.model, checkpoint=args.checkpoint, **metrics,
        param_count=sum(p.numel() for p in model.parameters()), img_size=data_config['input_size'][-1])
    if args.results_file:
        with open(args.results_file, 'w') as file:
            json.dump(results, file, indent=4)
    print(f'--result\n{json.dumps(results, indent=4)}')


if __name__ == '__main__':
    setup_default_logging()
    sys.exit(run_program('validate.py', main))
