#!/usr/bin/env python3
"""Does the ranking of untrained students tell how well they are distilled? Trains students of many shapes on digits.

    python benchmarks/rank.py

For every seed, which chooses the 300 training images, the teacher is trained; then every student, by ``kd`` from the
teacher and alone, all by one recipe, and validated on the other 1,497. Then all are scored by
``timm_gpd.rank_students`` on a batch of the training images. Prints both in a table, and the rank correlation of top-1
with the score, its two parts, and size. Images are tensors in memory and models small: minutes of one core.

Every run is one line of JSON in ``--results``, as is every score. Lines that are there are not measured again, so an
interrupted benchmark goes on where it stopped. Exit codes: 0 done, 1 anything else.
"""

import argparse
import dataclasses
import json
import math
import platform
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import kendalltau, spearmanr
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from machine import processor_name
from timm_gpd import DistillationTask, rank_students

ROOT = Path(__file__).resolve().parents[1]
TEACHER = 'teacher'
# Architecture and arguments: of the teacher of configs/digits_teacher.yaml, and of students.
SHAPES: Dict[str, Tuple[str, Dict[str, Any]]] = {
    TEACHER: ('test_resnet', dict(channels=(16, 32, 64, 128), stem_width=8, layers=(2, 2, 2, 2))),
    'resnet': ('test_resnet', dict(channels=(8, 16, 32, 64), stem_width=4)),
    'resnet, half as wide': ('test_resnet', dict(channels=(4, 8, 16, 32), stem_width=4)),
    'resnet, twice as wide': ('test_resnet', dict(channels=(16, 32, 64, 128), stem_width=8)),
    'resnet, twice as deep': ('test_resnet', dict(channels=(8, 16, 32, 64), stem_width=4, layers=(2, 2, 2, 2))),
    'vit': ('test_vit', dict(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2)),
    'convnext': ('test_convnext', dict(dims=(8, 16, 32, 64))),
    'efficientnet': ('test_efficientnet', {}),
    'mobilenetv3': ('mobilenetv3_small_050', {}),
    'byobnet': ('test_byobnet', {}),
    'nfnet': ('test_nfnet', {}),
    'mambaout': ('test_mambaout', {}),
}
STUDENTS = [name for name in SHAPES if name != TEACHER]
WAYS = ('kd', 'plain')
TRAIN_SIZE, BATCH_SIZE, PIXELS = 300, 50, 32
LEARNING_RATE, WEIGHT_DECAY = 0.003, 0.05  # of AdamW: no architecture but the ResNets is at home with SGD


class Digits(NamedTuple):
    """Images, shape (N, 1, H, W), and classes, shape (N,), of both splits."""

    train: Tuple[torch.Tensor, torch.Tensor]
    validation: Tuple[torch.Tensor, torch.Tensor]


def read_digits(seed: int) -> Digits:
    """scikit-learn's digits, 300 of them to train on, normalised to mean and deviation 0.5."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images = (F.interpolate(images, (PIXELS, PIXELS), mode='bilinear', antialias=True) - 0.5) / 0.5
    target = torch.from_numpy(digits.target)
    indices = np.arange(len(target))
    split = train_test_split(indices, train_size=TRAIN_SIZE, stratify=digits.target, random_state=seed)
    return Digits(*((images[part], target[part]) for part in split))


class Lines:
    """Results as lines of JSON, each under what it is of.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
        self.records: Dict[Tuple[Any, ...], Dict[str, Any]] = {tuple(line['of']): line for line in lines}

    def __contains__(self, of: Tuple[Any, ...]) -> bool:
        return of in self.records

    def add(self, of: Tuple[Any, ...], **values: Any) -> None:
        versions = {'torch': torch.__version__, 'timm': timm.__version__, 'python': platform.python_version()}
        record = {'of': list(of), **values, 'processor': processor_name(), 'versions': versions}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, 'a') as file:
            file.write(json.dumps(record) + '\n')
        self.records[of] = record


def create(name: str) -> nn.Module:
    architecture, options = SHAPES[name]
    model = timm.create_model(architecture, num_classes=10, in_chans=1, **options)
    # or the teacher would see a student's images by what timm's own weights were trained on
    model.pretrained_cfg.update(input_size=(1, PIXELS, PIXELS), mean=(0.5,), std=(0.5,))
    return model


def fit(model: nn.Module, loss_of: Callable[..., torch.Tensor], digits: Digits, epochs: int) -> float:
    """Trains a model in place, cosine schedule after one epoch of warm-up. Returns its top-1 in percent."""
    images, target = digits.train
    steps = epochs * (len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    warmup = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            loss = loss_of(_augment(images[batch]), target[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        parts = zip(*(tensor.split(500) for tensor in digits.validation))
        right = sum((model(x).argmax(-1) == y).sum().item() for x, y in parts)
    return 100 * right / len(digits.validation[1])


def _augment(images: torch.Tensor) -> torch.Tensor:
    """Random crops of 70 to 100 percent of the area, stretched, one for each image."""
    count = len(images)
    area, stretch = torch.empty(count).uniform_(0.7, 1), torch.empty(count).uniform_(-0.2, 0.2).exp()
    height, width = (area * stretch).sqrt().clamp(max=1), (area / stretch).sqrt().clamp(max=1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = ((1 - side) * torch.empty(count).uniform_(-1, 1) for side in (width, height))
    return F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), align_corners=False)


def train(lines: Lines, seeds: Sequence[int], epochs: int) -> None:
    """Trains what has no line yet; a teacher again for every call."""
    for way in WAYS:
        for seed in seeds:
            missing = [name for name in STUDENTS if (name, way, seed) not in lines]
            digits, teacher = read_digits(seed), None
            if missing and way == 'kd':
                teacher = _train_one(lines, (TEACHER, 'plain', seed), digits, epochs)
            for name in tqdm(missing, unit='student', desc=f'{way}, seed {seed}', disable=None):
                _train_one(lines, (name, way, seed), digits, epochs, teacher)


def _train_one(
    lines: Lines, of: Tuple[str, str, int], digits: Digits, epochs: int, teacher: Optional[nn.Module] = None
) -> nn.Module:
    torch.manual_seed(of[2])
    model = create(of[0])
    if teacher is None:
        top1 = fit(model, lambda x, y: F.cross_entropy(model(x), y), digits, epochs)
    else:
        task = DistillationTask(model, teacher, distill_type='kd', verbose=False)
        top1 = fit(model, lambda x, y: task(x, y)['loss'], digits, epochs)
    if of not in lines:
        lines.add(of, top1=top1, epochs=epochs)
    return model


def score(lines: Lines, initializations: int) -> None:
    """Scores what has no line yet, on a batch of the training images of seed 0."""
    missing = {name: create(name) for name in STUDENTS if (name, 'score') not in lines}
    if not missing:
        return
    images, target = read_digits(0).train
    batch = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:64]
    ranked = rank_students(create(TEACHER), missing, [(images[batch], target[batch])], initializations=initializations)
    for student in ranked:
        values = {**dataclasses.asdict(student), 'initializations': initializations}
        lines.add((values.pop('name'), 'score'), **values)


def report(lines: Lines) -> str:
    """A table, the best first, and how well each measure tells the order of top-1."""
    ways = [way for way in WAYS if any(of[1:2] == (way,) for of in lines.records)]
    top1 = {way: {name: _mean_top1(lines, name, way) for name in STUDENTS} for way in ways}
    scores = {name: lines.records[name, 'score'] for name in STUDENTS}
    table = [f'| student | score | ± | relation | semantic | M parameters | {" | ".join(ways)} |']
    table += ['|---' * (6 + len(ways)) + '|']
    for name in sorted(STUDENTS, key=lambda name: -scores[name]['score']):
        one = scores[name]
        numbers = [f'{one[key]:.4f}' for key in ('score', 'deviation', 'relation', 'semantic')]
        cells = [name, *numbers, f'{one["cost"]["parameters"] / 1e6:.2f}', *(f'{top1[way][name]:.2f}' for way in ways)]
        table.append(f'| {" | ".join(cells)} |')
    measures = {
        'score': lambda one: one['score'],
        'relation': lambda one: -one['relation'],
        'semantic': lambda one: -one['semantic'],
        'parameters': lambda one: one['cost']['parameters'],
        'multiply-accumulates': lambda one: one['cost']['macs'],
    }
    table += ['', f'| measure | {" | ".join(f"{way}, Spearman | {way}, Kendall" for way in ways)} |']
    table += ['|---' * (1 + 2 * len(ways)) + '|']
    for label, measure_of in measures.items():
        values = [measure_of(scores[name]) for name in STUDENTS]
        cells = [
            f'{correlation(values, [top1[way][name] for name in STUDENTS]).statistic:.2f}'
            for way in ways
            for correlation in (spearmanr, kendalltau)
        ]
        table.append(f'| {label} | {" | ".join(cells)} |')
    return '\n'.join(table)


def _mean_top1(lines: Lines, name: str, way: str) -> float:
    return statistics.fmean(line['top1'] for of, line in lines.records.items() if of[:2] == (name, way))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=2, metavar='N', help='seeds 0 to N-1 of training')
    parser.add_argument('--initializations', type=int, default=10, metavar='N', help='of every network that is scored')
    parser.add_argument('--epochs', type=int, default=20, metavar='N', help='of every training')
    parser.add_argument('--results', type=Path, default=ROOT / 'docs' / 'results' / 'rank.jsonl', metavar='FILE')
    args = parser.parse_args()
    lines = Lines(args.results)
    train(lines, range(args.seeds), args.epochs)
    score(lines, args.initializations)
    print(report(lines))


if __name__ == '__main__':
    main()
