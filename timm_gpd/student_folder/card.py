"""The model card of a student: what was trained, how, and what came of it."""

import json
import os
from typing import Any, Dict, List, Optional, cast

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..version import __version__

__all__ = ['CARD', 'MODEL_NAMES', 'card_of_repo', 'model_card']

CARD = 'README.md'

_OF_THE_MACHINE = (
    'checkpoint_hist',
    'config',
    'data',
    'data_dir',
    'device',
    'kd_cache',
    'kd_device',
    'experiment',
    'log_interval',
    'log_tensorboard',
    'log_wandb',
    'output',
    'pin_mem',
    'recovery_interval',
    'resume',
    'wandb_project',
    'wandb_resume_id',
    'wandb_tags',
    'workers',
)
_PAPER = 'https://arxiv.org/abs/2410.04140'
# What people call the models of a run, by the prefix of their metrics.
MODEL_NAMES = {
    '': 'student',
    'teacher_': 'dynamic teacher',
    'static_': 'static teacher',
    'ema_teacher_': 'EMA teacher',
}
_CITATION = """@inproceedings{guo2025gap,
  title={Gap Preserving Distillation by Building Bidirectional Mappings with A Dynamic Teacher},
  author={Guo, Yong and Zhang, Shulian and Pan, Haolin and Liu, Jing and Zhang, Yulun and Chen, Jian},
  booktitle={The Thirteenth International Conference on Learning Representations},
  year={2025},
  url={https://openreview.net/forum?id=PnfghHD4Pi}
}"""
_LOCAL_NAME = 'local-dir:path/to/this/folder'


def model_card(
    student: nn.Module,
    recipe: Dict[str, Any],
    metrics: Dict[str, float],
    plot: Optional[str] = None,
) -> ModelCard:
    """Says what a student is: method, teachers, data, results, usage, recipe and citation.

    Args:
        student: plain timm model; ``pretrained_cfg`` tells its architecture and input.
        recipe: arguments of the run; or ``converted_from``, a file's name.
        metrics: what :func:`timm_gpd.student_folder.read_metrics` gives; top-1 and top-5 in percent.
        plot: file name, beside the card, of the plot of accuracies over epochs, if there is one.

    Returns:
        The card. It names no folder of this machine.
    """
    name = _config(student)['architecture']
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
        for prefix, label in MODEL_NAMES.items():
            if f'{prefix}top1' in metrics:
                cells = [f'{metrics[key]:.2f}' if key in metrics else '' for key in (f'{prefix}top1', f'{prefix}top5')]
                lines.append(f'| {label} | {cells[0]} | {cells[1]} |')
    if plot:
        lines += ['', f'![Top-1 of the student and its teachers over epochs]({plot})']
    lines += ['', *_usage(student)]
    settings = _recipe_of_any_machine(recipe)
    lines += [
        '',
        '## Recipe',
        '',
        f'Arguments of timm-gpd {__version__}:',
        '',
        '```json',
        json.dumps(settings, indent=2, sort_keys=True),
        '```',
    ]
    if gpd:
        lines += ['', '## Citation', '', '```bibtex', _CITATION, '```']
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n'.join(lines) + '\n')


def card_of_repo(folder: str, repo_id: str) -> str:
    """The card of a student's folder, its usage naming the Hub repo in the folder's place.

    Args:
        folder: what :func:`timm_gpd.student_folder.save_student` wrote.
        repo_id: ``namespace/name``.

    Returns:
        The text of the card, for the repo's ``README.md``.
    """
    with open(os.path.join(folder, CARD), encoding='utf-8') as file:
        return file.read().replace(_LOCAL_NAME, f'hf-hub:{repo_id}')


def _config(student: nn.Module) -> Dict[str, Any]:
    return cast(Dict[str, Any], student.pretrained_cfg)


def _dataset(recipe: Dict[str, Any]) -> str:
    return recipe.get('dataset') or os.path.basename(os.path.normpath(recipe.get('data_dir') or 'images'))


def _eval_results(recipe: Dict[str, Any], metrics: Dict[str, float]) -> List[EvalResult]:
    return [
        EvalResult(
            task_type='image-classification',
            dataset_type=_dataset(recipe),
            dataset_name=_dataset(recipe),
            dataset_split=recipe.get('val_split'),
            metric_type='accuracy',
            metric_name=label,
            metric_value=round(metrics[key], 3),
        )
        for key, label in (('top1', 'top-1 (%)'), ('top5', 'top-5 (%)'))
        if key in metrics
    ]


def _method(recipe: Dict[str, Any]) -> str:
    gpd = f'[Gap Preserving Distillation]({_PAPER})'
    if recipe.get('converted_from'):
        return f'Converted from `{recipe["converted_from"]}`, a checkpoint of the authors of {gpd}.'
    if recipe.get('gpd'):
        return (
            f'Trained by {gpd} with a dynamic teacher of ratio {recipe["gpd_ratio"]}, with which it shares its '
            'parameters and from which it was read without post-training.'
        )
    is_taught = recipe.get('kd_model_name') or recipe.get('ema_teacher')
    return 'Trained by distillation.' if is_taught else 'Trained on its own.'


def _details(student: nn.Module, recipe: Dict[str, Any]) -> Dict[str, str]:
    config = _config(student)
    details = {
        'Student': f'`{config["architecture"]}`, {sum(p.numel() for p in student.parameters()):,} parameters, input '
        + ' × '.join(str(size) for size in config['input_size']),
    }
    if recipe.get('gpd') and not recipe.get('converted_from'):
        details['Dynamic teacher'] = (
            f'ratio {recipe["gpd_ratio"]}, branches per convolution: {recipe["gpd_branches"]}; '
            f'its loss `{recipe["gpd_loss"]}` has weight {recipe["gpd_weight"]:g}'
            + (f'; in the epochs {recipe["gpd_epochs"]} only' if recipe.get('gpd_epochs') else '')
        )
    if recipe.get('kd_model_name'):
        details['Static teacher'] = (
            f'`{_without_folders(recipe, "kd_model_name")}`, by the losses `{recipe["kd_distill_type"]}`'
        )
    if not recipe.get('converted_from'):
        details['Data'] = f'`{_dataset(recipe)}`'
    if 'epochs' in recipe:
        rate = (
            f'learning rate {recipe["lr"]:g}'
            if recipe.get('lr')
            else f'base learning rate {recipe["lr_base"]:g} for batches of {recipe["lr_base_size"]}'
        )
        details['Training'] = (
            f'{recipe["epochs"]} epochs, batch {recipe["batch_size"] * recipe["grad_accum_steps"]}, '
            f'`{recipe["opt"]}`, {rate}, weight decay {recipe["weight_decay"]:g}, `{recipe["sched"]}` schedule'
        )
    return details


def _usage(student: nn.Module) -> List[str]:
    register = (
        ['import timm_gpd  # registers the architecture']
        if type(student).__module__.startswith(__package__.partition('.')[0] + '.')
        else []
    )
    config: Any = getattr(student, 'pretrained_cfg', {})
    flags = f'--num-classes {config.get("num_classes", 1000)}'
    channels = (config.get('input_size') or (3,))[0]
    flags += f' --in-chans {channels}' if channels != 3 else ''
    return [
        '## Usage',
        '',
        'With timm:' if not register else 'With timm and timm-gpd:',
        '',
        '```python',
        'import timm',
        *register,
        '',
        f"model = timm.create_model('{_LOCAL_NAME}', pretrained=True).eval()",
        'config = timm.data.resolve_model_data_config(model)',
        'transform = timm.data.create_transform(**config, is_training=False)',
        '```',
        '',
        'With timm-gpd, to go on from these weights:',
        '',
        '```bash',
        f'python train.py --gpd --model {_LOCAL_NAME} --pretrained --data-dir path/to/images',
        f'python train.py --gpd --model resnet18 {flags} --kd-model-name {_LOCAL_NAME} --data-dir path/to/images',
        '```',
    ]


def _recipe_of_any_machine(recipe: Dict[str, Any]) -> Dict[str, Any]:
    """What repeats the run elsewhere: no folders of this machine, and no argument that was left unset."""
    return {
        key: _without_folders(recipe, key)
        for key, value in recipe.items()
        if key not in _OF_THE_MACHINE and value is not None and value != '' and value != {}
    }


def _without_folders(recipe: Dict[str, Any], key: str) -> Any:
    """A value of a recipe without folders of this machine, each for itself where it is of several static teachers."""
    value = recipe[key]
    if key.startswith('kd_') and isinstance(value, str) and ',' in (recipe.get('kd_model_name') or ''):
        return ','.join(_without_folder(part) for part in value.split(','))
    return _without_folder(value)


def _without_folder(value: Any) -> Any:
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith('local-dir:')):
        return os.path.basename(os.path.normpath(value.removeprefix('local-dir:')))
    return value
