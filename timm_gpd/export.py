"""A student as a folder that timm alone loads: weights, config and model card."""
import json
import os
import shutil
import tempfile
from typing import Any, Dict, Optional

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import save_for_hf

from .version import __version__

__all__ = ['save_student']

_OF_OTHER_WEIGHTS = ('tag', 'license', 'origin_url', 'paper_name', 'paper_ids', 'notes')
_PAPER = 'https://arxiv.org/abs/2410.04140'


def save_student(
        student: nn.Module,
        folder: str,
        recipe: Dict[str, Any],
        metrics: Optional[Dict[str, float]] = None,
) -> None:
    """Writes ``model.safetensors``, ``config.json`` and ``README.md``.

    ``timm.create_model('local-dir:<folder>', pretrained=True)`` gives the student back. A folder that is already there
    is replaced once the new one is complete.

    Args:
        student: plain timm model; ``pretrained_cfg`` tells its input.
        folder: where to write.
        recipe: arguments of the run, for the card and for ``model_args``.
        metrics: ``summary.csv``'s last ``eval_*`` values without that prefix; top-1 in percent.
    """
    parent = os.path.dirname(os.path.abspath(folder))
    partial = tempfile.mkdtemp(prefix='.student-', dir=parent)
    os.chmod(partial, 0o755)
    # These weights are new: what the config says of the ones that it came with is no longer true.
    student.pretrained_cfg = {
        key: value for key, value in student.pretrained_cfg.items() if key not in _OF_OTHER_WEIGHTS}
    save_for_hf(student, partial, model_args=dict(recipe.get('model_kwargs') or {}), safe_serialization=True)
    _model_card(student, recipe, metrics or {}).save(os.path.join(partial, 'README.md'))
    if os.path.isdir(folder):
        shutil.rmtree(folder)
    os.rename(partial, folder)


def _model_card(student: nn.Module, recipe: Dict[str, Any], metrics: Dict[str, float]) -> ModelCard:
    name = recipe['model']
    dataset = recipe.get('dataset') or os.path.basename(os.path.normpath(recipe.get('data_dir') or 'images'))
    gpd = bool(recipe.get('gpd'))
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm'] + (['gap-preserving-distillation'] if gpd else []),
        model_name=name,
        eval_results=[EvalResult(
            task_type='image-classification', dataset_type=dataset, dataset_name=dataset,
            metric_type='accuracy', metric_name='top-1 (%)', metric_value=round(metrics['top1'], 3),
        )] if 'top1' in metrics else None,
    )
    how = 'Trained on its own.'
    if gpd:
        how = (
            f'Trained by [Gap Preserving Distillation]({_PAPER}) with a dynamic teacher of ratio {recipe["gpd_ratio"]} '
            f'and {recipe["gpd_branches"]} branch(es), from which it was read without post-training.')
    if recipe.get('kd_model_name'):
        how += f' Static teacher: `{recipe["kd_model_name"]}`.'
    lines = [
        f'# {name}', '', f'A plain timm `{name}` with {student.num_classes} classes. {how}', '',
        '```python', 'import timm', "model = timm.create_model('local-dir:<this folder>', pretrained=True)", '```',
    ]
    if metrics:
        lines += ['', '| validation | top-1 (%) |', '|---|---|']
        for key, label in (('top1', 'student'), ('teacher_top1', 'dynamic teacher'), ('static_top1', 'static teacher')):
            if key in metrics:
                lines.append(f'| {label} | {metrics[key]:.2f} |')
    lines += [
        '', f'Recipe (timm-gpd {__version__}):', '', '```json', json.dumps(recipe, indent=2, sort_keys=True), '```']
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n'.join(lines) + '\n')
