#!/usr/bin/env python3
"""Measures one training step of Gap Preserving Distillation against its floor, and writes docs/cost.md.

The floor is what cannot be avoided: one step of the plain wide model, one of the plain student and, with a static
teacher, one of its forward passes. All are timed in one process, in turns; peak memory is measured in a process each.
Devices and precisions that this run does not measure keep what an earlier run wrote, or say "not measured".

    python benchmarks/step_cost.py              all of the CPU part, and CUDA's where there is one
    python benchmarks/step_cost.py --models resnet18 --modes fp32 --profile
"""

import argparse
import copy
import ctypes
import gc
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

sys.path.insert(0, ROOT)

from timm_gpd import DynamicTeacher, GapPreservingTask, expand
from timm_gpd.training.cpu import tune_process_for


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
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)

        def step() -> None:
            with self._autocast():
                value = loss()
            value.backward()
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

        def step() -> None:
            for part in steps:
                part()
            if self.static is not None:
                with torch.no_grad(), self._autocast():
                    self.static(self.x)

        return step

    def gpd(self, branches: int) -> Callable[[], None]:
        """One training step of student and dynamic teacher."""
        return self.step_of(
            GapPreservingTask(
                self.student, self.static, ratio=self.ratio, num_branches=branches, device=self.device, verbose=False
            )
        )

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


def peak_memory(bench: Bench, subject: str, steps: int = 3) -> int:
    """Bytes at the peak of a few steps: tensors that are held between steps, and what a step adds (Linux, or CUDA)."""
    step = bench.subject(subject)
    step()  # compiles, which is not part of a step
    if bench.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    else:
        gc.collect()
        held = _held_bytes()
        ctypes.CDLL(None).malloc_trim(0)
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')  # starts the peak again
        others = _resident('VmRSS') - held
    for _ in range(steps):
        step()
    return torch.cuda.max_memory_allocated() if bench.device.type == 'cuda' else _resident('VmHWM') - others


def _held_bytes() -> int:
    """Bytes of all tensors that have values, views counted once."""
    tensors = (item for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter))
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.device.type == 'cpu'
    }
    return sum(storages.values())


def _resident(field: str) -> int:
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure_memory_apart(arguments: Dict[str, Any], subject: str) -> int:
    """:func:`peak_memory` in a new process."""
    command = [sys.executable, os.path.abspath(__file__), '--memory-of', subject, '--cell', json.dumps(arguments)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def measure_gpu_memory(arguments: Dict[str, Any], subject: str) -> int:
    """:func:`peak_memory` here: a GPU's allocator counts exactly, what others hold is taken away."""
    gc.collect()
    others = torch.cuda.memory_allocated()
    return peak_memory(Bench(**arguments), subject) - others


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


def print_profile(arguments: Dict[str, Any], subjects: List[str]) -> None:
    """Where the time of a step goes, by operator."""
    bench = Bench(**arguments)
    for subject in subjects:
        step = bench.subject(subject)
        step()
        with torch.profiler.profile() as profile:
            step()
            bench._wait()
        sort = 'self_cuda_time_total' if arguments['device'] == 'cuda' else 'self_cpu_time_total'
        print(f'{arguments["name"]}, {subject}:')
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
    parser.add_argument('--static', metavar='MODEL', help='adds a static teacher, printed only')
    parser.add_argument('--no-memory', action='store_true', help='times only')
    parser.add_argument('--profile', action='store_true', help='print a profile instead')
    parser.add_argument('--output', default=os.path.join(ROOT, 'docs'), metavar='FOLDER')
    parser.add_argument('--memory-of', help=argparse.SUPPRESS)
    parser.add_argument('--cell', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(peak_memory(Bench(**args.cell), args.memory_of))
        return

    results = load_results(args.output)
    for device in args.devices:
        for batch, size in SETTINGS[device]:
            for name in args.models:
                for mode in args.modes:
                    arguments = dict(name=name, device=device, mode=mode, batch=batch, size=size, static=args.static)
                    if args.profile:
                        print_profile(arguments, ['floor', *map(str, args.branches)])
                        continue
                    cell = measure_cell(arguments, args.branches, args.repeats, not args.no_memory)
                    print(
                        f'{device} {name} {mode} {batch} at {size} px: floor {cell["seconds"]["floor"]:.3f} s, time '
                        + ', '.join(f'M={count}: {ratio:.3f}' for count, ratio in cell['ratio'].items())
                        + '; memory '
                        + ', '.join(f'M={count}: {ratio:.3f}' for count, ratio in cell.get('memory_ratio', {}).items()),
                        flush=True,
                    )
                    if args.static is None:
                        results['cells'][f'{device}/{name}/{mode}/{batch}/{size}'] = cell
                        write_report(results, args.output)
    if args.profile or args.static is not None:
        return
    for name in (*args.models, 'resnet50') if 'cpu' in args.devices else ():
        results['rest'][name] = measure_rest(name, 224, [1, 6], 3)
    write_report(results, args.output)
    print(f'wrote {os.path.join(args.output, "cost.md")}')


if __name__ == '__main__':
    main()
