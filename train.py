#!/usr/bin/env python3
"""Trains a timm model; with ``--gpd`` by Gap Preserving Distillation. ``train.py --help`` lists the arguments."""

import argparse
import json
import logging
import sys

from timm.task import load_task_ema_checkpoint
from timm.utils import CheckpointSaver, random_seed, setup_default_logging

from timm_gpd.command_line import run_program
from timm_gpd.errors import usage_errors
from timm_gpd.training.args import parse_train_args
from timm_gpd.training.compute import Compute, create_compute
from timm_gpd.training.cpu import tune_process_for
from timm_gpd.training.data import create_eval_loader, create_train_loader
from timm_gpd.training.datasets import resolve_data
from timm_gpd.training.evaluation import Evaluation
from timm_gpd.training.log_file import LogFile
from timm_gpd.training.loop import LoopSettings, train_one_epoch
from timm_gpd.training.optimizer import create_optimizer
from timm_gpd.training.overview import describe
from timm_gpd.training.progress import Progress
from timm_gpd.training.resume import resume_run
from timm_gpd.training.run_folder import RunFolder
from timm_gpd.training.schedule import create_schedule, mean_lr
from timm_gpd.training.student import count_classes, create_student, resolve_input, set_input
from timm_gpd.training.task import create_task
from timm_gpd.training.tracking import Tracker, check_tracking

_logger = logging.getLogger('train')


def main() -> None:
    args = parse_train_args()
    check_tracking(args)
    compute = create_compute(args.device, args.amp, args.amp_dtype, args.channels_last)
    undo = tune_process_for(compute.device)
    try:
        with LogFile() as log:
            train(args, compute, log)
    finally:
        undo()


def train(args: argparse.Namespace, compute: Compute, log: LogFile) -> None:
    random_seed(args.seed)
    student = create_student(args)
    input_config = resolve_input(args, student)
    set_input(student, input_config)
    run = RunFolder(args, input_config)
    source, num_classes = resolve_data(args), count_classes(student)
    loader_train, mixup_fn = create_train_loader(args, source, input_config, num_classes, compute.device)
    loader_eval = create_eval_loader(args, source, input_config, num_classes, compute.device)
    compute.place(student)
    task = create_task(args, student, compute.device)

    optimizer = create_optimizer(args, task)
    start_epoch = resume_run(args, task, optimizer, compute.loss_scaler) if args.resume else args.start_epoch or 0
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    lower_is_better = args.eval_metric.endswith('loss')
    updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
    lr_scheduler, num_epochs = create_schedule(args, optimizer, updates_per_epoch, start_epoch, lower_is_better)

    overview = describe(task, input_config)
    if args.torchcompile:
        with usage_errors('check --torchcompile and --torchcompile-mode', RuntimeError):
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    tracker = Tracker(args, run.path, start_epoch)
    run.open()
    log.open(run.file('train.log'))
    for line in overview:
        _logger.info(line)
    saver = CheckpointSaver(
        task.get_trainable_module(),
        optimizer,
        args=argparse.Namespace(**vars(args)),  # the class that timm allows in a checkpoint
        amp_scaler=compute.loss_scaler,
        task=task,
        checkpoint_dir=run.path,
        recovery_dir=run.path,
        decreasing=lower_is_better,
        max_history=args.checkpoint_hist,
    )
    settings = LoopSettings.from_args(args)
    evaluate = Evaluation(task, loader_eval, compute, args.log_interval)
    best_metric = best_epoch = None
    run.truncate(start_epoch)
    progress = Progress(num_epochs, updates_per_epoch, args.log_interval, start_epoch * updates_per_epoch)
    with tracker, progress:
        for epoch in range(start_epoch, num_epochs):
            train_metrics = train_one_epoch(
                epoch, task, loader_train, optimizer, compute, settings, lr_scheduler, saver, mixup_fn, progress
            )
            metric = None
            if (epoch + 1) % args.val_interval == 0 or epoch + 1 == num_epochs:
                eval_metrics = evaluate()
                progress.validated(eval_metrics)
                tracker.log(run.write_epoch(epoch, train_metrics, eval_metrics, lr=mean_lr(optimizer)))
                metric = eval_metrics[args.eval_metric]
                best_metric, best_epoch = saver.save_checkpoint(epoch, metric=metric)
            lr_scheduler.step(epoch + 1, metric)
    if best_metric is not None:
        _logger.info(f'*** Best metric: {best_metric} (epoch {best_epoch})')
    run.finish(task)
    print(f'--result\n{json.dumps(run.best_results(args.eval_metric, lower_is_better), indent=4)}')


if __name__ == '__main__':
    setup_default_logging()
    sys.exit(run_program('train.py', main))
