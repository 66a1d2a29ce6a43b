#!/usr/bin/env python3
"""What --kd-cache saves: processor time of a training step with a static teacher that computes, stores, or is read.

    python benchmarks/stored_outputs.py

The three take turns, on the same batches, and the median over turns counts. Models have random
weights, images are random. Prints a row of docs/distillation.md for each pair of models.
"""

import statistics
import tempfile
import time
from typing import Any, Dict, List

import timm
import torch

from machine import device_name
from timm_gpd import DistillationTask, StaticTeacherConfig

SMALL = dict(in_chans=1, num_classes=107)
PAIRS: Dict[str, Dict[str, Any]] = {
    'glyphs, batches of 128 at 28 px': dict(
        student=('test_resnet', dict(channels=(8, 16, 32, 64), stem_width=4, **SMALL)),
        teacher=('test_resnet', dict(channels=(16, 32, 64, 128), layers=(2, 2, 2, 2), stem_width=8, **SMALL)),
        shape=(128, 1, 28, 28),
        turns=15,
    ),
    'ResNet-34 to ResNet-18, batches of 16 at 128 px': dict(
        student=('resnet18', {}), teacher=('resnet34', {}), shape=(16, 3, 128, 128), turns=5
    ),
}


def measure(pair: Dict[str, Any], folder: str) -> Dict[str, float]:
    """Median milliseconds of processor time of a step, by what the teacher does."""
    student, teacher = (timm.create_model(name, **kwargs) for name, kwargs in (pair['student'], pair['teacher']))
    for model in (student, teacher):
        model.pretrained_cfg.update(input_size=pair['shape'][1:])
    tasks = {
        'computes': DistillationTask(student, teacher, verbose=False).train(),
        'stores': DistillationTask(student, StaticTeacherConfig(teacher, cache=folder), verbose=False).train(),
    }
    times: Dict[str, List[float]] = {'computes': [], 'stores': [], 'is read': []}
    for turn in range(pair['turns'] + 1):
        images, target = torch.randn(pair['shape']), torch.randint(100, pair['shape'][:1])
        for how in times:
            task = tasks['computes' if how == 'computes' else 'stores']
            start = time.process_time()
            task(images, target)['loss'].backward()
            if turn:  # the first warms up
                times[how].append(1000 * (time.process_time() - start))
    return {how: statistics.median(values) for how, values in times.items()}


def main() -> None:
    print(f'On {device_name("cpu")}, ms of processor time of a step:\n')
    print('| | teacher computes | computes and stores | is read |\n|---|---|---|---|')
    for name, pair in PAIRS.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measure(pair, folder)
        print(f'| {name} | ' + ' | '.join(f'{value:.0f}' for value in found.values()) + ' |', flush=True)


if __name__ == '__main__':
    main()
