#!/usr/bin/env python3
"""Trains a timm model; with ``--gpd`` by Gap Preserving Distillation. ``train.py --help`` lists the arguments."""

import json
import logging
import sys

from timm.utils import random_seed, setup_default_logging

from timm_gpd.command_line import run_program
from timm_gpd.training.args import parse_train_args
from timm_gpd.training.args.arguments import Arguments
from timm_gpd.training.args.combinations import check_batch_norm
from timm_gpd.training.checkpoints import Checkpoints, Position
from timm_gpd.training.compute import Compute, create_compute, fast_norm, import_device_modules
from timm_gpd.training.cpu import tune_process_for
from timm_gpd.training.data.datasets import resolve_data, with_defaults
from timm_gpd.training.data.loaders import check_loaders, create_eval_loader, create_train_loader, mean_batch_size
from timm_gpd.training.data.replay import ReplayedLoader
from timm_gpd.training.evaluation import Evaluation, evaluator_of
from timm_gpd.training.interruption import end_at_once, keep_workers, listen
from timm_gpd.training.loop import LoopSettings, TrainingLoop
from timm_gpd.training.memory import memory_errors
from timm_gpd.training.optimizer import check_optimizer
from timm_gpd.training.phases import Phases
from timm_gpd.training.processes import Processes, start_processes
from timm_gpd.training.report.image_log import ImageLog
from timm_gpd.training.report.log_file import LogFile
from timm_gpd.training.report.overview import describe
from timm_gpd.training.report.progress import Progress
from timm_gpd.training.report.run_folder import RunFolder
from timm_gpd.training.report.tracking import Tracker, check_tracking
from timm_gpd.training.resume import find_checkpoint, resume_run
from timm_gpd.training.run import Run
from timm_gpd.training.student import check_image_sizes, create_student, recorded_classes, resolve_input, set_input
from timm_gpd.training.task import check_task, create_task
from timm_gpd.training.teacher_stores import describe_stores, describe_use

_logger = logging.getLogger('train')


def main() -> None:
    with end_at_once('train.py'):
        start()


def start() -> None:
    args = parse_train_args()
    check_tracking(args)
    check_task(args)
    check_optimizer(args)
    import_device_modules(args.device_modules)
    with start_processes(args.device) as processes, LogFile(processes.is_primary) as log:
        check_loaders(args, processes.world_size)
        compute = create_compute(str(processes.device), args.amp, args.amp_dtype, args.channels_last, args.model_dtype)
        undo = tune_process_for(compute.device)
        try:
            with fast_norm(args.fast_norm), memory_errors(args, args.batch_size):
                train(args, compute, processes, log)
        finally:
            undo()


def train(args: Arguments, compute: Compute, processes: Processes, log: LogFile) -> None:
    random_seed(args.seed, processes.rank)
    with processes.primary_first():
        source = resolve_data(args)
        args = with_defaults(args, source)
        student = create_student(args)
        check_batch_norm(args.batch_size * (processes.world_size if args.sync_bn else 1), student)
        input_config, num_classes = resolve_input(args, student), recorded_classes(student)
        check_image_sizes(args, student, input_config.input_size[0])
        set_input(student, input_config)
    folder = RunFolder(args, input_config, processes)
    with processes.primary_first():
        loader_train, mixup_fn = create_train_loader(args, source, input_config, num_classes, compute.device)
        loader_eval = create_eval_loader(args, source, input_config, num_classes, compute.device)
        keep_workers(loader_train), keep_workers(loader_eval)
        compute.place(student)
        task = create_task(args, student, compute.device)

    batch_size = mean_batch_size(args, loader_train)
    updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
    phases = Phases(
        args, compute, processes, updates_per_epoch, batch_size * processes.world_size * args.grad_accum_steps
    )
    last_epoch = args.stop_epoch or phases.num_epochs
    overview = describe(task, input_config, phases.joint_epochs, last_epoch) if processes.is_primary else []
    static_teacher = getattr(task, 'static_teacher', None)  # of this package's tasks
    overview += describe_stores(args, static_teacher, loader_train, loader_eval, processes.world_size, last_epoch)
    checkpoint = processes.share(find_checkpoint(args, folder.path))
    trained = phases.begin(task, student, checkpoint)
    del task  # another phase frees what it held
    lower_is_better = args.eval_metric.endswith('loss')
    checkpoints = Checkpoints(
        folder.path,
        trained.task,
        trained.optimizer,
        args,
        processes,
        compute.loss_scaler,
        lower_is_better,
        args.checkpoint_hist,
    )
    position = resume_run(args, checkpoint, trained.task, checkpoints) if checkpoint else Position()
    if args.start_epoch is not None:
        position = Position(args.start_epoch, rewinds=position.rewinds)
    phases.check(trained, position)
    phases.schedule(trained, position)
    progress = Progress(
        last_epoch,
        updates_per_epoch,
        args.log_interval,
        position.epoch * updates_per_epoch + position.batch // args.grad_accum_steps,
        processes.is_primary,
    )
    phases.prepare(trained)

    tracker = Tracker(args, folder.path, position.epoch, processes.is_primary)
    folder.open()
    log.open(folder.file('train.log'))
    for line in overview:
        _logger.info(line)
    evaluate = Evaluation(
        trained.task,
        loader_eval,
        compute,
        args.log_interval,
        ema=not args.model_ema_force_cpu,
        create_evaluator=evaluator_of(args, compute.device),
    )
    folder.truncate(position.epoch)
    with listen(processes) as interruption, tracker, progress:
        loop = TrainingLoop(
            trained.task,
            ReplayedLoader(loader_train, args.seed, processes),
            trained.optimizer,
            compute,
            processes,
            LoopSettings.from_args(args),
            trained.lr_scheduler,
            checkpoints,
            interruption,
            mixup_fn,
            progress,
            batch_size,
            ImageLog(folder.path, args.log_interval) if args.save_images and processes.is_primary else None,
            phases.num_epochs,
        )
        run = Run(
            args,
            trained,
            phases,
            loop,
            evaluate,
            checkpoints,
            folder,
            tracker,
            progress,
            processes,
            interruption,
            (loader_train, loader_eval),
            last_epoch,
        )
        run.train(position)
    run.finish()
    for line in describe_use(static_teacher, processes):
        _logger.info(line)
    if processes.is_primary:
        print(f'--result\n{json.dumps(folder.best_results(args.eval_metric, lower_is_better), indent=4)}')


if __name__ == '__main__':
    setup_default_logging()
    sys.exit(run_program('train.py', main))
