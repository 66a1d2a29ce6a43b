"""Bad input is one line; a bug keeps its traceback and asks for a report."""

import errno
import json
import re

import pytest
import timm
import torch

from programs import run, train
from timm_gpd import plan_expansion
from timm_gpd.command_line import run_program
from timm_gpd.errors import InputError, UsageError, first_line, is_bug, usage_errors
from timm_gpd.student_folder import read_metrics
from timm_gpd.teacher.parameter_layout import ParameterLayout
from timm_gpd.version import __version__

VERSIONS = f'timm-gpd {__version__}, timm {timm.__version__}, torch {torch.__version__}'


def digits(folder):
    return ('--dataset', 'digits', '--data-dir', folder / 'data', '--device', 'cpu', '--workers', '0')


@pytest.mark.parametrize(
    'arguments, broken',
    [
        (('train.py', '--gpd', '--epochs', '1'), 'timm_gpd.teacher.inverse_reparameterization.verify_plan'),
        (('train.py', '--gpd', '--epochs', '1'), 'timm_gpd.expansion.planner.dry_run'),
        (('train.py', '--kd-model-name', 'test_resnet'), 'timm_gpd.task.distillation.create_static_teacher'),
        (('validate.py', '--model-kwargs', 'gpd_ratio=2', '--checkpoint', __file__), 'timm_gpd.models.variants.expand'),
    ],
)
def test_a_bug_is_not_presented_as_bad_input(arguments, broken, tmp_path, monkeypatch):
    monkeypatch.setattr(broken, None)  # whoever calls it raises a TypeError, which timm raises of wrong arguments too
    program, *flags = arguments
    output = ('--output', tmp_path) if program == 'train.py' else ()
    result = run(
        program, '--model', 'test_resnet_gpd', '--num-classes', '10', *flags, *digits(tmp_path), *output, code=1
    )
    *_, error, report = result.stderr.splitlines()
    assert 'Traceback' in result.stderr and error == "TypeError: 'NoneType' object is not callable"
    assert report.startswith(f'{program}: error: ') and 'please report' in report and VERSIONS in report


class SafetensorError(Exception):
    """As safetensors raises it: no OSError."""


@pytest.mark.parametrize(
    'place, error',
    [
        ('timm_gpd.training.report.run_folder.yaml.safe_dump', OSError(errno.ENOSPC, 'No space left on device')),
        ('timm_gpd.training.report.summary.write_csv', OSError(errno.EDQUOT, 'Disk quota exceeded')),
        ('timm_gpd.training.report.run_folder.save_student', SafetensorError('Error: No space left on device')),
    ],
)
def test_a_full_disk_is_no_bug_whatever_is_written(place, error, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(place, fail)
    result = train(tmp_path, '--experiment', 'run', '--epochs', '1', config='digits', code=2)
    reason = result.stderr.splitlines()[-1]
    assert re.match('train.py: error: (No space left on device|Disk quota exceeded): .* make room', reason), reason
    assert 'Traceback' not in result.stderr


def test_ctrl_c_is_no_bug(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert run_program('validate.py', interrupted) == 130
    assert capsys.readouterr().err == 'validate.py: interrupted\n'


@pytest.mark.parametrize(
    'flags, message',
    [
        (('--gpd-ratio', '0', '--gpd'), 'ratio must be a positive integer'),
        (('--gpd-branches', '9', '--gpd'), '--gpd-branches must be a positive integer of at most 6'),
        (('--gpd-noise', '-1', '--gpd'), 'noise must be at least 0'),
        (('--kd-model-name', 'no_such_model'), 'no_such_model'),
        (('--kd-model-name', 'local-dir:no/such/folder'), 'no/such/folder'),
        (('--mean', '0.5', '0.5'), '--mean has 2 values, and images have 3 channels'),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path):
    result = run(
        'train.py',
        '--model',
        'test_resnet',
        '--num-classes',
        '10',
        *flags,
        *digits(tmp_path),
        '--output',
        tmp_path,
        code=2,
    )
    assert message in result.stderr.splitlines()[-1] and 'Traceback' not in result.stderr


def raised_by(function, *args):
    try:
        function(*args)
    except Exception as error:
        return error


def test_which_errors_are_bugs():
    """Those that come out of a line of the package, and that it has no name for."""
    assert not is_bug(raised_by(int, 'x'))
    assert not is_bug(raised_by(first_line)), 'called with wrong arguments, which is of the line that calls'
    assert is_bug(raised_by(read_metrics, None)) is False, 'os.path refuses the name'
    assert is_bug(raised_by(ParameterLayout.of, None))
    assert not is_bug(raised_by(plan_expansion, torch.nn.Identity()))
    with pytest.raises(UsageError, match=r'^too small by far \(try more\)$'), usage_errors('try more'):
        raise InputError('too small\nby far')
    with pytest.raises(UsageError, match='invalid literal'), usage_errors('try more', ValueError):
        int('x')
    with pytest.raises(ValueError, match='invalid literal') as error, usage_errors('try more'):
        int('x')
    assert not isinstance(error.value, UsageError)


def test_validation_of_a_dynamic_teacher(tmp_path):
    """It starts as the student's function, on the student's images."""
    student = timm.create_model('test_vit', num_classes=10, img_size=32)
    torch.save(student.state_dict(), tmp_path / 'student.pth')
    results = []
    for flags in (('img_size=32',), ('img_size=32', 'gpd_ratio=2')):
        result = run(
            'validate.py',
            '--model',
            'test_vit_gpd',
            '--num-classes',
            '10',
            '--img-size',
            '32',
            '--batch-size',
            '64',
            '--digits-train-size',
            '800',
            '--checkpoint',
            tmp_path / 'student.pth',
            '--model-kwargs',
            *flags,
            *digits(tmp_path),
        )
        results.append(json.loads(result.stdout.partition('--result\n')[2]))
    plain, teacher = results
    assert teacher['param_count'] > 3 * plain['param_count'] and teacher['img_size'] == plain['img_size'] == 32
    assert teacher['top1'] == pytest.approx(plain['top1'], abs=0.5)
    assert teacher['loss'] == pytest.approx(plain['loss'], rel=1e-3)
