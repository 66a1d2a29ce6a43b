"""A student as a folder that timm alone loads, and that is published as it is: weights, config, model card, plot."""
import csv
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import save_for_hf

from ..version import __version__

__all__ = ['CARD', 'CONFIG', 'PLOT', 'STUDENT_FILES', 'WEIGHTS', 'card_of_repo', 'new_folder', 'read_metrics',
           'save_student']

WEIGHTS, CONFIG, CARD, PLOT = STUDENT_FILES = ('model.safetensors', 'config.json', 'README.md', 'gap.png')

_OF_OTHER_WEIGHTS = ('tag', 'license', 'origin_url', 'paper_name', 'paper_ids', 'notes')
_OF_THE_MACHINE = ('checkpoint_hist', 'config', 'data', 'data_dir', 'device', 'experiment', 'log_interval', 'output',
                   'pin_mem', 'recovery_interval', 'resume', 'workers')
_PAPER = 'https://arxiv.org/abs/2410.04140'
_CITATION = '''@inproceedings{guo2025gap,
  title={Gap Preserving Distillation by Building Bidirectional Mappings with A Dynamic Teacher},
  author={Guo, Yong and Zhang, Shulian and Pan, Haolin and Liu, Jing and Zhang, Yulun and Chen, Jian},
  booktitle={The Thirteenth International Conference on Learning Representations},
  year={2025},
  url={https://openreview.net/forum?id=PnfghHD4Pi}
}'''
_LOCAL_NAME = 'local-dir:path/to/this/folder'


@contextmanager
def new_folder(folder: str) -> Iterator[str]:
    """Gives a hidden folder beside ``folder`` to fill, which takes its place if nothing was raised.

    So whoever looks sees the old folder or the whole new one.
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
        student: plain timm model; ``pretrained_cfg`` tells its architecture and input.
        folder: where to write.
        recipe: arguments of the run, for the card and for ``model_args``; or ``converted_from``, a file's name.
        metrics: what :func:`read_metrics` gives; top-1 and top-5 in percent.
        plot: PNG file of the accuracies over epochs; skipped if there is no such file.
    """
    # These weights are new: what the config says of the ones that it came with is no longer true.
    student.pretrained_cfg = {
        key: value for key, value in student.pretrained_cfg.items() if key not in _OF_OTHER_WEIGHTS}
    plot = plot if plot and os.path.isfile(plot) else None
    with new_folder(folder) as partial:
        save_for_hf(student, partial, model_args=dict(recipe.get('model_kwargs') or {}), safe_serialization=True)
        _model_card(student, recipe, metrics or {}, bool(plot)).save(os.path.join(partial, CARD))
        if plot:
            shutil.copyfile(plot, os.path.join(partial, PLOT))


def read_metrics(path: str, epoch: Optional[int] = None) -> Dict[str, float]:
    """The ``eval_*`` values of one epoch, without that prefix, as ``summary.csv`` holds them.

    Args:
        path: ``summary.csv`` of a run; a file that is not there holds no values.
        epoch: which epoch; default the last.
    """
    if not os.path.isfile(path):
        return {}
    with open(path, newline='') as file:
        rows = [row for row in csv.DictReader(file) if epoch is None or int(row['epoch']) == epoch]
    return {
        name.removeprefix('eval_'): float(value)
        for name, value in (rows[-1] if rows else {}).items() if name.startswith('eval_') and value}


def card_of_repo(folder: str, repo_id: str) -> str:
    """The card of a student's folder, its usage naming the Hub repo in the folder's place."""
    with open(os.path.join(folder, CARD), encoding='utf-8') as file:
        return file.read().replace(_LOCAL_NAME, f'hf-hub:{repo_id}')


def _model_card(student: nn.Module, recipe: Dict[str, Any], metrics: Dict[str, float], plot: bool) -> ModelCard:
    name = student.pretrained_cfg['architecture']
    gpd = bool(recipe.get('gpd'))
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm'] + (['gap-preserving-distillation', 'arxiv:2410.04140'] if gpd else []),
        model_name=name,
        eval_results=_eval_results(recipe, metrics) or None,
    )
    lines = [f'# {name}', '', f'An image classifier of {student.num_classes} classes. {_method(recipe)}', '']
    lines += [f'- **{key}:** {value}' for key, value in _details(student, recipe).items()]
    if metrics:
        lines += ['', '## Results', '', '| validation | top-1 (%) | top-5 (%) |', '|---|---|---|']
        for prefix, label in (('', 'student'), ('teacher_', 'dynamic teacher'), ('static_', 'static teacher')):
            if f'{prefix}top1' in metrics:
                cells = [f'{metrics[key]:.2f}' if key in metrics else '' for key in (f'{prefix}top1', f'{prefix}top5')]
                lines.append(f'| {label} | {cells[0]} | {cells[1]} |')
    if plot:
        lines += ['', f'![Top-1 of the student and its teachers over epochs]({PLOT})']
    lines += ['', *_usage(student)]
    settings = _recipe_of_any_machine(recipe)
    lines += ['', '## Recipe', '', f'Arguments of timm-gpd {__version__}:', '',
              '```json', json.dumps(settings, indent=2, sort_keys=True), '```']
    if gpd:
        lines += ['', '## Citation', '', '```bibtex', _CITATION, '```']
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n'.join(lines) + '\n')


def _dataset(recipe: Dict[str, Any]) -> str:
    return recipe.get('dataset') or os.path.basename(os.path.normpath(recipe.get('data_dir') or 'images'))


def _eval_results(recipe: Dict[str, Any], metrics: Dict[str, float]) -> List[EvalResult]:
    return [
        EvalResult(
            task_type='image-classification', dataset_type=_dataset(recipe), dataset_name=_dataset(recipe),
            dataset_split=recipe.get('val_split'), metric_type='accuracy', metric_name=label,
            metric_value=round(metrics[key], 3))
        for key, label in (('top1', 'top-1 (%)'), ('top5', 'top-5 (%)')) if key in metrics]


def _method(recipe: Dict[str, Any]) -> str:
    gpd = f'[Gap Preserving Distillation]({_PAPER})'
    if recipe.get('converted_from'):
        return f'Converted from `{recipe["converted_from"]}`, a checkpoint of the authors of {gpd}.'
    if recipe.get('gpd'):
        return (f'Trained by {gpd} with a dynamic teacher of ratio {recipe["gpd_ratio"]}, with which it shares its '
                'parameters and from which it was read without post-training.')
    return 'Trained by distillation.' if recipe.get('kd_model_name') else 'Trained on its own.'


def _details(student: nn.Module, recipe: Dict[str, Any]) -> Dict[str, str]:
    config = student.pretrained_cfg
    details = {
        'Student': f'`{config["architecture"]}`, {sum(p.numel() for p in student.parameters()):,} parameters, input '
                   + ' × '.join(str(size) for size in config['input_size']),
    }
    if recipe.get('gpd') and not recipe.get('converted_from'):
        details['Dynamic teacher'] = (
            f'ratio {recipe["gpd_ratio"]}, branches per convolution: {recipe["gpd_branches"]}; '
            f'its loss `{recipe["gpd_loss"]}` has weight {recipe["gpd_weight"]:g}')
    if recipe.get('kd_model_name'):
        details['Static teacher'] = (
            f'`{_without_folder(recipe["kd_model_name"])}`, by the losses `{recipe["kd_distill_type"]}`')
    if not recipe.get('converted_from'):
        details['Data'] = f'`{_dataset(recipe)}`'
    if 'epochs' in recipe:
        rate = (f'learning rate {recipe["lr"]:g}' if recipe.get('lr') else
                f'base learning rate {recipe["lr_base"]:g} for batches of {recipe["lr_base_size"]}')
        details['Training'] = (
            f'{recipe["epochs"]} epochs, batch {recipe["batch_size"] * recipe["grad_accum_steps"]}, '
            f'`{recipe["opt"]}`, {rate}, weight decay {recipe["weight_decay"]:g}, `{recipe["sched"]}` schedule')
    return details


def _usage(student: nn.Module) -> List[str]:
    register = ['import timm_gpd  # registers the architecture'] if type(student).__module__.startswith(
        __package__.partition('.')[0] + '.') else []
    return [
        '## Usage', '', 'With timm:' if not register else 'With timm and timm-gpd:', '',
        '```python', 'import timm', *register, '',
        f"model = timm.create_model('{_LOCAL_NAME}', pretrained=True).eval()",
        'config = timm.data.resolve_model_data_config(model)',
        'transform = timm.data.create_transform(**config, is_training=False)',
        '```', '', 'With timm-gpd, to go on from these weights:', '',
        '```bash',
        f'python train.py --gpd --model {_LOCAL_NAME} --pretrained --data-dir path/to/images',
        f'python train.py --gpd --model resnet18 --kd-model-name {_LOCAL_NAME} --data-dir path/to/images',
        '```',
    ]


def _recipe_of_any_machine(recipe: Dict[str, Any]) -> Dict[str, Any]:
    """What repeats the run elsewhere: no folders of this machine, and no argument that was left unset."""
    return {
        key: _without_folder(value) for key, value in recipe.items()
        if key not in _OF_THE_MACHINE and value is not None and value != '' and value != {}}


def _without_folder(value: Any) -> Any:
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith('local-dir:')):
        return os.path.basename(os.path.normpath(value.removeprefix('local-dir:')))
    return value
