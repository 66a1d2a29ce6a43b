"""Runs whose student trains with its dynamic teacher in some epochs and alone in the others."""

import pytest
import timm
import torch
from safetensors.torch import load_file

from programs import differences, summary, train
from test_progress import TINY
from test_resume import kill_a_run
from test_validate_script import digits, student_flags
from timm_gpd import GapPreservingTask
from timm_gpd.errors import UsageError
from timm_gpd.training.args import parse_train_args
from timm_gpd.training.joint_epochs import read_joint_epochs, what_is_wrong
from timm_gpd.training.loop import TrainingLoop
from timm_gpd.training.non_finite import NonFiniteError
from timm_gpd.training.report.overview import describe, expected_cost, measure_models
from timm_gpd.training.report.plot import draw_gap
from timm_gpd.training.report.summary import Summary

# Plain training, joint training and plain training again, of five updates each, with all that goes over.
PHASES = ['--epochs', '3', '-b', '20', '--recovery-interval', '2', '--checkpoint-hist', '3', '--model-ema']
PHASES += ['--model-ema-decay', '0.9', '--clip-grad', '5']
WINDOW = ['--gpd-epochs', '1-2', '--gpd-branches', '2']


@pytest.fixture(scope='module')
def left_alone(tmp_path_factory):
    """The folder of a run that nothing happened to, and what it logged."""
    folder = tmp_path_factory.mktemp('alone') / 'runs'
    result = train(folder, *PHASES, *WINDOW, '--experiment', 'run')
    return folder / 'run', result.stderr


# -- the window -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'text, epochs',
    [
        (None, range(10)),
        ('0-10', range(10)),
        ('3-4', range(3, 4)),
        ('0.5-1.0', range(5, 10)),
        ('0.5-1', range(5, 10)),
        ('0-.3', range(3)),
        ('0.0-1.0', range(10)),
        ('0-1', range(1)),
    ],
)
def test_a_window_is_from_its_first_number_to_before_its_second(text, epochs):
    assert text is None or what_is_wrong(text) is None
    assert read_joint_epochs(text, 10) == epochs


@pytest.mark.parametrize(
    'text', ['', '3', '3-', '-3', '3-3', '4-3', 'a-b', '1-2-3', '0.5-0.5', '0.5-2', '1e1-2', '-1-3']
)
def test_what_is_no_window_is_refused_in_one_line(text):
    with pytest.raises(UsageError, match='^--gpd-epochs ') as error:
        parse_train_args(['--data-dir', 'x', '--gpd', f'--gpd-epochs={text}'])
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'text, said', [('3-11', 'behind the 10 epochs'), ('10-20', 'behind the 10'), ('0.01-0.02', 'none of the 10')]
)
def test_a_window_is_of_epochs_of_the_schedule(text, said):
    with pytest.raises(UsageError, match=said):
        read_joint_epochs(text, 10)


def test_runs_are_not_ranked_by_what_some_epochs_lack():
    with pytest.raises(UsageError, match='this run has loss, top1, top5$'):
        parse_train_args(['--data-dir', 'x', '--gpd', '--gpd-epochs', '1-2', '--eval-metric', 'gap'])


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_in_any_phase_ends_as_the_one_that_was_left_alone(tmp_path, left_alone):
    arguments = [*PHASES, '--experiment', 'run', '--resume', 'auto']
    train(tmp_path, *arguments, *WINDOW, '--stop-epoch', '1')  # where the first hand-over is
    kill_a_run(tmp_path, [*arguments, *WINDOW], update=3, save=0)
    assert (tmp_path / 'run' / 'recovery-1-2.pth.tar').exists()
    failed = train(tmp_path, *arguments, '--gpd-epochs', '2-3', '--gpd-branches', '2', code=2)
    assert 'the middle of epoch 1, which was begun with its dynamic teacher, and with' in failed.stderr.splitlines()[-1]
    kill_a_run(tmp_path, [*arguments, *WINDOW], update=6, save=0)
    assert (tmp_path / 'run' / 'recovery-2-2.pth.tar').exists()
    train(tmp_path, *arguments, *WINDOW)
    assert not differences(tmp_path / 'run', left_alone[0])


def test_epochs_before_the_window_are_plain_training(tmp_path, left_alone):
    train(tmp_path, *PHASES, '--stop-epoch', '1', '--experiment', 'run', config='digits')
    (row,) = summary(tmp_path / 'run')
    phased = summary(left_alone[0])[0]
    assert {column: phased[column] for column in row} == row
    plain, first = (
        torch.load(path, weights_only=False)
        for path in (tmp_path / 'run' / 'last.pth.tar', left_alone[0] / 'checkpoint-0.pth.tar')
    )
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(first[key][name], tensor) for name, tensor in plain[key].items())


def test_every_epoch_has_all_columns_and_those_alone_have_empty_cells(left_alone):
    folder, log = left_alone
    rows = summary(folder)
    of_teacher = [column for column in rows[0] if 'teacher' in column or 'gpd' in column or column == 'eval_gap']
    assert len(of_teacher) == 6
    for epoch, row in enumerate(rows):
        assert {bool(row[column]) for column in of_teacher} == {epoch == 1}
        assert row['train_loss'] and row['eval_top1'] and row['lr']
    assert 'epoch 1: the student trains with its dynamic teacher from now on' in log
    assert 'epoch 2: the student trains alone from now on' in log
    assert 'That is in 1 of 3 epochs, and in the others 1.0 x: the run is expected to cost ' in log


def test_checkpoints_of_all_phases_are_validated_and_the_student_is_timms(left_alone):
    folder, _ = left_alone
    rows, weights = summary(folder), load_file(folder / 'student' / 'model.safetensors')
    model = timm.create_model(f'local-dir:{folder}/student', pretrained=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert 'has weight 3; in the epochs 1-2 only' in (folder / 'student' / 'README.md').read_text()
    flags = student_flags(folder)
    for name, more, expected in (
        ('checkpoint-0', [], rows[0]['eval_top1']),
        ('checkpoint-1', ['--use-teacher'], rows[1]['eval_teacher_top1']),
        ('last', [], rows[2]['eval_top1']),
    ):
        found = digits(folder, *flags, '--checkpoint', folder / f'{name}.pth.tar', '--use-ema', *more)
        assert found['top1'] == pytest.approx(float(expected), abs=1e-3)
    failed = digits(folder, *flags, '--checkpoint', folder / 'last.pth.tar', '--use-teacher', code=2)
    assert 'holds no dynamic teacher' in failed.stderr


def test_a_loss_that_is_not_finite_right_after_a_hand_over_goes_back_to_before_it(tmp_path, monkeypatch):
    train_epoch, failures = TrainingLoop.train_epoch, []

    def fail_once(loop, position):
        if isinstance(loop.task, GapPreservingTask) and not failures:
            failures.append(position.epoch)
            raise NonFiniteError('a loss is not finite')
        return train_epoch(loop, position)

    monkeypatch.setattr(TrainingLoop, 'train_epoch', fail_once)
    result = train(tmp_path, '--gpd-epochs', '1-2', '--on-nan', 'rewind', '--experiment', 'run')
    assert failures == [1] and 'the run goes back to' in result.stderr
    assert [bool(row['eval_gap']) for row in summary(tmp_path / 'run')] == [False, True]


# -- reports ----------------------------------------------------------------------------------------------------------


def test_the_cost_of_a_run_goes_with_its_window(tiny_student):
    task = GapPreservingTask(tiny_student, verbose=False)
    sizes = measure_models(task, TINY)
    step = expected_cost(sizes)
    assert f'is expected to cost {(step + 3) / 4:.2f} x plain training' in describe(task, TINY, range(1, 2), 4)[-1]
    assert (
        f'is expected to cost {(step + 1) / 2:.2f} x plain' in describe(task, TINY, range(1, 5), 2)[-1]
    )  # stops early
    assert describe(task, TINY, range(4), 4) == describe(task, TINY)


def test_columns_that_come_later_are_empty_before(tmp_path):
    table = Summary(str(tmp_path / 'summary.csv'), has_phases=True)
    for epoch, more in enumerate([{}, {'eval_gap': 2.0}, {}]):
        table.write({'epoch': epoch, 'train_loss': 1.0, **more, 'lr': 0.1})
    assert [list(row) for row in table.rows()] == [['epoch', 'train_loss', 'eval_gap', 'lr']] * 3
    assert [row['eval_gap'] for row in table.rows()] == ['', '2.0', '']


@pytest.mark.parametrize('joint', [range(2), range(2, 4), range(4, 6)])
def test_the_plot_shows_the_teacher_where_there_is_one(tmp_path, joint):
    rows = [
        {
            'epoch': str(epoch),
            'eval_top1': str(50.0 + epoch),
            'eval_teacher_top1': str(52.0 + epoch) if epoch in joint else '',
            'eval_gap': '2.0' if epoch in joint else '',
        }
        for epoch in range(6)
    ]
    top, gap = draw_gap(rows, str(tmp_path / 'gap.png')).axes
    labels = [text.get_text() for panel in (top, gap) for text in panel.get_legend().get_texts()]
    last = joint[-1]
    end = 'at the end' if last == 5 else f'in epoch {last}'
    assert any(label.startswith(f'dynamic teacher: {52 + last}.00 {end}') for label in labels)
    assert any(label.startswith(f'gap: 2.00 {end}') for label in labels)
