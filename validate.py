#!/usr/bin/env python3
"""Validates a timm model, a published student or a training checkpoint. ``validate.py --help`` lists the arguments."""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections import OrderedDict
from functools import partial
from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn
from timm.layers import apply_test_time_pool
from timm.models import is_model, list_models, reparameterize_model
from timm.utils import decay_batch_step, natural_key, random_seed, setup_default_logging

from timm_gpd.command_line import run_program
from timm_gpd.errors import UsageError, one_line, usage_errors
from timm_gpd.training.args import Arguments, parse_validate_args
from timm_gpd.training.args.checks import check_model_name
from timm_gpd.training.attackers import create_attacker
from timm_gpd.training.compute import Compute, create_compute, fast_norm
from timm_gpd.training.cpu import tune_process_for
from timm_gpd.training.data.datasets import resolve_data
from timm_gpd.training.data.images import report_bad_images
from timm_gpd.training.data.loaders import create_eval_loader
from timm_gpd.training.evaluation import evaluator_of, validate
from timm_gpd.training.memory import is_out_of_memory, memory_errors
from timm_gpd.training.processes import Processes, start_processes
from timm_gpd.training.report.files import find_files, replaced_file, write_csv
from timm_gpd.training.student import recorded_classes, resolve_input
from timm_gpd.training.validated_model import load_validated_model
from timm_gpd.training.validation_metrics import ExtendedEvaluator, read_real_labels, read_valid_labels

_logger = logging.getLogger('validate')

# What "all" leaves out: pretrained weights that are not for ImageNet-1k, and other names of the same models.
NOT_IMAGENET = ('*_in21k', '*_in22k', '*in12k', '*_dino', '*fcmae', '*seer', '*_gpd', '*_gpd.*')


def main() -> None:
    args = parse_validate_args()
    models = find_models(args)
    with start_processes(args.device) as processes:
        if processes.is_distributed and (args.retry or args.num_gpu > 1):
            raise UsageError('--retry and --num-gpu are for one process: leave them out, or torchrun')
        compute = create_compute(str(processes.device), args.amp, args.amp_dtype, args.channels_last, args.model_dtype)
        undo = tune_process_for(compute.device)
        try:
            with fast_norm(args.fast_norm):
                results = validate_all(args, models, compute, processes)
        finally:
            undo()
        if processes.is_primary:
            found = results if models else results[0]
            if args.results_file:
                write_results(args.results_file, found, args.results_format)
            print(f'--result\n{json.dumps(found, indent=4)}')


def find_models(args: argparse.Namespace) -> List[Tuple[str, str]]:
    """Names of models and checkpoints, where ``--model`` or ``--checkpoint`` stands for several; else none.

    As in timm these are a folder of checkpoints, ``all``, a pattern such as ``resnet*``, and a text file of names.
    """
    if os.path.isdir(args.checkpoint):
        paths = [path for kind in ('*.pth.tar', '*.pth') for path in find_files(args.checkpoint, kind)]
        if not paths:
            raise UsageError(f'{args.checkpoint} holds no checkpoints, which are called *.pth.tar or *.pth')
        return [(args.model, path) for path in sorted(paths, key=natural_key)]
    if args.model == 'all':
        return [(name, '') for name in list_models(pretrained=True, exclude_filters=NOT_IMAGENET)]
    if is_model(args.model) or ':' in args.model:
        return []
    names = list_models(args.model, pretrained=True)
    if not names and os.path.isfile(args.model):
        with open(args.model) as file, usage_errors('check --model', UnicodeDecodeError):
            names = [line.strip() for line in file if line.strip()]
    if not names:
        check_model_name(args.model)
    return [(name, '') for name in names]


def validate_all(
    args: argparse.Namespace, models: List[Tuple[str, str]], compute: Compute, processes: Processes
) -> List[Dict[str, Any]]:
    """Validates one model, or several, the best first; of several those that cannot be are left out."""
    if not models:
        return [validate_with_retry(args, compute, processes)]
    _logger.info(f'Validating {len(models)} models: {", ".join(checkpoint or name for name, checkpoint in models)}')
    results = []
    for name, checkpoint in models:
        one = Arguments(
            **{**vars(args), 'model': name, 'checkpoint': checkpoint, 'retry': not processes.is_distributed}
        )
        try:
            results.append(validate_with_retry(one, compute, processes))
        except UsageError as error:
            if processes.is_distributed:
                raise  # the other processes wait for this one
            _logger.error(f'{checkpoint or name} is left out: {one_line(error)}')
    if not results:
        raise UsageError('none of the models could be validated: the reasons are above')
    metric = 'map' if args.task == 'multilabel' else 'top1'
    return sorted(results, key=lambda result: result[metric], reverse=True)


def validate_with_retry(args: argparse.Namespace, compute: Compute, processes: Processes) -> Dict[str, Any]:
    """Validates a model; with ``--retry`` in smaller and smaller batches until they fit into memory."""
    batch_size = args.batch_size
    while True:
        one = Arguments(**{**vars(args), 'batch_size': batch_size})
        try:
            with memory_errors(one, batch_size):
                return validate_model(one, compute, processes)
        except UsageError as error:
            smaller = decay_batch_step(batch_size)
            if not (args.retry and error.__cause__ is not None and is_out_of_memory(error.__cause__) and smaller):
                raise
            _logger.warning(f'Out of memory with batches of {batch_size}: retrying with {smaller}')
            batch_size = smaller
        if compute.device.type == 'cuda':
            torch.cuda.empty_cache()


def validate_model(args: argparse.Namespace, compute: Compute, processes: Processes) -> Dict[str, Any]:
    """Validates one model.

    Returns:
        Its metrics, with timm's names, in percent; parameters in millions; and the images that it was given.
    """
    random_seed(args.seed, processes.rank)
    with processes.primary_first():
        source = resolve_data(args)
        model = load_validated_model(args)
    if args.reparam:
        model = reparameterize_model(model)
    param_count = sum(parameter.numel() for parameter in model.parameters())
    _logger.info(f'Model {args.model} created, param count: {param_count}')
    input_config, num_classes = resolve_input(args, model), recorded_classes(model)
    if args.test_pool:
        model, is_pooled = apply_test_time_pool(model, dataclasses.asdict(input_config))
        if is_pooled:
            input_config = dataclasses.replace(input_config, crop_pct=1.0)
            with usage_errors('the size that it pools over does not fit: leave out --test-pool', RuntimeError):
                model.eval()(torch.zeros(1, *input_config.input_size))
    attacker = create_attacker(args, model, input_config)
    valid_labels = read_valid_labels(args.valid_labels, num_classes)
    loader = create_eval_loader(
        args, source, input_config, len(valid_labels) if valid_labels else num_classes, compute.device
    )
    create_evaluator = evaluator_of(args, compute.device)
    if args.task != 'multilabel':
        create_evaluator = partial(
            ExtendedEvaluator,
            compute.device,
            processes,
            valid_labels=valid_labels,
            real_labels=read_real_labels(args, loader.dataset, processes),
            average=args.metrics_avg,
        )
    compute.place(model)
    metrics = validate({'': _prepare(model, args)}, loader, compute, args.log_interval, create_evaluator, attacker)
    report_bad_images(processes, None, loader)
    results: Dict[str, Any] = OrderedDict(model=args.model)
    if args.checkpoint:
        results['checkpoint'] = args.checkpoint
    for name, value in metrics.items():
        results[name] = round(value, 4)
        if name in ('top1', 'top5'):
            results[f'{name}_err'] = round(100 - value, 4)
    results.update(
        param_count=round(param_count / 1e6, 2),
        img_size=input_config.input_size[-1],
        crop_pct=input_config.crop_pct,
        interpolation=input_config.interpolation,
    )
    _logger.info(' * ' + '  '.join(f'{name}: {results[name]:.3f}' for name in metrics))
    return results


def _prepare(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Compiles a model, or gives each GPU its share of every batch, if that was asked for."""
    if args.torchcompile:
        with usage_errors('check --torchcompile and --torchcompile-mode', RuntimeError):
            return torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.num_gpu > 1:
        if torch.cuda.device_count() < args.num_gpu:
            raise UsageError(f'--num-gpu {args.num_gpu} is more than there are, which is {torch.cuda.device_count()}')
        return nn.DataParallel(model, device_ids=list(range(args.num_gpu)))
    return model


def write_results(path: str, results: Any, kind: str) -> None:
    """Writes a result, or a list of them, as JSON or as a table."""
    try:
        with replaced_file(path) as partial_path, open(partial_path, 'w', newline='') as file:
            if kind == 'json':
                json.dump(results, file, indent=4)
            else:
                rows = results if isinstance(results, list) else [results]
                write_csv(file, rows, list(rows[0]))
    except OSError as error:
        raise UsageError(f'{path} cannot be written: {error.strerror}; check --results-file')


if __name__ == '__main__':
    setup_default_logging()
    sys.exit(run_program('validate.py', main))
