"""A student as a folder that timm alone loads, and that is published as it is: weights, config, model card, plot."""

import copy
import csv
import os
import shutil
import tempfile
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, cast

import torch
import torch.nn as nn
from timm.models import save_for_hf

from .card import CARD, model_card

__all__ = ['CONFIG', 'PLOT', 'STUDENT_FILES', 'WEIGHTS', 'new_folder', 'read_metrics', 'save_student']

WEIGHTS, CONFIG, PLOT = 'model.safetensors', 'config.json', 'gap.png'
STUDENT_FILES = (WEIGHTS, CONFIG, CARD, PLOT)

_OF_OTHER_WEIGHTS = ('tag', 'license', 'origin_url', 'paper_name', 'paper_ids', 'notes')


@contextmanager
def new_folder(folder: str) -> Iterator[str]:
    """Gives a hidden folder beside ``folder`` to fill, which takes its place if nothing was raised.

    So whoever looks sees the old folder or the whole new one.

    Args:
        folder: what is written or replaced.

    Yields:
        Path of the folder to fill.
    """
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    partial = tempfile.mkdtemp(prefix='.student-', dir=parent)
    try:
        os.chmod(partial, 0o755)
        yield partial
        if os.path.isdir(folder):
            shutil.rmtree(folder)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_student(
    student: nn.Module,
    folder: str,
    recipe: Dict[str, Any],
    metrics: Optional[Dict[str, float]] = None,
    plot: Optional[str] = None,
) -> None:
    """Writes ``model.safetensors``, ``config.json``, ``README.md`` and, where there is one, ``gap.png``.

    ``timm.create_model('local-dir:<folder>', pretrained=True)`` gives the student back. A folder that is already there
    is replaced once the new one is complete.

    Args:
        student: plain timm model; ``pretrained_cfg`` tells its architecture and input. It is not changed.
        folder: where to write.
        recipe: arguments of the run, for the card and for ``model_args``; or ``converted_from``, a file's name.
        metrics: what :func:`read_metrics` gives; top-1 and top-5 in percent.
        plot: PNG file of the accuracies over epochs; skipped if there is no such file.
    """
    # These weights are new: what the config says of the ones that it came with is no longer true.
    config = {
        key: value
        for key, value in cast(Dict[str, Any], student.pretrained_cfg).items()
        if key not in _OF_OTHER_WEIGHTS
    }
    published = copy.deepcopy(student).to(memory_format=torch.contiguous_format)  # safetensors takes no other
    published.__dict__['pretrained_cfg'] = config
    if plot is not None and not os.path.isfile(plot):
        plot = None
    with new_folder(folder) as partial:
        save_for_hf(published, partial, model_args=dict(recipe.get('model_kwargs') or {}), safe_serialization=True)
        card = model_card(published, recipe, metrics or {}, PLOT if plot else None)
        card.save(os.path.join(partial, CARD))
        if plot:
            shutil.copyfile(plot, os.path.join(partial, PLOT))


def read_metrics(path: str, epoch: Optional[int] = None) -> Dict[str, float]:
    """The ``eval_*`` values of one epoch, without that prefix, as ``summary.csv`` holds them.

    Args:
        path: ``summary.csv`` of a run; a file that is not there holds no values.
        epoch: which epoch, from 0; default the last.

    Returns:
        Values by name: ``top1`` is the student's, ``teacher_top1`` the dynamic teacher's, in percent.
    """
    if not os.path.isfile(path):
        return {}
    with open(path, newline='') as file:
        rows = [row for row in csv.DictReader(file) if epoch is None or int(row['epoch']) == epoch]
    return {
        name.removeprefix('eval_'): float(value)
        for name, value in (rows[-1] if rows else {}).items()
        if name.startswith('eval_') and value
    }
