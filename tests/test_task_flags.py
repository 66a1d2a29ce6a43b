"""Flags of what is trained arrive at the task."""

from pathlib import Path

import pytest
import timm
import torch

from timm_gpd import EmaTeacherConfig
from timm_gpd.private_torch import pre_hooks_of
from timm_gpd.task.adversary import Adversary
from timm_gpd.task.gap_control import Switch
from timm_gpd.training.args import parse_train_args
from timm_gpd.training.args.parse import train_parser
from timm_gpd.training.args.refused import Refused
from timm_gpd.training.student import create_student, resolve_input, set_input
from timm_gpd.training.task import create_task

SMALL = (
    '--model test_resnet --model-kwargs channels=[8,8,8,8] stem_width=4 --num-classes 3 --in-chans 1 --img-size 32 '
    '--mean 0.5 --std 0.5'
)
STATIC = '--kd-model-name test_resnet --kd-model-path {teacher}'


def replicas_are_equal(teacher):
    stored = dict(teacher.wide.named_parameters())
    maps = {name: tensor_map for name, tensor_map in teacher.plan.tensors.items() if name in stored}
    return all(
        torch.equal(stored[name], tensor_map.replicate(tensor_map.first_replica(stored[name])))
        for name, tensor_map in maps.items()
    )


def attack_of(task):
    return next((hook.attack for hook in pre_hooks_of(task) if isinstance(hook, Adversary)), None)


# With --gpd: where a flag's value is found in the task, and the value. Without the flag another one is there, or none.
FLAGS = {
    '--gpd-ratio 3': (lambda task: task.get_dynamic_teacher().plan.ratio, 3),
    '--gpd-branches 4': (lambda task: len(task.settings['branches']), 4),
    '--gpd-noise 0.1': (lambda task: replicas_are_equal(task.get_dynamic_teacher()), False),
    '--gpd-scale teacher': (lambda task: task.get_dynamic_teacher().scale, 'teacher'),
    '--gpd-share-weight 0.25': (lambda task: task.get_dynamic_teacher().share_weight, 0.25),
    '--gpd-loss kl': (lambda task: task.gpd_loss.name, 'kl'),
    '--gpd-loss dkd --gpd-loss-args beta=7': (lambda task: task.gpd_loss.hyperparameters, {'beta': 7}),
    '--gpd-weight 5': (lambda task: task.gpd_weight, 5),
    '--gpd-weight-schedule linear': (lambda task: task.gpd_weights.at(0.5), 1.5),
    '--gpd-weight-schedule linear --gpd-weight-end 1': (lambda task: task.gpd_weights.at(1.0), 1),
    '--gpd-method sandwich --gpd-ratio 4': (lambda task: (task.ratios.choices, task.ratios.count), ((2, 3), 2)),
    '--gpd-method sandwich --gpd-ratio 4 --gpd-between 1': (lambda task: task.ratios.count, 1),
    '--gpd-method netaug --seed 7': (lambda task: task.ratios.seed, 7),
    '--gpd-switch': (lambda task: isinstance(task.gap_control, Switch), True),
    '--gpd-gap-target 0.3': (lambda task: (task.gap_control.target, task.gap_control.scales), (0.3, 'teacher')),
    '--gpd-gap-target 0.3 --gpd-gap-scales distillation': (lambda task: task.gap_control.scales, 'distillation'),
    '--adv pgd': (lambda task: attack_of(task).kind, 'pgd'),
    '--adv pgd --adv-eps 4/255': (lambda task: attack_of(task).eps, 4 / 255),
    '--adv pgd --adv-step 1/255': (lambda task: attack_of(task).step, 1 / 255),
    '--adv pgd --adv-steps 3': (lambda task: attack_of(task).steps, 3),
    '--adv pgd --gpd-loss dgad': (lambda task: task.gpd_loss.name, 'dgad'),
    STATIC: (lambda task: task.settings['distillers'], {'logit': {'temperature': 4}}),
    f'{STATIC} --kd-temperature 2': (lambda task: task.settings['distillers'], {'logit': {'temperature': 2}}),
    f'{STATIC} --kd-distill-type dkd,nd --kd-loss-args beta=7': (
        lambda task: task.settings['distillers'],
        {'dkd': {'beta': 7}, 'nd': {}},
    ),
    f'{STATIC} --kd-img-size 48': (lambda task: task.static_teacher.img_size, 48),
    f'{STATIC} --kd-dtype bfloat16': (
        lambda task: next(task.static_teacher.teacher.model.parameters()).dtype,
        torch.bfloat16,
    ),
    f'{STATIC} --kd-cache {{teacher}}-outputs': (
        lambda task: Path(task.static_teacher.store.folder).parent.name,
        'teacher.pth-outputs',
    ),
    f'{STATIC} --kd-online-modules': (lambda task: [*task.get_learners().step_loss.online_modules], ['0']),
    '--ema-teacher': (lambda task: task.ema_teacher.config, EmaTeacherConfig(0.2, 0.99, 42)),
    '--ema-teacher --ema-teacher-prob 1': (lambda task: task.ema_teacher.config.prob, 1),
    '--ema-teacher --ema-teacher-momentum 0.5 --seed 7': (
        lambda task: task.ema_teacher.config,
        EmaTeacherConfig(0.2, 0.5, 7),
    ),
    f'{STATIC} --ema-teacher --kd-distill-type kd@2': (
        lambda task: [*task.get_teachers()],
        ['static_', 'ema_teacher_'],
    ),
    f'{STATIC} --distill-loss-weight 0.5': (lambda task: (task.distill_loss_weight, task.task_loss_weight), (0.5, 1)),
    f'{STATIC} --task-loss-weight 0.25': (lambda task: (task.distill_loss_weight, task.task_loss_weight), (0.75, 0.25)),
}
# Which epochs have a dynamic teacher is the run's (tests/test_phases.py); --kd-loss-type has one choice; and what needs
# another student, a file, a second device or an error is in tests/test_teachers_by_command.py.
ELSEWHERE = {
    '--gpd',
    '--gpd-epochs',
    '--kd-loss-type',
    '--kd-class-map',
    '--kd-device',
    '--kd-student-feature-dim',
    '--kd-teacher-feature-dim',
    '--kd-token-distill-type',
}


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save(timm.create_model('test_resnet', num_classes=3, in_chans=1).state_dict(), path)
    return path


def create(flags):
    args = parse_train_args([*SMALL.split(), '--gpd', *flags.split()])
    student = create_student(args)
    set_input(student, resolve_input(args, student))
    return create_task(args, student, torch.device('cpu'))


@pytest.mark.parametrize('flags', FLAGS)
def test_a_flag_arrives(flags, teacher):
    read, value = FLAGS[flags]
    assert read(create(flags.format(teacher=teacher))) == value
    others = '' if flags == STATIC or STATIC not in flags else STATIC
    try:
        without = read(create(others.format(teacher=teacher)))
    except (AttributeError, KeyError):
        return
    assert without != value


def test_no_flag_is_left_out():
    options = {
        option
        for action in train_parser()._actions
        if not isinstance(action, Refused)
        for option in action.option_strings
        if option.startswith(('--gpd', '--kd-', '--ema-teacher', '--adv')) or option.endswith('-loss-weight')
    }
    given = {part for flags in FLAGS for part in flags.split() if part.startswith('--')}
    assert len(options) > 20 and options <= given | ELSEWHERE
