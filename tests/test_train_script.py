"""The scripts, run as a user runs them."""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from PIL import Image

from programs import run, summary, train
from timm_gpd.private_torch import compiles_writing_operators, keeps_compiled_layouts
from timm_gpd.teacher import merge, shared_tensors
from timm_gpd.training.args import parse_train_args, train_parser


def weights(folder, key='state_dict'):
    """The student in the last checkpoint of a run."""
    return torch.load(folder / 'last.pth.tar', weights_only=False)[key]


def difference(state_dict, expected):
    """Largest relative difference between two students' tensors."""
    assert list(state_dict) == list(expected)
    return max(
        ((state_dict[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-12)).item()
        for name, tensor in expected.items()
    )


def test_a_run_leaves_what_it_takes_to_repeat_it(trained):
    folder, result = trained
    rows = summary(folder)
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert float(rows[-1]['eval_gap']) == pytest.approx(
        float(rows[-1]['eval_teacher_top1']) - float(rows[-1]['eval_top1'])
    )
    assert {'train_loss', 'train_gpd_loss', 'eval_loss', 'eval_top5', 'lr'} <= rows[0].keys()
    with open(folder / 'args.yaml') as file:
        args = yaml.safe_load(file)
    assert args['seed'] == 42 and args['gpd_noise'] == 0.1 and args['dataset'] == 'digits'
    assert args['versions']['timm'] == timm.__version__
    assert Image.open(folder / 'gap.png').size[0] > 400
    assert (folder / 'model_best.pth.tar').exists() and (folder / 'last.pth.tar').exists()
    assert 'Train: 0 [   0/2' in result.stderr and 'Test (teacher): ' in result.stderr and 'Acc@1' in result.stderr
    results = json.loads(result.stdout.split('--result\n')[1])
    assert {round(row['validation']['top1'], 6) for row in results} == {
        round(float(row['eval_top1']), 6) for row in rows
    }


def test_its_args_repeat_it(trained, tmp_path):
    folder, _ = trained
    run('train.py', '-c', folder / 'args.yaml', '--output', tmp_path, '--experiment', 'again')
    assert [row['eval_top1'] for row in summary(tmp_path / 'again')] == [row['eval_top1'] for row in summary(folder)]
    first, second = (torch.load(path / 'last.pth.tar', weights_only=False) for path in (folder, tmp_path / 'again'))
    assert all(torch.equal(first['state_dict'][name], second['state_dict'][name]) for name in first['state_dict'])


def test_plain_timm_loads_the_student(trained):
    folder, _ = trained
    code = (
        f'import sys, timm; student = timm.create_model("local-dir:{folder}/student", pretrained=True); '
        'assert "timm_gpd" not in sys.modules; print(type(student).__name__, student.num_classes, '
        'tuple(student.pretrained_cfg["input_size"]))'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd='/')
    assert result.stdout.split() == ['ResNet', '10', '(1,', '32,', '32)'], result.stderr
    checkpoint = torch.load(folder / 'last.pth.tar', weights_only=False)
    student = timm.create_model(f'local-dir:{folder}/student', pretrained=True)
    assert all(torch.equal(checkpoint['state_dict'][name], tensor) for name, tensor in student.state_dict().items())
    assert sorted(os.listdir(folder / 'student')) == ['README.md', 'config.json', 'gap.png', 'model.safetensors']
    card = (folder / 'student' / 'README.md').read_text()
    assert 'library_name: timm' in card and 'dynamic teacher of ratio 2' in card
    assert f'{float(summary(folder)[-1]["eval_top1"]):.2f}' in card


def test_validate_agrees_with_training(trained, tmp_path):
    folder, _ = trained
    data = [
        '--dataset',
        'digits',
        '--digits-train-size',
        '100',
        '--data-dir',
        folder.parent.parent / 'data',
        '--device',
        'cpu',
        '--workers',
        '0',
        '--results-file',
        tmp_path / 'results.json',
        '--results-format',
        'json',
    ]
    run('validate.py', '--model', f'local-dir:{folder}/student', '--pretrained', *data)
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['top1'] == pytest.approx(float(summary(folder)[-1]['eval_top1']), abs=1e-4)


def test_gpd_name_and_flag_mean_the_same(tmp_path):
    train(tmp_path, '--epochs', '1', '--experiment', 'flag')
    train(tmp_path, '--epochs', '1', '--experiment', 'name', '--model', 'test_resnet_gpd')
    assert summary(tmp_path / 'flag') == summary(tmp_path / 'name')


@pytest.mark.parametrize('config, branches, losses', [('digits', 1, None), ('digits_gpd', 3, 'dkd')])
def test_a_compiled_run_trains_the_same_student(trained, tmp_path, config, branches, losses, monkeypatch):
    """To 1e-4; a learning rate that is higher by 0.1 % makes a difference of 0.1 and more."""
    folder, _ = trained
    if not compiles_writing_operators():  # both on the same operators: four updates make rounding 1e-2
        monkeypatch.setattr(merge, 'needs_plain_operators', lambda: True)
        monkeypatch.setattr(shared_tensors, 'needs_plain_operators', lambda: True)
    arguments = ['--gpd-branches', branches]
    if losses:
        arguments += ['--kd-model-name', f'local-dir:{folder}/student', '--kd-distill-type', losses]
    torch._dynamo.reset()
    train(tmp_path, '--experiment', 'eager', *arguments, config=config)
    train(tmp_path, '--experiment', 'compiled', '--torchcompile', 'aot_eager', *arguments, config=config)
    assert difference(weights(tmp_path / 'compiled'), weights(tmp_path / 'eager')) < 1e-4
    for row, expected in zip(summary(tmp_path / 'compiled'), summary(tmp_path / 'eager'), strict=True):
        assert row.keys() == expected.keys()
        assert all(float(row[name]) == pytest.approx(float(expected[name]), rel=1e-4) for name in row)


def test_plain_run_with_a_static_teacher_and_without(trained, tmp_path):
    folder, _ = trained
    train(tmp_path, '--experiment', 'plain', '--epochs', '1', config='digits')
    row = summary(tmp_path / 'plain')[0]
    assert 'eval_teacher_top1' not in row and 'eval_static_top1' not in row
    teacher = f'local-dir:{folder}/student'
    train(tmp_path, '--experiment', 'kd', '--epochs', '1', '--kd-model-name', teacher, config='digits')
    assert float(summary(tmp_path / 'kd')[0]['eval_static_top1']) == pytest.approx(
        float(summary(folder)[-1]['eval_top1']), abs=1e-4
    )
    train(tmp_path, '--experiment', 'gpd', '--epochs', '1', '--kd-model-name', teacher)
    assert {'train_kd/logit', 'train_teacher_kd/logit', 'eval_static_top1'} <= summary(tmp_path / 'gpd')[0].keys()


def test_several_losses_with_their_arguments(trained, tmp_path):
    folder, _ = trained
    losses = [
        '--epochs',
        '1',
        '--kd-model-name',
        f'local-dir:{folder}/student',
        '--kd-distill-type',
        'dkd,reviewkd',
        '--kd-loss-args',
        'beta=2',
        'reviewkd.weight=0.5',
    ]
    train(tmp_path, '--experiment', 'alone', *losses, config='digits')
    train(tmp_path, '--experiment', 'gpd', *losses)
    terms = {'train_kd/dkd', 'train_kd/reviewkd'}
    assert {key for key in summary(tmp_path / 'alone')[0] if '/' in key} == terms
    assert {key for key in summary(tmp_path / 'gpd')[0] if '/' in key} == terms | {
        'train_teacher_kd/dkd',
        'train_teacher_kd/reviewkd',
    }
    for run_, kinds in (('alone', ('',)), ('gpd', ('', 'teacher_'))):
        row = {key: float(value) for key, value in summary(tmp_path / run_)[0].items() if value}
        parts = [row[f'train_{kind}{term}'] for kind in kinds for term in ('task_loss', 'kd/dkd', 'kd/reviewkd')]
        assert row['train_loss'] == pytest.approx(sum(parts) + 3 * row.get('train_gpd_loss', 0), rel=1e-5)
        assert all(part > 0 for part in parts)
        checkpoint = torch.load(tmp_path / run_ / 'last.pth.tar', weights_only=False)
        assert checkpoint['task_state']['settings']['distillers'] == {'dkd': {'beta': 2}, 'reviewkd': {'weight': 0.5}}
        student = timm.create_model(f'local-dir:{tmp_path}/{run_}/student', pretrained=True)
        assert checkpoint['state_dict'].keys() == student.state_dict().keys()


def test_a_loss_that_diverges_is_named(trained, tmp_path):
    folder, _ = trained
    result = train(
        tmp_path,
        '--experiment',
        'nan',
        '--lr',
        '1e30',
        '--kd-model-name',
        f'local-dir:{folder}/student',
        '--kd-distill-type',
        'dkd',
        '--warmup-epochs',
        '0',
        config='digits',
        code=3,
    )
    error = result.stderr.splitlines()[-1]
    assert error.startswith('train.py: error: epoch 0, update 1, learning rate 8.54e+29: ')
    assert 'kd/dkd is nan' in error and 'lower the learning rate' in error
    assert 'Traceback' not in result.stderr and not (tmp_path / 'nan' / 'last.pth.tar').exists()


# One step an epoch on the same images, so that nothing depends on their order.
ONE_STEP = ['--digits-train-size', '50', '--no-aug', '--sched', 'step', '--decay-epochs', '100', '--lr', '0.02']


@pytest.mark.parametrize('config', ['digits', 'digits_gpd'])
def test_a_moving_average_is_what_is_validated_and_kept(tmp_path, config):
    train(
        tmp_path,
        '--experiment',
        'run',
        *ONE_STEP,
        '--checkpoint-hist',
        '2',
        '--model-ema',
        '--model-ema-decay',
        '0.75',
        config=config,
    )
    first, second = (
        torch.load(tmp_path / 'run' / f'checkpoint-{epoch}.pth.tar', weights_only=False) for epoch in (0, 1)
    )
    expected = {
        name: 0.75 * average + 0.25 * second['state_dict'][name]
        for name, average in first['state_dict_ema'].items()
        if average.is_floating_point()
    }
    averaged = {name: second['state_dict_ema'][name] for name in expected}
    assert difference(averaged, expected) < 1e-5
    assert difference(averaged, {name: second['state_dict'][name] for name in expected}) > 1e-2
    student = timm.create_model(f'local-dir:{tmp_path}/run/student', pretrained=True)
    assert difference(student.state_dict(), second['state_dict_ema']) == 0
    data = [
        '--dataset',
        'digits',
        '--digits-train-size',
        '50',
        '--data-dir',
        tmp_path.parent / 'data',
        '--device',
        'cpu',
        '--workers',
        '0',
        '--results-file',
        tmp_path / 'results.json',
        '--results-format',
        'json',
    ]
    run('validate.py', '--model', f'local-dir:{tmp_path}/run/student', '--pretrained', *data)
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['loss'] == pytest.approx(float(summary(tmp_path / 'run')[-1]['eval_loss']), rel=1e-4)


def test_the_rest_of_the_recipe(tmp_path):
    """Together, for one epoch; the values of each are checked in tests of their own."""
    train(
        tmp_path,
        '--experiment',
        'all',
        '--epochs',
        '1',
        '--mixup',
        '0.2',
        '--cutmix',
        '1.0',
        '--model-ema',
        '--grad-accum-steps',
        '2',
        '--clip-grad',
        '1.0',
        '--amp',
        '--amp-dtype',
        'bfloat16',
        '--channels-last',
        '--opt',
        'adamw',
        '--lr',
        '1e-3',
        '--gpd-ratio',
        '3',
        '--gpd-scale',
        'teacher',
        '--gpd-loss',
        'kl',
        '--workers',
        '1',
    )
    last = torch.load(tmp_path / 'all' / 'last.pth.tar', weights_only=False)
    assert last['task_state']['settings'] == dict(ratio=3, branches=['kxk'], scale='teacher')
    # Two batches in one update.
    assert {state['step'].item() for state in last['optimizer']['state'].values()} == {1}
    (row,) = summary(tmp_path / 'all')
    assert float(row['train_loss']) == pytest.approx(
        sum(
            weight * float(row[f'train_{term}'])
            for term, weight in (('task_loss', 1), ('teacher_task_loss', 1), ('gpd_loss', 3))
        ),
        rel=1e-2,
    )


@pytest.mark.parametrize('config', ['digits', 'digits_gpd'])
def test_a_resumed_run_is_the_run_that_went_on(tmp_path, config):
    """Student, average and optimizer: a run of two and two epochs ends where one of four does."""
    arguments = [*ONE_STEP, '--model-ema', '--model-ema-decay', '0.5']
    checkpoint = tmp_path / 'parts' / 'last.pth.tar'
    train(tmp_path, '--experiment', 'whole', *arguments, '--epochs', '4', config=config)
    train(tmp_path, '--experiment', 'parts', *arguments, config=config)
    train(
        tmp_path,
        '--experiment',
        'without',
        *arguments,
        '--epochs',
        '4',
        '--resume',
        checkpoint,
        '--no-resume-opt',
        config=config,
    )
    train(tmp_path, '--experiment', 'parts', *arguments, '--epochs', '4', '--resume', checkpoint, config=config)
    assert [row['epoch'] for row in summary(tmp_path / 'parts')] == ['0', '1', '2', '3']
    for row, expected in zip(summary(tmp_path / 'parts'), summary(tmp_path / 'whole'), strict=True):
        assert float(row['train_loss']) == pytest.approx(float(expected['train_loss']), rel=1e-4)
    for key in ('state_dict', 'state_dict_ema'):
        expected = weights(tmp_path / 'whole', key)
        assert difference(weights(tmp_path / 'parts', key), expected) < 1e-4
        assert difference(weights(tmp_path / 'without', key), expected) > 1e-2  # the optimizer's momentum counts


def test_the_command_is_noted_as_it_was_given(tmp_path):
    """What the run makes of it, classes, data folder and learning rate, stands in neither args.yaml nor checkpoint.

    A checkpoint says what other arguments mean, as one of timm's does: here the loss.
    """
    command = [
        '--dataset',
        'digits',
        '--data-dir',
        tmp_path.parent / 'data',
        '--model',
        'test_resnet',
        '--model-kwargs',
        'channels=[4,4,4,4]',
        'stem_width=2',
        '--input-size',
        '1',
        '32',
        '32',
        '--bce-loss',
        '--device',
        'cpu',
        '-j',
        '0',
        '-b',
        '50',
        '--digits-train-size',
        '50',
        '--epochs',
        '1',
        '--output',
        tmp_path,
        '--experiment',
        'run',
    ]
    run('train.py', *command)
    command = [str(argument) for argument in command]
    given = vars(train_parser().parse_args(command))
    assert [given[name] for name in ('loss', 'num_classes', 'lr', 'dataset')] == [None, None, None, 'digits']
    noted = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    assert noted.pop('versions').keys() == {'timm', 'timm_gpd', 'torch'} and noted == given
    checkpoint = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)
    assert type(checkpoint['args']) is argparse.Namespace
    assert vars(checkpoint['args']) == vars(parse_train_args(command))
    assert checkpoint['args'].loss == 'bce'
    assert checkpoint['state_dict']['fc.bias'].shape == (1000,)  # the architecture's own number of classes
    assert checkpoint['optimizer']['param_groups'][0]['initial_lr'] == pytest.approx(0.1 * 50 / 256)


def test_a_run_leaves_the_process_as_it_was(tmp_path):
    def switches():
        return (torch.full((8,), 1e-20) * 1e-20).count_nonzero().item(), keeps_compiled_layouts()

    before = switches()
    train(tmp_path, '--experiment', 'run', '--epochs', '1', '--workers', '1', config='digits')
    assert multiprocessing.active_children() == []  # a garbage collector that ends them waits for them
    train(tmp_path, '--experiment', 'bad', '--num-classes', '7', code=2, config='digits')
    assert switches() == before == (8, False)
