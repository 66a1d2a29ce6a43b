"""What users hand to the scripts: mistakes are answered in one line, and data of their own is read."""

import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from programs import ROOT, run, train
from timm_gpd.training.data.digits import write_digits


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--gpd-ratio', '0'], '--gpd-ratio must be a positive integer'),
        (['--gpd-ratio', '1.5'], 'argument --gpd-ratio: invalid int value'),
        (['--gpd-branches', '-1'], '--gpd-branches must be a positive integer'),
        (['--opt', 'adahessian'], '--opt adahessian needs second derivatives'),
        (['--gpd-loss', 'huber'], 'argument --gpd-loss: invalid choice'),
        (['--model', 'resnet19'], '--model resnet19 is unknown: models of names like it are resnet18'),
        (['--num-classes', '0'], 'no classifier'),
        (['--num-classes', '7'], 'has 10 classes and the model 7'),
        (['--dataset', '', '--data-dir', '/does/not/exist'], 'does not exist: check --data-dir'),
        (['--dataset', '', '--data-dir', 'EMPTY'], "has no folder of the split 'train': it has no folder"),
        (['--digits-train-size', '5'], '--digits-train-size must be between'),
        (['--kd-model-name', 'local-dir:TEACHER7'], 'static teacher has 7 classes'),
        (['--kd-model-name', 'resnet19'], '--kd-model-name resnet19 is unknown'),
        (['--kd-model-name', 'test_resnet', '--kd-model-path', 'missing.pth'], 'checkpoint missing.pth does not exist'),
        (['--kd-model-name', 'test_resnet', '--kd-model-path', 'BROKEN'], 'cannot be read as a checkpoint'),
        (['--kd-model-name', 'test_resnet', '--kd-model-path', 'OTHER'], 'does not fit test_resnet'),
        (['--kd-model-path', 'missing.pth'], '--kd-model-path needs --kd-model-name'),
        (['--kd-distill-type', 'dkd,kdd'], "'kdd' is not a distillation loss: choose of logit, kd, feature, dkd"),
        (['--kd-loss-args', 'beta=2'], "loss argument 'beta' is none"),
        (['--resume', 'missing.pth.tar'], 'does not exist: check --resume'),
        (['--resume', 'OTHER'], 'is no checkpoint of a run'),
        (['--resume', 'BROKEN'], 'cannot be read as a checkpoint'),
        (['--output', '/proc/nothing'], 'cannot write to /proc/nothing'),
        (['--experiment', 'run'], 'holds another run'),
        (['--device', 'cuda:7'], 'device cuda:7 cannot be used'),
        (['-c', 'missing.yaml'], 'config file missing.yaml does not exist'),
        (['--torchcompile', 'nonsense'], '--torchcompile nonsense is unknown: backends are'),
        (['--no-such-flag'], 'unrecognized arguments: --no-such-flag'),
    ],
)
def test_bad_input_is_one_line_and_overwrites_nothing(trained, tmp_path, arguments, message):
    folder, _ = trained
    if 'EMPTY' in arguments:
        (tmp_path / 'empty').mkdir()
    if 'OTHER' in arguments:
        torch.save({'state_dict': timm.create_model('test_efficientnet').state_dict()}, tmp_path / 'other.pth.tar')
    if 'BROKEN' in arguments:
        (tmp_path / 'broken.pth.tar').write_bytes(b'no checkpoint')
    if 'local-dir:TEACHER7' in arguments:
        from timm.models import save_for_hf

        teacher = timm.create_model('test_resnet', num_classes=7, in_chans=1)
        teacher.pretrained_cfg['num_classes'] = 7
        save_for_hf(teacher, str(tmp_path / 'teacher7'), safe_serialization=True)
    replaced = {
        'EMPTY': tmp_path / 'empty',
        'OTHER': tmp_path / 'other.pth.tar',
        'BROKEN': tmp_path / 'broken.pth.tar',
        'local-dir:TEACHER7': f'local-dir:{tmp_path}/teacher7',
    }
    before = files(folder)
    result = train(folder.parent, *(replaced.get(argument, argument) for argument in arguments), code=2)
    (error,) = [line for line in result.stderr.splitlines() if line.startswith('train.py: error: ')]
    assert message in error
    assert 'Traceback' not in result.stderr and result.stderr.splitlines()[-1] == error
    assert files(folder) == before


def test_image_folder_of_the_users_own(tmp_path):
    for split, count in (('train', 8), ('validation', 4)):
        for label in ('cat', 'dog'):
            (tmp_path / 'pets' / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.RandomState(index).randint(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / 'pets' / split / label / f'{index}.png')
    run(
        'train.py',
        tmp_path / 'pets',
        '--model',
        'test_vit_gpd',
        '--gpd',
        '--num-classes',
        '2',
        '--epochs',
        '1',
        '--batch-size',
        '8',
        '--device',
        'cpu',
        '--workers',
        '0',
        '--output',
        tmp_path / 'out',
        '--experiment',
        'pets',
    )
    student = timm.create_model(f'local-dir:{tmp_path}/out/pets/student', pretrained=True)
    assert student(torch.randn(1, 3, 160, 160)).shape == (1, 2)


def test_exit_code_and_one_line_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, os.path.join(ROOT, 'train.py'), '--gpd', '--device', 'cpu', '--output', str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': ROOT})
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == 'train.py: error: no dataset: give --data-dir, or --dataset digits'
    assert 'Traceback' not in result.stderr and not result.stdout


def test_digits_are_stratified_and_written_once(tmp_path):
    folder = write_digits(str(tmp_path), 100, seed=3)
    counts = {
        split: [len(os.listdir(os.path.join(folder, split, str(digit)))) for digit in range(10)]
        for split in ('train', 'validation', 'test')
    }
    assert sum(counts['train']) == 100 and set(counts['train']) <= {9, 10, 11}
    assert (sum(counts['validation']), sum(counts['test'])) == (798, 899)
    image = os.path.join(folder, 'train', '0', os.listdir(os.path.join(folder, 'train', '0'))[0])
    before = os.stat(image).st_mtime_ns
    assert write_digits(str(tmp_path), 100, seed=3) == folder
    assert os.stat(image).st_mtime_ns == before
    assert Image.open(image).size == (8, 8)
    other = write_digits(str(tmp_path), 888, seed=4)
    for digit in map(str, range(10)):
        test = os.listdir(os.path.join(folder, 'test', digit))
        assert sorted(os.listdir(os.path.join(other, 'test', digit))) == sorted(test)  # whatever the seed
        assert not {*test} & {*os.listdir(os.path.join(other, 'train', digit))}
