"""What each flag of ``train.py`` and ``validate.py`` may be: a table, read before anything is created."""

import argparse
import re
from typing import Any, Callable, Dict, Mapping, Optional, Sequence

import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.models import is_model, list_models
from timm.optim import list_optimizers

from ...errors import UsageError, first_line
from ...models.variants import plain_name
from ...teacher.branches import BRANCH_KINDS
from ..joint_epochs import what_is_wrong
from .value_kinds import Each, Input, Names, Numbers, Output, Text

__all__ = ['FLAGS', 'check_flags', 'check_model_name']

_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_COMPILE_MODES = ('default', 'lite', 'reduce-overhead', 'max-autotune-no-cudagraphs', 'max-autotune')
# What a policy's name starts with, and what reads it.
_POLICIES: Dict[str, Callable[..., Any]] = {
    'rand': rand_augment_transform,
    'augmix': augment_and_mix_transform,
    **dict.fromkeys(('original', 'originalr', 'v0', 'v0r', '3a'), auto_augment_transform),
}


def _is_model(name: str) -> bool:
    return ':' in name or '/' in name or is_model(plain_name(name))


def _policy(text: str) -> Optional[str]:
    """What is wrong with a policy of augmentation, None where nothing is."""
    name, *parts = text.split('-')
    if text and name not in _POLICIES:
        return f'{text} is unknown: policies are {", ".join(f"{known}-..." for known in _POLICIES)}'
    for part in parts:
        problem = None if part.startswith('t') else _policy_part(part)
        if problem:
            return f'{text} has the part {part!r}: {problem}'
    try:
        if text:
            _POLICIES[name](text, {})
    except (AssertionError, ValueError, KeyError) as error:
        return f'{text} is no policy that timm reads: {first_line(error)}'
    return None


def _policy_part(part: str) -> Optional[str]:
    found = re.fullmatch(r'([a-z]+)(\d+(?:\.\d+)?)', part)
    if found is None:  # which timm passes over
        return 'a part is letters and a number, as in rand-m9-mstd0.5-inc1'
    key, number = found[1], float(found[2])
    if key == 'p' and number > 1:
        return 'p is a probability'
    return 'n is at least 1' if key == 'n' and number < 1 else None


def _backends() -> Sequence[str]:
    return [name for name in torch.compiler.list_backends(exclude_tags=()) if not name.endswith('TESTING_ONLY')]


COUNT = Numbers(1)
COUNT_OR_NONE = Numbers(0)
POSITIVE = Numbers(0, above=True)
AT_LEAST_0 = Numbers(0)
SHARE = Numbers(0, 1)
RATE = Numbers(0, 1, below=True)
FINITE = Numbers()
METRIC = Text('by check_combinations: it depends on --task, --gpd and --kd-model-name')
SPLIT = Text('by resolve_data, which lists the splits')
NEW_NAME = Text('a name of something new')
FIELD = Text('by the reader of the dataset')
KWARGS = Text('by what takes these arguments, which are its own')
LOSS_WEIGHT = Text('by the loss, which reads numbers, files and methods')
PATH = Text('by what opens it, which says the name')

FLAGS: Mapping[str, Callable[[Any], Optional[str]]] = {
    # Dataset
    'data': PATH,
    'data_dir': PATH,
    'dataset': Text('by resolve_data, which lists the kinds'),
    'class_map': PATH,
    'train_split': SPLIT,
    'val_split': SPLIT,
    'input_img_mode': Names('image modes', lambda: Image.MODES),
    'input_key': FIELD,
    'target_key': FIELD,
    'multilabel_threshold': Numbers(0, 1, above=True, below=True),
    'max_bad_images': SHARE,
    'digits_train_size': Numbers(10, 888),
    'train_num_samples': COUNT,
    'val_num_samples': COUNT,
    'epoch_repeats': AT_LEAST_0,
    # Model
    'model': Names('models', list_models, _is_model),
    'num_classes': COUNT_OR_NONE,
    'gp': Text('by the model'),
    'img_size': COUNT,
    'in_chans': COUNT,
    'input_size': Numbers(1, counts=(3,)),
    'crop_pct': POSITIVE,
    'crop_border_pixels': COUNT_OR_NONE,
    'mean': FINITE,
    'std': POSITIVE,
    'interpolation': Names('interpolations', lambda: _INTERPOLATIONS),
    'model_kwargs': KWARGS,
    'pretrained_path': Input(),
    'pretrained_cfg_overlay': KWARGS,
    'initial_checkpoint': Input(),
    'checkpoint': PATH,
    'head_init_scale': FINITE,
    'head_init_bias': FINITE,
    'batch_size': COUNT,
    'validation_batch_size': COUNT,
    # Dynamic and static teacher
    'gpd_ratio': COUNT,
    'gpd_branches': Numbers(1, len(BRANCH_KINDS)),
    'gpd_noise': AT_LEAST_0,
    'gpd_share_weight': SHARE,
    'gpd_loss_args': KWARGS,
    'gpd_weight': AT_LEAST_0,
    'gpd_weight_end': AT_LEAST_0,
    'gpd_epochs': what_is_wrong,
    'gpd_between': COUNT_OR_NONE,
    'gpd_gap_target': POSITIVE,
    'ema_teacher_prob': Numbers(0, 1, above=True),
    'ema_teacher_momentum': RATE,
    'kd_model_name': Each(Names('models', list_models, _is_model)),
    'kd_model_path': PATH,
    'kd_img_size': Each(Numbers(1), int),
    'kd_class_map': PATH,
    'kd_dtype': Each(Names('dtypes', lambda: ('float32', 'float16', 'bfloat16'))),
    'kd_device': Text('by read_static_teachers, and where the teacher is put there'),
    'kd_cache': PATH,
    'kd_student_feature_dim': COUNT,
    'kd_teacher_feature_dim': COUNT,
    'kd_distill_type': Text('by the task, which lists the losses'),
    'kd_loss_args': KWARGS,
    'kd_temperature': POSITIVE,
    'distill_loss_weight': AT_LEAST_0,
    'task_loss_weight': AT_LEAST_0,
    # Attack
    'adv_eps': Numbers(0, 1, above=True),
    'adv_step': Numbers(0, 1, above=True),
    'adv_steps': COUNT,
    # Loss
    'smoothing': RATE,
    'bce_target_thresh': SHARE,
    'bce_pos_weight': POSITIVE,
    'class_stats': Input(),
    'loss_pos_weight': LOSS_WEIGHT,
    'loss_class_weight': LOSS_WEIGHT,
    'loss_weight_power': FINITE,
    'loss_weight_beta': RATE,
    'loss_weight_max': POSITIVE,
    'asl_gamma_pos': AT_LEAST_0,
    'asl_gamma_neg': AT_LEAST_0,
    'asl_clip': RATE,
    'poly_epsilon': FINITE,
    'poly_gamma': AT_LEAST_0,
    'poly_alpha': SHARE,
    'twoway_tp': POSITIVE,
    'twoway_tn': POSITIVE,
    'db_neg_scale': POSITIVE,
    'db_init_bias': FINITE,
    'db_focal_gamma': AT_LEAST_0,
    # Optimizer
    'opt': Names('optimizers', list_optimizers, lambda name: name.lower().split('_')[-1] in list_optimizers()),
    'opt_eps': AT_LEAST_0,
    'opt_betas': Numbers(0, 1, below=True, counts=(1, 2, 3)),
    'opt_kwargs': KWARGS,
    'momentum': RATE,
    'weight_decay': AT_LEAST_0,
    'clip_grad': POSITIVE,
    'layer_decay': Numbers(0, 1, above=True),
    'layer_decay_min_scale': SHARE,
    'layer_decay_no_opt_scale': SHARE,
    'grad_accum_steps': COUNT,
    # Schedule
    'lr': POSITIVE,
    'lr_base': POSITIVE,
    'lr_base_size': COUNT,
    'lr_noise': Numbers(0, 1, counts=(1, 2), rising=True),
    'lr_noise_pct': AT_LEAST_0,
    'lr_noise_std': AT_LEAST_0,
    'lr_cycle_mul': POSITIVE,
    'lr_cycle_decay': AT_LEAST_0,
    'lr_cycle_limit': COUNT,
    'lr_k_decay': POSITIVE,
    'lr_stable_timescale': POSITIVE,
    'warmup_lr': AT_LEAST_0,
    'min_lr': AT_LEAST_0,
    'epochs': COUNT,
    'start_epoch': COUNT_OR_NONE,
    'stop_epoch': COUNT,
    'decay_milestones': Numbers(1, rising=True),
    'decay_epochs': POSITIVE,
    'decay_rate': POSITIVE,
    'warmup_epochs': COUNT_OR_NONE,
    'cooldown_epochs': COUNT_OR_NONE,
    'patience_epochs': COUNT_OR_NONE,
    # Augmentation
    'scale': Numbers(0, above=True, counts=(2,)),
    'ratio': Numbers(0, above=True, counts=(2,)),
    'hflip': SHARE,
    'vflip': SHARE,
    'color_jitter': AT_LEAST_0,
    'color_jitter_prob': SHARE,
    'grayscale_prob': SHARE,
    'gaussian_blur_prob': SHARE,
    'aa': _policy,
    'aug_repeats': AT_LEAST_0,
    'aug_splits': COUNT_OR_NONE,
    'reprob': SHARE,
    'recount': COUNT,
    'mixup': AT_LEAST_0,
    'cutmix': AT_LEAST_0,
    'cutmix_minmax': Numbers(0, 1, counts=(2,), rising=True),
    'mixup_prob': SHARE,
    'mixup_switch_prob': SHARE,
    'mixup_off_epoch': COUNT_OR_NONE,
    'train_interpolation': Names('interpolations', lambda: (*_INTERPOLATIONS, 'random')),
    'train_img_sizes': COUNT,
    'train_batch_sizes': COUNT,
    'train_size_probs': AT_LEAST_0,
    'train_size_schedule_spread': POSITIVE,
    'train_size_random_mix': SHARE,
    'train_batches_per_epoch': COUNT,
    # Regularization
    'drop': RATE,
    'drop_path': RATE,
    'drop_block': RATE,
    'bn_momentum': SHARE,
    'bn_eps': POSITIVE,
    'model_ema_decay': RATE,
    # Device
    'device': Text('by create_compute, which tries it'),
    'device_modules': Text('by Python, which imports them'),
    'torchcompile': Names('backends', _backends),
    'torchcompile_mode': Names('modes', lambda: _COMPILE_MODES),
    'local_rank': Numbers(-1),
    'num_gpu': COUNT,
    'workers': COUNT_OR_NONE,
    # Run and results
    'config': PATH,
    'output': PATH,
    'experiment': NEW_NAME,
    'resume': PATH,
    'checkpoint_hist': COUNT,
    'save_epochs': COUNT,
    'recovery_interval': COUNT_OR_NONE,
    'seed': Numbers(0, 2**32 - 1),
    'val_interval': COUNT,
    'eval_metric': METRIC,
    'log_interval': COUNT,
    'wandb_project': NEW_NAME,
    'wandb_tags': NEW_NAME,
    'wandb_resume_id': NEW_NAME,
    'results_file': Output(),
    'real_labels': Input(),
    'valid_labels': Input(),
}


def check_flags(values: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    """Checks every value of a command by itself.

    Args:
        values: by argument, as ``parser`` and ``--config`` give them.
        parser: knows what the flags are called.

    Raises:
        UsageError: names the flag, says what it may be, and where that is a name which there are.
    """
    for action in parser._actions:
        value, kind = values.get(action.dest), FLAGS.get(action.dest)
        problem = None if value is None or kind is None else kind(value)
        if problem:
            flag = next((option for option in action.option_strings if option.startswith('--')), action.dest)
            raise UsageError(f'{flag} {problem}')


def check_model_name(name: str) -> None:
    """Checks that timm knows a model.

    Args:
        name: the model; one on the Hub or in a folder passes.

    Raises:
        UsageError: lists models of names like it.
    """
    problem = FLAGS['model'](name)
    if problem:
        raise UsageError(f'--model {problem}')
