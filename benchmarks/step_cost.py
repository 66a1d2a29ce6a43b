#!/usr/bin/env python3
"""Measures one training step of Gap Preserving Distillation against its floor, and writes docs/cost.md.

The floor is what cannot be avoided: one step of the plain wide model, one of the plain student and, with a static
teacher, one of its forward passes. All are timed in one process, in turns; peak memory is measured in a process each.
Devices and precisions that this run does not measure keep what an earlier run wrote, or say "not measured".

    python benchmarks/step_cost.py              all of the CPU part, and CUDA's where there is one
    python benchmarks/step_cost.py --models resnet18 --modes fp32 --profile
    OMP_NUM_THREADS=1 python benchmarks/step_cost.py --static --modes fp32    the rows with a static teacher alone
"""

import argparse
import copy
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, Optional

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from cost_report import DEVICES, MODELS, MODES, ROOT, SETTINGS, load_results, write_report
from machine import device_name
from peak_memory import peak_memory

sys.path.insert(0, ROOT)

from timm_gpd import DynamicTeacher, GapPreservingTask, expand
from timm_gpd.training.cpu import tune_process_for

# Students, and the static teachers of their rows; losses of logits, and of features.
STATIC = {'resnet18': 'resnet34', 'vit_tiny_patch16_224': 'vit_small_patch16_224'}
LOSSES = ('dkd', 'reviewkd', 'nd')


def create_student(name: str, size: int) -> nn.Module:
    sized = {'img_size': size} if 'vit' in name else {}
    return timm.create_model(name, num_classes=1000, **sized)


class Bench:
    """Steps of one model on one batch, in one mode.

    Args:
        name: timm model name.
        device: 'cpu' or 'cuda'.
        mode: one of ``MODES``.
        batch: images a batch.
        size: pixels of a side.
        static: timm name of a static teacher, of random weights, or None.
        ratio: expansion ratio.
    """

    def __init__(
        self,
        name: str,
        device: str,
        mode: str,
        batch: int,
        size: int,
        static: Optional[str] = None,
        ratio: int = 2,
    ) -> None:
        self.device, self.mode, self.ratio = torch.device(device), mode, ratio
        tune_process_for(self.device)  # as train.py does, to the end of the process
        torch.manual_seed(0)
        self.student = self._to_device(create_student(name, size))
        self.static = None if static is None else self._to_device(create_student(static, size)).eval()
        self.x = torch.randn(batch, 3, size, size, device=self.device)
        if mode == 'channels_last':
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.target = torch.randint(1000, (batch,), device=self.device)

    def _to_device(self, model: nn.Module) -> nn.Module:
        memory_format = torch.channels_last if self.mode == 'channels_last' else torch.preserve_format
        return model.to(self.device, memory_format=memory_format)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mode == 'amp')

    def _stepper(self, module: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        parameters = list(module.parameters())
        settings = dict(lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
        optimizer = torch.optim.SGD(parameters, **settings) if parameters else None

        def step() -> None:
            with self._autocast():
                value = loss()
            value.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step

    def plain(self, model: nn.Module) -> Callable[[], None]:
        """One training step of a model on its own."""
        model.train()
        run = torch.compile(model) if self.mode == 'compile' else model
        return self._stepper(model, lambda: F.cross_entropy(run(self.x), self.target))

    def floor(self) -> Callable[[], None]:
        wide = expand(self.student, self.ratio, scale='teacher').wide
        steps = [self.plain(self._to_device(wide)), self.plain(copy.deepcopy(self.student))]
        static = torch.compile(self.static) if self.static is not None and self.mode == 'compile' else self.static

        def step() -> None:
            for part in steps:
                part()
            if static is not None:
                with torch.no_grad(), self._autocast():
                    static(self.x)

        return step

    def task(self, **arguments: Any) -> GapPreservingTask:
        return GapPreservingTask(
            self.student, **{'ratio': self.ratio, 'device': self.device, 'verbose': False, **arguments}
        )

    def gpd(self, branches: int) -> Callable[[], None]:
        """One training step of student and dynamic teacher."""
        return self.step_of(self.task(num_branches=branches))

    def step_of(self, task: GapPreservingTask) -> Callable[[], None]:
        """One training step of a task."""
        task.trainable_module = module = self._to_device(task.trainable_module)
        task.train()
        if self.mode == 'compile':
            task.compile()
        return self._stepper(module, lambda: task(self.x, self.target)['loss'])

    def subject(self, name: str) -> Callable[[], None]:
        """A step by its name: 'floor', 'student', or a number of branches."""
        if name == 'student':
            return self.plain(copy.deepcopy(self.student))
        return self.floor() if name == 'floor' else self.gpd(int(name))

    def seconds(self, step: Callable[[], None]) -> float:
        self._wait()
        start = time.perf_counter()
        step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()


class ProcessorBench(Bench):
    """The same, in processor time on a CPU, which other programs disturb less."""

    def seconds(self, step: Callable[[], None]) -> float:
        if self.device.type != 'cpu':
            return super().seconds(step)
        start = time.process_time()
        step()
        return time.process_time() - start

    def distilling(self, losses: str) -> Callable[[], None]:
        """One training step of student and dynamic teacher, which learn from the static teacher."""
        return self.step_of(self.task(static_teacher=self.static, distill_type=losses))

    def losses_alone(self, losses: str) -> Callable[[], None]:
        """What both learners' losses from the static teacher cost by themselves, uncompiled: forward and backward pass
        from outputs that are there, and the step of the modules that they train."""
        task = self.task(static_teacher=self.static, distill_type=losses)
        learners = task.get_learners()
        with torch.no_grad(), self._autocast():
            outputs, static_output = learners.run(self.x), task.static_teacher(self.x)
        received = [
            tensor.requires_grad_()
            for output in outputs.values()
            for tensor in (output.logits, *output.stages, output.embedding)
            if tensor is not None
        ]
        distillers = learners.step_loss.distillers.train()

        def loss() -> torch.Tensor:
            for tensor in received:
                tensor.grad = None
            return sum(
                sum(distillers[name](output, static_output, self.target).values()) for name, output in outputs.items()
            )

        return self._stepper(distillers, loss)


def time_in_turns(
    bench: Bench,
    steps: Dict[str, Callable[[], None]],
    repeats: int,
    warmup: int = 5,
) -> Dict[str, List[float]]:
    """Seconds of every step, by name; a turn of each, ``repeats`` times, once the process has the memory it needs."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    times: Dict[str, List[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(bench.seconds(step))
    return times


def median_ratio(times: List[float], reference: List[float]) -> float:
    """Median over turns of a step's time over the reference's in the same turn."""
    return statistics.median(a / b for a, b in zip(times, reference))


# -- memory, in a process of its own -----------------------------------------------------------------------------------


def memory_of(bench: Bench, subject: str) -> int:
    return peak_memory(bench.subject(subject), bench.device)


def measure_memory_apart(arguments: Dict[str, Any], subject: str) -> int:
    """:func:`memory_of` in a new process."""
    command = [sys.executable, os.path.abspath(__file__), '--memory-of', subject, '--cell', json.dumps(arguments)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def measure_gpu_memory(arguments: Dict[str, Any], subject: str) -> int:
    """:func:`memory_of` here: a GPU's allocator counts exactly, what others hold is taken away."""
    gc.collect()
    others = torch.cuda.memory_allocated()
    return memory_of(Bench(**arguments), subject) - others


# -- the cells of the table --------------------------------------------------------------------------------------------


def has_branches(name: str, size: int) -> bool:
    from timm_gpd.teacher.branches import is_branchable

    return any(is_branchable(module) for module in create_student(name, size).modules())


def measure_cell(arguments: Dict[str, Any], branches: List[int], repeats: int, memory: bool) -> Dict[str, Any]:
    """Times of floor and GPD steps, their ratios, and peak memory, for one model, device, mode and batch."""
    if not has_branches(arguments['name'], arguments['size']):
        branches = [1]
    subjects = ['floor', *map(str, branches)]
    bench = Bench(**arguments)
    steps = {name: bench.subject(name) for name in subjects}
    if bench.mode == 'compile':
        eager = Bench(**{**arguments, 'mode': 'fp32'})
        steps.update({f'eager {count}': eager.subject(str(count)) for count in branches})
    times = time_in_turns(bench, steps, repeats)
    cell = {
        **arguments,
        'processor': device_name(arguments['device']),
        'torch': torch.__version__,
        'seconds': {name: statistics.median(values) for name, values in times.items()},
        'ratio': {name: median_ratio(times[name], times['floor']) for name in subjects[1:]},
    }
    if bench.mode == 'compile':
        cell['over_eager'] = {
            str(count): median_ratio(times[str(count)], times[f'eager {count}']) for count in branches
        }
    if memory:
        # Peaks differ from process to process: by a few per cent, or by 15 where compiled. What was compiled above is
        # compiled from a cache.
        processes = 7 if bench.mode == 'compile' else 3
        peak = {
            name: measure_gpu_memory(arguments, name)
            if arguments['device'] == 'cuda'
            else statistics.median(measure_memory_apart(arguments, name) for _ in range(processes))
            for name in subjects
        }
        cell['bytes'] = peak
        cell['memory_ratio'] = {name: peak[name] / peak['floor'] for name in subjects[1:]}
    return cell


def static_steps(bench: ProcessorBench, losses: str) -> Dict[str, Callable[[], None]]:
    return {'floor': bench.floor(), 'losses': bench.losses_alone(losses), 'step': bench.distilling(losses)}


def measure_static(arguments: Dict[str, Any], losses: str, repeats: int) -> Dict[str, Any]:
    """A step with a static teacher, over its floor, and over the floor with the losses' own cost in it."""
    bench = ProcessorBench(**arguments)
    steps = static_steps(bench, losses)
    times = time_in_turns(bench, steps, repeats, warmup=2)
    with_losses = [sum(pair) for pair in zip(times['floor'], times['losses'])]
    return {
        **arguments,
        'losses': losses,
        'processor': device_name(arguments['device']),
        'torch': torch.__version__,
        'seconds': {name: statistics.median(values) for name, values in times.items()},
        'ratio': median_ratio(times['step'], times['floor']),
        'ratio_with_losses': median_ratio(times['step'], with_losses),
    }


def measure_rest(name: str, size: int, branches: List[int], repeats: int) -> Dict[str, Any]:
    """Seconds of what is done now and then: expanding, extracting, and reading both models' parameters in a step."""
    student = create_student(name, size)

    def median(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    rest: Dict[str, Any] = {'processor': device_name('cpu'), 'expand': median(lambda: expand(student))}
    for count in branches:
        teacher = expand(student, num_branches=count)
        rest[f'extract_student, M = {count}'] = median(teacher.extract_student)

        def read_and_back(teacher: DynamicTeacher = teacher) -> None:
            wide, narrow = teacher.parameters_of_both()
            outputs = [tensor for tensor in (*wide.values(), *narrow.values()) if tensor.grad_fn is not None]
            torch.autograd.backward(outputs, [torch.ones_like(tensor) for tensor in outputs])
            teacher.zero_grad()

        rest[f'sharing in a step, M = {count}'] = median(read_and_back)
    return rest


# -- profile -----------------------------------------------------------------------------------------------------------


def print_profile(bench: Bench, steps: Dict[str, Callable[[], None]]) -> None:
    """Where the time of some steps goes, by operator."""
    for name, step in steps.items():
        step()
        with torch.profiler.profile() as profile:
            step()
            bench._wait()
        sort = 'self_cuda_time_total' if bench.device.type == 'cuda' else 'self_cpu_time_total'
        print(f'{name}:')
        print(profile.key_averages().table(sort_by=sort, row_limit=15, max_name_column_width=50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=list(MODELS), choices=MODELS)
    parser.add_argument('--modes', nargs='+', default=list(MODES), choices=MODES)
    parser.add_argument(
        '--devices', nargs='+', choices=DEVICES, default=[d for d in DEVICES if d == 'cpu' or torch.cuda.is_available()]
    )
    parser.add_argument('--branches', nargs='+', type=int, default=[1, 6], metavar='M')
    parser.add_argument('--repeats', type=int, default=7, help='turns; the median is reported')
    parser.add_argument('--static', action='store_true', help='nothing but the rows with a static teacher')
    parser.add_argument('--losses', nargs='+', default=list(LOSSES), help='of the rows with a static teacher')
    parser.add_argument('--no-memory', action='store_true', help='times only')
    parser.add_argument('--profile', action='store_true', help='print a profile instead')
    parser.add_argument('--output', default=os.path.join(ROOT, 'docs'), metavar='FOLDER')
    parser.add_argument('--memory-of', help=argparse.SUPPRESS)
    parser.add_argument('--cell', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(memory_of(Bench(**args.cell), args.memory_of))
        return

    results = load_results(args.output)
    cells = [
        dict(name=name, device=device, mode=mode, batch=batch, size=size)
        for device in args.devices
        for batch, size in SETTINGS[device]
        for name in args.models
        for mode in args.modes
    ]
    for arguments in () if args.static else cells:
        where = '{device} {name} {mode} {batch} at {size} px'.format_map(arguments)
        if args.profile:
            bench = Bench(**arguments)
            print_profile(
                bench, {f'{where}, {name}': bench.subject(name) for name in ('floor', *map(str, args.branches))}
            )
            continue
        cell = measure_cell(arguments, args.branches, args.repeats, not args.no_memory)
        print(
            f'{where}: floor {cell["seconds"]["floor"]:.3f} s, time '
            + ', '.join(f'M={count}: {ratio:.3f}' for count, ratio in cell['ratio'].items())
            + '; memory '
            + ', '.join(f'M={count}: {ratio:.3f}' for count, ratio in cell.get('memory_ratio', {}).items()),
            flush=True,
        )
        results['cells']['{device}/{name}/{mode}/{batch}/{size}'.format_map(arguments)] = cell
        write_report(results, args.output)
    for arguments, losses in itertools.product(cells, args.losses):
        if arguments['name'] not in STATIC:
            continue
        arguments = {**arguments, 'static': STATIC[arguments['name']]}
        where = '{device} {name} from {static} {mode} {batch} at {size} px, '.format_map(arguments) + losses
        if args.profile:
            bench = ProcessorBench(**arguments)
            print_profile(bench, {f'{where}, {name}': step for name, step in static_steps(bench, losses).items()})
            continue
        cell = measure_static(arguments, losses, args.repeats)
        print(
            f'{where}: floor {cell["seconds"]["floor"]:.3f} s, losses {cell["seconds"]["losses"]:.3f} s, time '
            f'{cell["ratio"]:.3f}, with losses in the floor {cell["ratio_with_losses"]:.3f}',
            flush=True,
        )
        results.setdefault('static', {})[where] = cell
        write_report(results, args.output)
    if args.profile or args.static:
        return
    for name in (*args.models, 'resnet50') if 'cpu' in args.devices else ():
        results['rest'][name] = measure_rest(name, 224, [1, 6], 3)
    write_report(results, args.output)
    print(f'wrote {os.path.join(args.output, "cost.md")}')


if __name__ == '__main__':
    main()
