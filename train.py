#!/usr/bin/env python3
"""Trains a timm model; with ``--gpd`` by Gap Preserving Distillation. ``train.py --help`` lists the arguments."""
import json
import logging
import sys

from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import load_task_ema_checkpoint
from timm.utils import CheckpointSaver, random_seed, setup_default_logging

from timm_gpd.command_line import run_program
from timm_gpd.errors import usage_errors
from timm_gpd.training.args import parse_train_args
from timm_gpd.training.build import create_student, create_task, resolve_input, resolve_lr
from timm_gpd.training.data import create_eval_loader, create_train_loader, prepare_dataset
from timm_gpd.training.evaluation import Evaluation
from timm_gpd.training.loop import create_compute, mean_lr, train_one_epoch
from timm_gpd.training.resume import resume_run
from timm_gpd.training.run_folder import RunFolder

_logger = logging.getLogger('train')


def main() -> None:
    args = parse_train_args()
    compute = create_compute(args)
    random_seed(args.seed)

    student = create_student(args)
    data_config = resolve_input(args, student)
    run = RunFolder(args, data_config)
    prepare_dataset(args)
    loader_train, mixup_fn = create_train_loader(args, data_config, compute.device)
    loader_eval = create_eval_loader(args, data_config, compute.device)
    student.to(compute.device, memory_format=compute.memory_format)
    task = create_task(args, student, compute.device)

    resolve_lr(args)
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    start_epoch = resume_run(args, task, optimizer, compute.loss_scaler) if args.resume else args.start_epoch or 0
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    lower_is_better = args.eval_metric.endswith('loss')
    updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args, decreasing_metric=lower_is_better), updates_per_epoch=updates_per_epoch)
    if start_epoch > 0:
        (lr_scheduler.step_update(start_epoch * updates_per_epoch) if args.sched_on_updates
         else lr_scheduler.step(start_epoch))

    if args.torchcompile:
        with usage_errors('check --torchcompile and --torchcompile-mode', RuntimeError):
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    run.open()
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, args=args, amp_scaler=compute.loss_scaler, task=task,
        checkpoint_dir=run.path, recovery_dir=run.path, decreasing=lower_is_better, max_history=args.checkpoint_hist)
    evaluate = Evaluation(task, loader_eval, compute, args.log_interval)
    best_metric = best_epoch = None
    for epoch in range(start_epoch, num_epochs):
        train_metrics = train_one_epoch(
            epoch, task, loader_train, optimizer, compute, args, lr_scheduler, saver, mixup_fn)
        metric = None
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == num_epochs:
            eval_metrics = evaluate()
            run.write_epoch(epoch, train_metrics, eval_metrics, lr=mean_lr(optimizer))
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
