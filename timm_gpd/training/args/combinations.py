"""Values that are right by themselves and do not go together."""

import argparse
import logging
import os
from typing import Any, Dict, List, Mapping, Tuple, Union

import torch.nn as nn

from ...command_line import flag_of
from ...distillers import ADVERSARIAL_DISTILLERS, loss_and_teacher
from ...errors import UsageError
from ...losses.adversarial import VIEWS_OF
from ...private_torch import BatchNorm

__all__ = [
    'METRICS',
    'MULTILABEL_METRICS',
    'check_batch_norm',
    'check_train_combinations',
    'check_validate_combinations',
]

_logger = logging.getLogger('train')

METRICS = ('loss', 'top1', 'top5')
MULTILABEL_METRICS = ('loss', 'map', 'micro_f1', 'macro_f1', 'sample_f1')
# Flags that only another one gives a meaning, by that one, or by those of which one does.
_ONLY_WITH: Dict[Union[str, Tuple[str, ...]], Tuple[str, ...]] = {
    'gpd': (
        'gpd_ratio',
        'gpd_branches',
        'gpd_noise',
        'gpd_scale',
        'gpd_share_weight',
        'gpd_loss',
        'gpd_loss_args',
        'gpd_weight',
        'gpd_weight_schedule',
        'gpd_weight_end',
        'gpd_epochs',
        'gpd_method',
        'gpd_between',
        'gpd_switch',
        'gpd_gap_target',
    ),
    'gpd_gap_target': ('gpd_gap_scales',),
    'adv': ('adv_eps', 'adv_step', 'adv_steps'),
    'kd_model_name': ('kd_img_size', 'kd_class_map', 'kd_dtype', 'kd_device', 'kd_cache'),
    'ema_teacher': ('ema_teacher_prob', 'ema_teacher_momentum'),
    ('kd_model_name', 'ema_teacher'): (
        'kd_distill_type',
        'kd_token_distill_type',
        'kd_student_feature_dim',
        'kd_teacher_feature_dim',
        'kd_loss_args',
        'distill_loss_weight',
        'task_loss_weight',
        'kd_temperature',
    ),
    'clip_grad': ('clip_mode',),
    'model_ema': ('model_ema_decay', 'model_ema_warmup', 'model_ema_force_cpu'),
    'amp': ('amp_dtype',),
    'torchcompile': ('torchcompile_mode',),
}

# Glyphs are read a batch at a time, with an augmentation of their own: flags that cannot be followed, and those that
# have no effect.
_REFUSED_OF_GLYPHS = ('no_prefetcher', 'aug_splits', 'train_img_sizes', 'class_map', 'real_labels', 'valid_labels')
_IDLE_OF_GLYPHS = (
    'input_img_mode',
    'input_key',
    'train_crop_mode',
    'scale',
    'ratio',
    'hflip',
    'vflip',
    'color_jitter',
    'color_jitter_prob',
    'grayscale_prob',
    'gaussian_blur_prob',
    'aa',
    'train_interpolation',
)
# Data sets that are read as a stream.
_STREAMS = ('hfids', 'tfds', 'wds')
# Arguments of a model that have flags of their own.
_OF_FLAGS = {
    'num_classes': '--num-classes',
    'in_chans': '--in-chans',
    'global_pool': '--gp',
    'drop_rate': '--drop',
    'drop_path_rate': '--drop-path',
    'drop_block_rate': '--drop-block',
    'bn_momentum': '--bn-momentum',
    'bn_eps': '--bn-eps',
    'pretrained': '--pretrained',
    'pretrained_cfg_overlay': '--pretrained-cfg-overlay',
    'checkpoint_path': '--initial-checkpoint',
}


def check_train_combinations(values: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    """Checks the arguments of ``train.py`` against one another.

    Args:
        values: by argument, each right by itself.
        parser: knows the defaults.

    Raises:
        UsageError: if two of them contradict each other. What has no effect is warned about.
    """
    _check_images(values)
    for name, flag in _OF_FLAGS.items():
        if name in values['model_kwargs']:
            raise UsageError(f'--model-kwargs has {name}, which is {flag}: give that')
    _check_batches(values)
    _check_schedule(values)
    if values['resume'] == 'auto' and not values['experiment']:
        raise UsageError('--resume auto needs --experiment, the name of the run')
    if os.path.basename(values['experiment']) != values['experiment']:
        raise UsageError(f'--experiment {values["experiment"]} is no name of a folder in --output: leave out the path')
    if values['gpd'] and values['gpd_ratio'] == values['gpd_branches'] == 1:
        _logger.warning('with --gpd-ratio 1 and --gpd-branches 1 the dynamic teacher is the student again')
    if values['gpd_weight_end'] != parser.get_default('gpd_weight_end') and values['gpd_weight_schedule'] == 'constant':
        raise UsageError('--gpd-weight-end is where a schedule ends: add --gpd-weight-schedule linear or cosine')
    if values['gpd_scale'] == 'balanced' and values['gpd_branches'] > 1:
        raise UsageError('--gpd-scale balanced goes with one branch: leave out --gpd-branches, or take another scale')
    if values['gpd']:
        _check_own_norms(values)
        _check_method(values, parser)
        _check_gap_control(values)
    _check_adapting_teachers(values)
    _check_adversary(values, parser)
    if values['dataset'] == 'glyphs':
        idle = [name for name in _IDLE_OF_GLYPHS if values[name] != parser.get_default(name)]
        if idle:
            _logger.warning(
                f'{", ".join(flag_of(name) for name in idle)} does nothing with --dataset glyphs, whose augmentation '
                'is its own'
            )
    is_stream = values['dataset'].partition('/')[0].lower() in _STREAMS
    if values['kd_cache'] and is_stream and (not values['no_aug'] or _mixes(values)):
        raise UsageError(
            f'--kd-cache finds an image that looks as it did before, and those of the stream {values["dataset"]} are '
            'augmented and mixed by random numbers that nothing records: add --no-aug and leave out --mixup and '
            '--cutmix, or take a data set that is no stream'
        )
    metrics = _metrics(values)
    if values['eval_metric'] not in metrics:
        raise UsageError(f'--eval-metric {values["eval_metric"]} is unknown: this run has {", ".join(metrics)}')
    for switch, names in _ONLY_WITH.items():
        switches = (switch,) if isinstance(switch, str) else switch
        is_on = any(values[name] for name in switches)
        idle = [name for name in names if not is_on and values[name] != parser.get_default(name)]
        if idle:
            needed = ' or '.join(map(flag_of, switches))
            _logger.warning(f'{", ".join(flag_of(name) for name in idle)} does nothing without {needed}')


def check_validate_combinations(values: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    """Checks the arguments of ``validate.py`` against one another.

    Args:
        values: by argument, each right by itself.
        parser: knows the defaults.

    Raises:
        UsageError: if two of them contradict each other. What has no effect is warned about.
    """
    _check_images(values)
    _check_attack(values, parser)
    for name in ('real_labels', 'valid_labels'):
        if values['adv'] and values[name]:
            raise UsageError(f'--adv attacks the labels that images have, and {flag_of(name)} are others: leave it out')
    if values['adv_package'] and not values['adv']:
        raise UsageError('--adv-package says who attacks: add --adv')
    for name in ('use_ema', 'use_teacher'):
        if values[name] and not values['checkpoint']:
            raise UsageError(f'{flag_of(name)} chooses among the models of a checkpoint: give --checkpoint')
    if values['real_labels'] and values['valid_labels']:
        raise UsageError('--real-labels are of all 1000 classes, and --valid-labels leaves some: give one of them')
    for name in ('real_labels', 'valid_labels', 'metrics_avg'):
        if values[name] and values['task'] == 'multilabel':
            raise UsageError(f'{flag_of(name)} is for images of one class: leave out --task multilabel')


def check_batch_norm(batch_size: int, model: nn.Module) -> None:
    """Checks that batch norm has something to normalise over.

    Args:
        batch_size: images that a model sees at once in training, of all processes where their statistics are one.
        model: the model.

    Raises:
        UsageError: if it has batch norm and sees one image at a time.
    """
    if batch_size > 1:
        return
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm):
            raise UsageError(
                f'a batch of one has no statistics for batch norm, which the model has ({name}): raise --batch-size'
            )


def _check_images(values: Mapping[str, Any]) -> None:
    for name in _REFUSED_OF_GLYPHS if values['dataset'] == 'glyphs' else ():
        if values.get(name):
            raise UsageError(f'{flag_of(name)} does not go with --dataset glyphs: leave it out')
    size, channels, side = values['input_size'], values['in_chans'], values['img_size']
    if size and channels and size[0] != channels:
        raise UsageError(f'--in-chans {channels} is not the {size[0]} channels of --input-size')
    if size and side and tuple(size[1:]) != (side, side):
        raise UsageError(f'--img-size {side} is not the {size[1]} x {size[2]} pixels of --input-size: give one of them')
    channels = size[0] if size else channels
    for name in ('mean', 'std'):
        if values[name] and channels and len(values[name]) not in (1, channels):
            raise UsageError(f'--{name} has {len(values[name])} values, and images have {channels} channels')
    if values['amp'] and values['model_dtype'] not in (None, 'float32'):
        raise UsageError(f'--amp needs weights in float32: leave out --model-dtype {values["model_dtype"]}')


def _check_batches(values: Mapping[str, Any]) -> None:
    odd = [size for size in values['train_batch_sizes'] or [values['batch_size']] if size % 2]
    if _mixes(values) and odd:
        raise UsageError(f'--mixup and --cutmix mix pairs of images, and a batch of {odd[0]} is odd: set --batch-size')
    for low, high in (values['scale'], values['ratio']):
        if low > high:
            raise UsageError(f'--scale and --ratio go from low to high, but {low:g} is above {high:g}')


def _mixes(values: Mapping[str, Any]) -> bool:
    return values['mixup'] > 0 or values['cutmix'] > 0 or values['cutmix_minmax'] is not None


def _check_schedule(values: Mapping[str, Any]) -> None:
    epochs, warmup = values['epochs'], values['warmup_epochs']
    last = epochs + values['cooldown_epochs'] + (warmup if values['warmup_prefix'] else 0)
    if values['start_epoch'] is not None and values['start_epoch'] >= last:
        raise UsageError(f'--start-epoch {values["start_epoch"]} leaves nothing of the {last} epochs: raise --epochs')
    if values['sched'] == 'plateau' and values['sched_on_updates']:
        raise UsageError('--sched plateau looks at a metric after every epoch: leave out --sched-on-updates')
    if values['lr'] and values['min_lr'] > values['lr'] and values['sched'] not in ('none', 'constant'):
        raise UsageError(f'--min-lr {values["min_lr"]:g} is above --lr {values["lr"]:g}')
    if values['sched'] in ('wsd', 'rsqrt'):
        steady = epochs if values['warmup_prefix'] else epochs - warmup
        decay = 0.2 if values['decay_epochs'] is None else values['decay_epochs']
        if steady <= 0 or decay > steady:
            raise UsageError(
                f'--sched {values["sched"]} has {max(steady, 0)} epochs after the warmup, and --decay-epochs is '
                f'{decay:g}: raise --epochs, or lower --warmup-epochs or --decay-epochs'
            )
    elif warmup >= epochs and not values['warmup_prefix'] and values['sched'] != 'none':
        _logger.warning(
            f'--warmup-epochs {warmup} of --epochs {epochs}: the learning rate never reaches its value '
            '(--warmup-prefix puts the warmup before them)'
        )


def _check_method(values: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    method, ratio = values['gpd_method'], values['gpd_ratio']
    idle = {'joint': ['gpd_between'], 'netaug': ['gpd_between', 'gpd_loss', 'gpd_weight'], 'sandwich': []}[method]
    for name in idle:
        if values[name] != parser.get_default(name):
            _logger.warning(f'{flag_of(name)} does nothing with --gpd-method {method}')
    if method == 'joint':
        return
    if ratio < 2:
        raise UsageError(f'--gpd-method {method} trains wider models than the student: raise --gpd-ratio {ratio}')
    if method == 'netaug' and values['kd_model_name']:
        raise UsageError('--gpd-method netaug distils nothing: leave out --kd-model-name, or take another method')
    if ratio > 2 and values['torchcompile']:
        raise UsageError(
            f'--gpd-method {method} runs ratios between 1 and --gpd-ratio {ratio} uncompiled: leave out --torchcompile'
        )
    if ratio == 2 and method == 'sandwich':
        _logger.warning('--gpd-method sandwich is --gpd-method joint where --gpd-ratio is 2: no ratio is between')


def _check_own_norms(values: Mapping[str, Any]) -> None:
    if values['clip_mode'] != 'own-norm' or values['clip_grad'] is None:
        return
    if values['gpd_branches'] > 1:
        raise UsageError(
            '--clip-mode own-norm goes with one branch, as several are no weights of a model that trains plainly: '
            'leave out --gpd-branches, or take norm'
        )
    if values['torchcompile']:
        raise UsageError(
            "--clip-mode own-norm needs the student's gradients apart, which a compiler does not keep: leave out "
            '--torchcompile, or take norm'
        )
    if values['amp'] and values['amp_dtype'] == 'float16':
        raise UsageError(
            '--clip-mode own-norm does not go with the scaled gradients of float16: take --amp-dtype bfloat16, or norm'
        )


def _check_gap_control(values: Mapping[str, Any]) -> None:
    is_switched, has_target = values['gpd_switch'], values['gpd_gap_target'] is not None
    if is_switched and has_target:
        raise UsageError('--gpd-switch and --gpd-gap-target control the same gap: give one of them')
    if not is_switched and not has_target:
        return
    flag = '--gpd-switch' if is_switched else '--gpd-gap-target'
    if values['gpd_method'] == 'netaug':
        raise UsageError(f'{flag} controls a gap, and --gpd-method netaug has none: leave out one of them')
    if is_switched and values['torchcompile']:
        raise UsageError('--gpd-switch decides at every step, which a compiler cannot follow: leave out --torchcompile')
    if is_switched and values['task'] == 'multilabel':
        raise UsageError(
            '--gpd-switch compares probabilities of classes that exclude each other, and with --task multilabel they '
            'do not: take --gpd-gap-target'
        )
    if has_target and values['gpd_gap_scales'] == 'distillation' and values['gpd_weight'] == 0:
        raise UsageError('--gpd-gap-scales distillation scales --gpd-weight, which is 0: raise it')


def _check_adapting_teachers(values: Mapping[str, Any]) -> None:
    if values['ema_teacher'] and values['gpd'] and values['gpd_method'] == 'netaug':
        raise UsageError('--gpd-method netaug distils nothing: leave out --ema-teacher, or take another method')
    if not values['kd_online_modules']:
        return
    if not values['kd_model_name']:
        raise UsageError('--kd-online-modules are added to a static teacher: give --kd-model-name')
    if values['torchcompile']:
        raise UsageError(
            '--kd-online-modules are hooked into the static teacher, which a compiler cannot follow: leave out '
            '--torchcompile'
        )
    if values['kd_cache']:
        raise UsageError('--kd-online-modules change what the static teacher says: leave them out, or --kd-cache')
    if values['task'] == 'multilabel':
        raise UsageError(
            '--kd-online-modules compare probabilities of classes that exclude each other, and with --task multilabel '
            'they do not: leave it out'
        )


def _check_attack(values: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    if not values['adv']:
        return
    if values['task'] == 'multilabel':
        raise UsageError('--adv is for images of one class: leave out --task multilabel')
    if values['model_dtype'] not in (None, 'float32'):
        raise UsageError(
            f'--adv takes steps that are small for --model-dtype {values["model_dtype"]}: take --amp instead'
        )
    for name in ('adv_step', 'adv_steps'):
        if values['adv'] == 'fgsm' and values[name] != parser.get_default(name):
            _logger.warning(f'{flag_of(name)} does nothing with --adv fgsm, which takes one step of --adv-eps')


def _check_adversary(values: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    _check_attack(values, parser)
    names = values['kd_distill_type'].split(',') if values['kd_model_name'] else []
    losses = {'--kd-distill-type': [loss_and_teacher(name.strip())[0] for name in names]}
    if values['gpd'] and values['gpd_method'] != 'netaug':
        losses['--gpd-loss'] = [values['gpd_loss']]
    found = [(flag, name) for flag, given in losses.items() for name in given if name in ADVERSARIAL_DISTILLERS]
    if not values['adv']:
        for flag, name in found:
            raise UsageError(f'{flag} {name} compares images that an attack has perturbed: add --adv pgd')
        return
    if values['kd_cache']:
        raise UsageError('--kd-cache finds images that come again, and perturbed ones do not: leave it out, or --adv')
    if values['kd_online_modules']:
        raise UsageError('--adv does not see the modules of --kd-online-modules: leave out one of them')
    if values['aug_splits']:
        raise UsageError('--adv perturbs one view of an image, and --aug-splits makes several: leave out one of them')
    for flag, name in found:
        if name == 'dgad' and _mixes(values):
            raise UsageError(f'{flag} dgad asks which class an image is of, and --mixup and --cutmix make it of two')
        if values['gpd'] and values['gpd_method'] != 'joint' and (flag == '--gpd-loss' or len(VIEWS_OF[name]) > 1):
            raise UsageError(
                f'{flag} {name} compares views of images, of which --gpd-method {values["gpd_method"]} trains ratios '
                'on one: take --gpd-method joint, or another loss'
            )


def _metrics(values: Mapping[str, Any]) -> Tuple[str, ...]:
    names = MULTILABEL_METRICS if values['task'] == 'multilabel' else METRICS
    ranking = names[1]  # what the gap is the difference of
    found: List[str] = list(names)
    if values['gpd'] and values['gpd_epochs'] is None:  # else some epochs have no dynamic teacher
        found += [*(f'teacher_{name}' for name in names), 'gap']
    if values['kd_model_name']:
        found.append(f'static_{ranking}')
    if values['ema_teacher']:
        found.append(f'ema_teacher_{ranking}')
    return tuple(found)
