"""Robust students on the command line: flags, runs, validation under attack, and what is refused."""

import argparse
import json
import math
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from programs import ROOT, differences, run, train
from test_adversarial import GREY, batch, cross_entropy, make_task, plain_task, student
from timm_gpd import GapPreservingTask
from timm_gpd.errors import InputError, UsageError
from timm_gpd.task import create_attack, setup_adversary
from timm_gpd.training.args import parse_train_args, parse_validate_args
from timm_gpd.training.args.adversarial import fraction
from timm_gpd.training.attackers import create_attacker
from timm_gpd.training.student import InputConfig

sys.path.insert(0, f'{ROOT}/benchmarks')
import robust

# -- bad input --------------------------------------------------------------------------------------------------------


def test_an_unknown_normalisation_is_refused():
    model = student()
    model.pretrained_cfg.pop('mean')
    with pytest.raises(InputError, match='does not say how its images are normalised.*give mean and std') as error:
        create_attack(model)
    assert '\n' not in str(error.value)
    with pytest.raises(InputError, match='does not say how its images'):
        create_attack(nn.Conv2d(1, 1, 3))
    assert create_attack(model, mean=[0.1]).mean == (0.1,)
    with pytest.raises(InputError, match='mean has 3 values, and images have 1 channels'):
        create_attack(model, mean=[0.1] * 3)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(kind='cw'), "one of pgd, fgsm, but not 'cw'"),
        (dict(eps=0.0), 'eps of an attack must be above 0'),
        (dict(eps=math.nan), 'must be a finite number'),
        (dict(step=2), 'step of an attack must be above 0 and at most 1'),
        (dict(steps=0), 'an integer of at least 1'),
        (dict(steps=2.5), 'an integer of at least 1'),
    ],
)
def test_arguments_of_an_attack(arguments, message):
    with pytest.raises(InputError, match=message):
        create_attack(student(), **arguments)


def test_what_tasks_refuse():
    task = make_task('gpd')
    with pytest.raises(InputError, match='has an adversary already'):
        setup_adversary(task, create_attack(student()))
    attack, images = create_attack(student()), batch()
    for options in (dict(gpd_loss='adaad'), dict(static_teacher=student(3), distill_type='dgad')):
        nested = GapPreservingTask(student(), ratio=3, method='sandwich', verbose=False, **options)
        with pytest.raises(InputError, match='ratios between learn from one view'):
            setup_adversary(nested, attack)
    for task in (plain_task('gpd by dgad'), plain_task('static')):
        with pytest.raises(InputError, match=r'call setup_adversary\(task, attack\)'):
            task(*images)


def test_ratios_between_learn_from_perturbed_images():
    task = GapPreservingTask(student(), ratio=3, method='sandwich', verbose=False).train()
    setup_adversary(task, create_attack(student(), steps=1))
    result = task(*batch())
    result['loss'].backward()
    assert result['between_loss'] > 0


STATIC = ['--kd-model-name', 'resnet18', '--kd-distill-type']


@pytest.mark.parametrize(
    'arguments, message',
    [
        (
            ['--gpd', '--gpd-loss', 'igdm'],
            '--gpd-loss igdm compares images that an attack has perturbed: add --adv pgd',
        ),
        ([*STATIC, 'kd,dgad'], '--kd-distill-type dgad compares images'),
        (['--adv', 'pgd', '--task', 'multilabel'], 'leave out --task multilabel'),
        (['--adv', 'pgd', '--aug-splits', '3'], '--aug-splits makes several'),
        (['--adv', 'pgd', '--kd-model-name', 'resnet18', '--kd-cache', 'outputs'], 'perturbed ones do not'),
        (['--adv', 'pgd', '--kd-model-name', 'resnet18', '--kd-online-modules'], 'leave out one of them'),
        (['--adv', 'pgd', '--model-dtype', 'bfloat16'], 'take --amp instead'),
        (['--adv', 'pgd', '--mixup', '0.2', *STATIC, 'dgad'], '--mixup and --cutmix make it of two'),
        (
            ['--adv', 'pgd', '--gpd', '--gpd-method', 'sandwich', '--gpd-ratio', '3', *STATIC, 'igdm'],
            'take --gpd-method joint, or another loss',
        ),
        (['--adv', 'cw'], 'invalid choice'),
        (['--adv', 'pgd', '--adv-eps', '8/0'], 'invalid fraction value'),
        (['--adv', 'pgd', '--adv-eps', '0'], '--adv-eps must be above 0'),
        (['--adv', 'pgd', '--adv-steps', '0'], '--adv-steps must be a positive integer'),
    ],
)
def test_what_does_not_go_with_an_attack_is_one_line(arguments, message):
    with pytest.raises(UsageError) as error:
        parse_train_args(arguments)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_what_does_nothing_is_warned_about(caplog):
    parse_train_args(['--adv-eps', '4/255'])
    parse_train_args(['--adv', 'fgsm', '--adv-steps', '3'])
    assert '--adv-eps does nothing without --adv' in caplog.text
    assert '--adv-steps does nothing with --adv fgsm' in caplog.text


def test_fractions_are_read(tmp_path):
    assert fraction('8/255') == 8 / 255 and fraction('0.25') == fraction(0.25) == 0.25
    (tmp_path / 'config.yaml').write_text('adv: pgd\nadv_eps: 4/255\nadv_step: 0.01\n')
    args = parse_train_args(['--config', str(tmp_path / 'config.yaml')])
    assert (args.adv, args.adv_eps, args.adv_step) == ('pgd', 4 / 255, 0.01)


# -- programs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def left_alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp('alone') / 'runs'
    train(folder, *RUN, '--experiment', 'run')
    return folder / 'run'


RUN = '--adv pgd --adv-steps 2 --adv-eps 32/255 --gpd-loss dgad --drop-path 0.2 -b 50'.split()


def test_a_resumed_run_repeats_its_attacks_bit_for_bit(left_alone, tmp_path):
    train(tmp_path / 'runs', *RUN, '--experiment', 'run', '--stop-epoch', '1')
    train(tmp_path / 'runs', *RUN, '--experiment', 'run', '--resume', 'auto')
    assert not differences(tmp_path / 'runs' / 'run', left_alone)


def validate(folder, *arguments, **kwargs):
    data = ['--dataset', 'digits', '--data-dir', folder.parent.parent / 'data', '--digits-train-size', '100']
    model = ['--model', f'local-dir:{folder}/student', '--pretrained', *data, '--device', 'cpu', '--workers', '0']
    result = run('validate.py', *model, *arguments, **kwargs)
    return json.loads(result.stdout.partition('--result\n')[2]) if result.stdout else result.stderr


def test_validation_under_attack(left_alone):
    clean = validate(left_alone)
    weak, strong = (validate(left_alone, '--adv', 'pgd', '--adv-eps', eps) for eps in ('1/255', '64/255'))
    for found in (weak, strong):
        assert {name: found[name] for name in clean} == clean
    assert clean['loss'] <= weak['robust_loss'] < strong['robust_loss']
    assert strong['robust_top1'] <= weak['robust_top1'] <= clean['top1']
    twice = validate(left_alone, '--adv', 'pgd', '--adv-eps', '64/255')
    assert twice == strong
    steps = validate(left_alone, '--adv', 'fgsm', '--adv-eps', '1/255')
    assert steps['robust_loss'] >= clean['loss']


def test_validation_refuses_what_nobody_says_and_what_is_not_there(left_alone, tmp_path):
    error = validate(left_alone, '--adv', 'pgd', '--adv-package', 'torchattacks', code=2) if not installed() else ''
    assert not error or '--adv-package torchattacks is not installed' in error.splitlines()[-1]
    with pytest.raises(UsageError, match='--adv-package says who attacks: add --adv'):
        parse_validate_args(['--adv-package', 'torchattacks'])
    with pytest.raises(UsageError, match='--valid-labels are others'):
        parse_validate_args(['--adv', 'pgd', '--valid-labels', __file__])
    model = student()
    args = parse_validate_args(['--adv', 'pgd', '--model', 'test_resnet'])
    assert create_attacker(args, model, InputConfig((1, 32, 32), interpolation='', crop_pct=1.0, **GREY)) is not None
    model.pretrained_cfg.pop('std')
    with pytest.raises(UsageError, match='does not say by which std its images are normalised.*give --std'):
        create_attacker(args, model, InputConfig((1, 32, 32), interpolation='', crop_pct=1.0, **GREY))


def installed():
    return find_spec('torchattacks') is not None


class StandIn:
    """What packages of attacks look like: pixels in, pixels out, by one step of the sign."""

    def __init__(self, model, eps, **rest):
        self.model, self.eps, self.rest = model, eps, rest

    def __call__(self, pixels, target):
        assert 0 <= pixels.min() and pixels.max() <= 1
        wanted = pixels.clone().requires_grad_()
        F.cross_entropy(self.model(wanted), target).backward()
        return (pixels + self.eps * wanted.grad.sign()).clamp(0, 1)

    def run_standard_evaluation(self, pixels, target, bs):
        return self(pixels, target)


@pytest.mark.parametrize('name', ['torchattacks', 'autoattack'])
def test_other_packages_attack_pixels(name, monkeypatch):
    classes = dict(PGD=StandIn, FGSM=StandIn) if name == 'torchattacks' else {}
    package = ModuleType(name)
    vars(package).update(AutoAttack=StandIn, **classes)
    monkeypatch.setitem(sys.modules, name, package)
    args = parse_validate_args(['--adv', 'fgsm', '--adv-package', name, '--model', 'test_resnet'])
    model, (images, target) = student().eval(), batch()
    config = InputConfig((1, 32, 32), interpolation='', crop_pct=1.0, **GREY)
    other = create_attacker(args, model, config)(model, images, target)
    ours = create_attacker(argparse.Namespace(**{**vars(args), 'adv_package': None}), model, config)
    # Where a gradient is next to nothing its sign is chance.
    assert ((other - ours(model, images, target)).abs() < 1e-5).double().mean() > 0.999


def test_pgd_of_torchattacks_agrees():
    """To the per cent, where it is installed."""
    torchattacks = pytest.importorskip('torchattacks')
    model, (images, target) = student().eval(), batch(100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):  # until it knows some of them by heart
        optimizer.zero_grad()
        F.cross_entropy(model(images), target).backward()
        optimizer.step()
    attack = create_attack(model, eps=2 / 255, step=0.5 / 255, steps=20)
    other = torchattacks.PGD(model, eps=2 / 255, alpha=0.5 / 255, steps=20)
    other.set_normalization_used(mean=[0.5], std=[0.25])
    losses = [
        F.cross_entropy(model(x), target) for x in (attack(cross_entropy(model, target), images), other(images, target))
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.01)


def test_the_benchmark_makes_a_table():
    def record(way, seed, robust_top1):
        return dict(way=way, seed=seed, top1=90.0 + seed, robust_top1=robust_top1, processor_seconds=10.0)

    lines = [
        record('adversarial', 0, 50.0),
        record('adversarial', 1, 60.0),
        record('dgad', 0, 53.0),
        record('dgad', 1, 61.0),
    ]
    table = robust.report({(line['way'], line['seed']): line for line in lines}).splitlines()
    assert table[2:] == [
        '| adversarial | 2 | 90.5 ± 0.7 | 55.0 ± 7.1 |  | 10 |',
        '| dgad | 2 | 90.5 ± 0.7 | 57.0 ± 5.7 | +2.0 ± 1.4 | 10 |',
    ]
