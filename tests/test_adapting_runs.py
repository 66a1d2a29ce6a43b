"""Runs with teachers that adapt, as commands start them and go on with them."""

import pytest
import torch

from programs import differences, summary, train
from teachers import make_teacher
from test_resume import kill_a_run
from timm_gpd.errors import UsageError
from timm_gpd.training.args import parse_train_args
from timm_gpd.training.report.plot import draw_gap
from timm_gpd.training.task import check_task

# The student alone, with its dynamic teacher, and alone again, of five updates each; the teachers go on.
PHASES = ['--epochs', '3', '-b', '20', '--recovery-interval', '2', '--checkpoint-hist', '3', '--gpd-epochs', '1-2']
PHASES += ['--model-ema', '--model-ema-decay', '0.9', '--kd-distill-type', 'kd@1,kd@2']


@pytest.fixture(scope='module')
def flags(tmp_path_factory):
    """A static teacher with online modules, and a moving average that moves."""
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save(make_teacher().state_dict(), path)
    static = ['--kd-model-name', 'test_resnet', '--kd-model-path', str(path), '--kd-online-modules']
    return [*PHASES, *static, '--ema-teacher', '--ema-teacher-momentum', '0.1', '--ema-teacher-prob', '0.8']


@pytest.fixture(scope='module')
def left_alone(tmp_path_factory, flags):
    """The folder of a run that nothing happened to, and what it logged."""
    folder = tmp_path_factory.mktemp('alone') / 'runs'
    return folder / 'run', train(folder, *flags, '--experiment', 'run').stderr


def test_a_run_reports_both(left_alone):
    folder, log = left_alone
    rows = summary(folder)
    for column in ('eval_static_top1', 'eval_ema_teacher_top1'):
        assert len({float(row[column]) for row in rows}) > 1
    assert all(float(row[f'train_online_{name}']) > 0 for row in rows for name in ('task_loss', 'kd_loss'))
    assert 'static teacher ' in log and 'EMA teacher ' in log
    labels = [text.get_text() for text in draw_gap(rows, folder / 'gap.png').axes[0].get_legend().get_texts()]
    assert any(label.startswith('EMA teacher: ') for label in labels)
    assert any(label.startswith('static teacher: ') and ' at the end' in label for label in labels)
    assert '| EMA teacher |' in (folder / 'student' / 'README.md').read_text()


def test_a_killed_run_ends_as_the_one_that_was_left_alone(tmp_path, flags, left_alone):
    arguments = [*flags, '--experiment', 'run', '--resume', 'auto']
    for update in (3, 5):  # alone; then, from the recovery checkpoint before, in the epoch with a dynamic teacher
        kill_a_run(tmp_path, arguments, update=update, save=0)
    train(tmp_path, *arguments)
    assert not differences(tmp_path / 'run', left_alone[0])


@pytest.mark.parametrize('flag', ['--ema-teacher', '--kd-online-modules'])
def test_a_run_goes_on_with_the_teachers_that_it_had(tmp_path, flags, left_alone, flag):
    last = left_alone[0] / 'last.pth.tar'
    fewer = [given for given in flags if given != flag]
    fewer[fewer.index('kd@1,kd@2')] = 'kd'
    failed = train(tmp_path, *fewer, '--experiment', 'run', '--resume', last, code=2)
    error = failed.stderr.splitlines()[-1]
    assert f'is of a run with {flag}, and this one is without: resume it as it was' in error


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--kd-online-modules', '--kd-online-modules are added to a static teacher: give --kd-model-name'),
        ('--kd-online-modules --ema-teacher', '--kd-online-modules are added to a static teacher'),
        ('--kd-online-modules --kd-model-name resnet18 --torchcompile', 'leave out --torchcompile'),
        ('--kd-online-modules --kd-model-name resnet18 --kd-cache outputs', 'leave them out, or --kd-cache'),
        ('--kd-online-modules --kd-model-name resnet18 --task multilabel --kd-distill-type at', 'exclude each other'),
        ('--ema-teacher --ema-teacher-prob 0', '--ema-teacher-prob must be above 0 and at most 1, but is 0.0'),
        ('--ema-teacher --ema-teacher-prob 1.1', '--ema-teacher-prob must be above 0 and at most 1, but is 1.1'),
        ('--ema-teacher --ema-teacher-momentum 1', '--ema-teacher-momentum must be at least 0 and below 1, but is 1.0'),
        ('--ema-teacher --gpd --gpd-method netaug', 'netaug distils nothing: leave out --ema-teacher'),
        ('--ema-teacher --kd-distill-type kd@2', 'kd@2 tells several static teachers apart, and there is one'),
        (
            '--ema-teacher --kd-model-name resnet18 --kd-distill-type at',
            'at compares features, of which 2 static',
        ),
        ('--ema-teacher --task multilabel', '--kd-distill-type logit compares probabilities of classes that exclude'),
        ('--ema-teacher --eval-metric static_top1', 'this run has loss, top1, top5, ema_teacher_top1'),
    ],
)
def test_flags_that_make_no_sense_are_answered_before_anything_is_created(flags, message):
    with pytest.raises(UsageError) as error:
        check_task(parse_train_args(['--data-dir', 'x', *flags.split()]))
    assert message in str(error.value) and '\n' not in str(error.value)


def test_what_does_nothing_is_warned_about(caplog):
    parse_train_args(['--data-dir', 'x', '--ema-teacher-prob', '0.5'])
    assert '--ema-teacher-prob does nothing without --ema-teacher' in caplog.text
    parse_train_args(['--data-dir', 'x', '--kd-distill-type', 'dkd'])
    assert '--kd-distill-type does nothing without --kd-model-name or --ema-teacher' in caplog.text
    caplog.clear()
    parse_train_args(['--ema-teacher', '--kd-distill-type', 'dkd', '--eval-metric', 'ema_teacher_top1'])
    assert not caplog.text
