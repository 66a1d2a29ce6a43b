"""Static teachers as commands name them."""

import math

import pytest
import torch

from programs import summary, train
from teachers import make_student, make_teacher, make_token_student
from timm_gpd import StaticTeacherConfig
from timm_gpd.errors import UsageError
from timm_gpd.training.args import parse_train_args
from timm_gpd.training.static_teachers import read_static_teachers
from timm_gpd.training.task import check_task, create_task


def test_a_run_with_several(tmp_path):
    """Each of its own kind: a folder of an earlier run, and a file of 30 classes for larger images, in bfloat16."""
    train(tmp_path, '--experiment', 'first', '--epochs', '1', config='digits')
    folder = f'local-dir:{tmp_path / "first" / "student"}'
    torch.save(make_teacher('test_vit', num_classes=30, img_size=48).state_dict(), tmp_path / 'teacher.pth')
    (tmp_path / 'classes.txt').write_text(''.join(f'{index} {index + 10}\n' for index in range(10)))
    flags = [
        *('--kd-model-name', f'{folder},test_vit', '--kd-model-path', f',{tmp_path / "teacher.pth"}'),
        *('--kd-img-size', ',48', '--kd-class-map', f',{tmp_path / "classes.txt"}', '--kd-dtype', ',bfloat16'),
        *('--kd-device', 'cpu', '--kd-distill-type', 'kd,dkd@1,reviewkd@2', '--kd-loss-args', 'reviewkd@2.weight=0.1'),
        *('--kd-teacher-feature-dim', '64', '--model-ema'),
    ]
    result = train(tmp_path, '--experiment', 'run', '--gpd-epochs', '1-3', '--epochs', '3', *flags)
    assert 'the static teacher test_vit expects mean (0.5) and' not in result.stderr
    rows = summary(tmp_path / 'run')
    for name in ('kd', 'dkd@1', 'reviewkd@2'):
        assert all(math.isfinite(float(row[f'train_kd/{name}'])) for row in rows)
        assert math.isfinite(float(rows[-1][f'train_teacher_kd/{name}']))
    assert {row['eval_static_top1'] for row in rows} == {rows[0]['eval_static_top1']}

    alone = train(tmp_path, '--experiment', 'alone', '--epochs', '2', *flags, config='digits')
    assert 'teacher_' not in ' '.join(summary(tmp_path / 'alone')[0]) and alone
    resumed = train(tmp_path, '--experiment', 'alone', '--epochs', '3', '--resume', 'auto', *flags, config='digits')
    assert len(summary(tmp_path / 'alone')) == 3 and resumed
    card = (tmp_path / 'run' / 'student' / 'README.md').read_text()
    assert str(tmp_path) not in card and '`student,test_vit`' in card


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--kd-model-name resnet18,', '--kd-model-name resnet18, has a name that is empty'),
        ('--kd-model-name resnet18,resnet19x', '--kd-model-name resnet19x is unknown'),
        ('--kd-model-name resnet18 --kd-img-size 0', '--kd-img-size must be a positive integer, but is 0'),
        ('--kd-model-name resnet18 --kd-img-size small', '--kd-img-size must be a positive integer, but is small'),
        ('--kd-model-name resnet18 --kd-img-size 32,64', '--kd-img-size has 2 values and --kd-model-name 1 teachers'),
        ('--kd-model-name resnet18,resnet34 --kd-model-path a', '--kd-model-path has 1 values and --kd-model-name 2'),
        ('--kd-model-name resnet18 --kd-dtype int8', '--kd-dtype int8 is unknown: dtypes are float32, float16, bfl'),
        ('--kd-model-name resnet18 --kd-device gpu', '--kd-device gpu is no device'),
        ('--kd-model-name resnet18 --kd-class-map missing', '--kd-class-map missing cannot be read: No such file'),
        ('--kd-model-name resnet18 --kd-class-map MAP', "MAP, line 2: 'cat' is not the number of a class"),
        ('--kd-model-name resnet18,resnet34 --kd-distill-type at', 'at compares features, of which 2 static teachers'),
        ('--kd-model-name resnet18 --kd-distill-type kd@1', 'there is one: it is kd (check --kd-distill-type'),
        ('--kd-model-name resnet18 --kd-token-distill-type hard', '--kd-token-distill-type hard is of the loss token'),
        ('--kd-model-name a/b,c/d --task multilabel --kd-distill-type at@1', 'validated by the mean of their probabil'),
        ('--kd-model-name resnet18 --task multilabel --kd-distill-type token', '--kd-distill-type token compares'),
        ('--kd-model-path a', '--kd-model-path needs --kd-model-name'),
    ],
)
def test_flags_that_are_none_are_answered_before_anything_is_created(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'MAP').write_text('1\ncat\n')
    with pytest.raises(UsageError) as error:
        check_task(parse_train_args(['--data-dir', 'x', *flags.split()]))
    assert message in str(error.value) and '\n' not in str(error.value)


def test_every_flag_reaches_the_teacher(tmp_path):
    (tmp_path / 'classes.txt').write_text('3\n1 2\n')
    flags = f'--kd-model-name a/b,c/d --kd-model-path ,w.pth --kd-img-size 64,32 --kd-class-map ,{tmp_path}/classes.txt'
    given = parse_train_args([*flags.split(), '--kd-dtype', 'bfloat16,', '--kd-device', 'cpu'])
    cpu = torch.device('cpu')
    assert read_static_teachers(given) == [
        StaticTeacherConfig('a/b', img_size=64, device=cpu, dtype=torch.bfloat16),
        StaticTeacherConfig('c/d', path='w.pth', img_size=32, class_map=[[3], [1, 2]], device=cpu),
    ]
    assert read_static_teachers(parse_train_args(['--kd-model-name', 'a/b', '--kd-model-path', 'x,y.pth'])) == [
        StaticTeacherConfig('a/b', path='x,y.pth')
    ]
    assert read_static_teachers(parse_train_args([])) == []


@pytest.mark.parametrize('gpd', [[], ['--gpd']])
def test_every_flag_reaches_the_losses(gpd, tmp_path):
    torch.save(make_teacher().state_dict(), tmp_path / 'teacher.pth')
    named = ['--kd-model-name', 'test_resnet', '--kd-model-path', str(tmp_path / 'teacher.pth'), *gpd]
    flags = ['--kd-distill-type', 'token', '--kd-token-distill-type', 'hard', '--kd-temperature', '3']
    task = create_task(parse_train_args([*named, *flags]), make_token_student(), torch.device('cpu'))
    assert task.settings['distillers'] == {'token': {'kind': 'hard', 'temperature': 3}}
    for owner, width in (('student', 65), ('teacher', 66)):
        args = parse_train_args([*named, '--kd-distill-type', 'feature', f'--kd-{owner}-feature-dim', str(width)])
        with pytest.raises(UsageError, match=f'features have width .*, and not {width}'):
            create_task(args, make_student(), torch.device('cpu'))


def test_a_class_map_that_does_not_fit_is_one_line(tmp_path):
    torch.save(make_teacher(num_classes=30).state_dict(), tmp_path / 'teacher.pth')
    (tmp_path / 'classes.txt').write_text('1\n2\n')
    flags = ['--kd-model-name', 'test_resnet', '--kd-model-path', tmp_path / 'teacher.pth']
    result = train(tmp_path, '--experiment', 'run', *flags, '--kd-class-map', tmp_path / 'classes.txt', code=2)
    assert 'the class map is of 2 classes and the student has 10' in result.stderr.splitlines()[-1]
    result = train(tmp_path, '--experiment', 'run', *flags, code=2)
    assert 'static teacher has 30 classes and the student 10' in result.stderr.splitlines()[-1]
