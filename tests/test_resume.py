"""A run that is killed, told to end or out of room, and goes on: it ends where the run that was left alone does."""

import contextlib
import errno
import multiprocessing
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from timm.task import ClassificationTask

from programs import ROOT, checkpoint_values, differences, run, summary, train
from timm_gpd import GapPreservingTask
from timm_gpd.training.loop import TrainingLoop

# All that draws random numbers: order, augmentation in worker processes, mixing, erasing, drop path.
RANDOM = ['--mixup', '0.5', '--reprob', '0.5', '--smoothing', '0.1', '--drop-path', '0.2', '--workers', '1']
RANDOM += ['--model-ema', '--model-ema-decay', '0.9', '-b', '20', '--epochs', '3', '--checkpoint-hist', '2']
RANDOM += ['--recovery-interval', '2', '--mixup-off-epoch', '2']  # of five updates an epoch
PLAIN = ['--digits-train-size', '100', '--workers', '0', '--checkpoint-hist', '3']


@pytest.fixture(scope='module')
def left_alone(tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp('alone') / 'runs'
    train(folder, *RANDOM, '--experiment', 'run')
    return folder / 'run'


def load(folder, name='last'):
    return torch.load(folder / f'{name}.pth.tar', weights_only=False)


def kill_a_run(tmp_path, arguments, update, save):
    """Trains in a process of its own until behind an update, or in the middle of a write; counted from 1, 0 is never.

    It is forked, as starting Python and torch anew takes seconds.
    """
    updates, saves = [], []
    save_if_wanted, write = TrainingLoop._save_if_wanted, torch.save

    def count(loop, *args):
        save_if_wanted(loop, *args)
        updates.append(0)
        if len(updates) == update:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_half(state, file):
        saves.append(0)
        if len(saves) == save:
            file.write(b'x' * 100_000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(state, file)

    def train_until():
        TrainingLoop._save_if_wanted, torch.save = count, write_half
        train(tmp_path, *arguments)

    process = multiprocessing.get_context('fork').Process(target=train_until)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    'moments',
    [
        # In the second epoch, behind and in front of a recovery checkpoint; then in the first step after it is resumed.
        [dict(update=8, save=0), dict(update=1, save=0)],
        # While a recovery checkpoint is written, and `last`.
        [dict(update=0, save=2), dict(update=0, save=4)],
    ],
    ids=['training', 'writing'],
)
def test_a_killed_run_ends_as_the_one_that_was_left_alone(tmp_path, left_alone, moments):
    arguments = [*RANDOM, '--experiment', 'run[1]*', '--resume', 'auto']  # a name may look like a pattern
    for moment in moments:
        kill_a_run(tmp_path, arguments, **moment)
    train(tmp_path, *arguments)
    assert not differences(tmp_path / 'run[1]*', left_alone)


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_run_that_has_not_begun_ends_at_once(tmp_path, monkeypatch, capfd, number, code):
    monkeypatch.setattr('timm_gpd.training.student.create_student', lambda args: os.kill(os.getpid(), number))
    process = multiprocessing.get_context('fork').Process(target=train, args=(tmp_path, '--experiment', 'run'))
    process.start()
    process.join(60)
    assert process.exitcode == code and not (tmp_path / 'run').exists()


def test_a_checkpoint_in_an_epoch_of_other_length_is_refused(tmp_path):
    arguments = [*PLAIN, '-b', '10', '--recovery-interval', '3', '--experiment', 'run', '--resume', 'auto']
    kill_a_run(tmp_path, arguments, update=14, save=0)
    assert (tmp_path / 'run' / 'recovery-1-3.pth.tar').exists()
    failed = train(tmp_path, *arguments, '--digits-train-size', '50', code=2)
    assert 'the middle of an epoch of 10 batches, and this run has 5: resume with the same images' in failed.stderr


def test_an_optimizer_goes_on_as_it_was(tmp_path):
    arguments = [*PLAIN, '--experiment', 'run', '--resume', 'auto']
    train(tmp_path, *arguments, '--epochs', '1', config='digits')
    failed = train(tmp_path, *arguments, '--epochs', '2', '--opt', 'adamw', config='digits', code=2)
    assert 'last.pth.tar holds the state of --opt sgd, and this run has adamw' in failed.stderr.splitlines()[-1]
    went_on = train(tmp_path, *arguments, '--epochs', '2', '--lr', '0.3', config='digits')
    assert '--lr stays 0.1, as the optimizer goes on as it was: --no-resume-opt begins with 0.3' in went_on.stderr


@contextlib.contextmanager
def at_update(number, action):
    """Does something behind an update, counted from 1, of whatever run there is."""
    original, updates = TrainingLoop._save_if_wanted, []

    def count(loop, *args):
        updates.append(0)
        if len(updates) == number:
            action()
        original(loop, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, '_save_if_wanted', count)
        yield


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_end_says_how_it_goes_on(tmp_path, left_alone, number, code):
    arguments = [*RANDOM, '--experiment', 'run']
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    def tell_all():  # also those that load images, as a terminal and torchrun do
        children = [str(child.pid) for child in multiprocessing.active_children()]
        subprocess.run(['kill', f'-{number.name}', *children], check=True)
        os.kill(os.getpid(), number)

    with at_update(6, tell_all):
        ended = train(tmp_path, *arguments, code=code)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    path = tmp_path / 'run' / 'recovery-1-1.pth.tar'
    assert ended.stderr.splitlines()[-1] == (
        f'train.py: {number.name}: saved to {path}; the same command with --resume {path} goes on'
    )
    assert '--result' not in ended.stdout
    refused = train(tmp_path, *arguments, '--resume', path, '-b', '10', code=2)
    assert 'the middle of an epoch with batch_size 20, and this run has 10' in refused.stderr
    train(tmp_path, *arguments, '--resume', path)
    assert not differences(tmp_path / 'run', left_alone)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, left_alone, monkeypatch):
    saves, save = [], torch.save

    def run_out_of_room(state, file):
        saves.append(0)
        if len(saves) == 5:  # three recovery checkpoints, and `last`
            file.write(b'x' * 1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    monkeypatch.setattr(torch, 'save', run_out_of_room)
    arguments = [*RANDOM, '--experiment', 'run', '--resume', 'auto']
    failed = train(tmp_path, *arguments, code=2)
    monkeypatch.undo()
    error = failed.stderr.splitlines()[-1]
    assert 'recovery-1-2.pth.tar cannot be written: ' in error and 'No space left on device' in error
    assert load(tmp_path / 'run')['epoch'] == 0 and not [
        name for name in os.listdir(tmp_path / 'run') if name.startswith('.')
    ]
    train(tmp_path, *arguments)
    assert not differences(tmp_path / 'run', left_alone)


# -- what was is not lost -------------------------------------------------------------------------------------------


def test_going_back_keeps_a_better_model_and_the_number_of_checkpoints(tmp_path):
    arguments = [*PLAIN, '--experiment', 'run']
    train(tmp_path, *arguments, '--epochs', '5', '--lr', '0.02', '--save-epochs', '1', '3', config='digits')
    folder = tmp_path / 'run'
    best = load(folder, 'model_best')
    assert (folder / 'milestone-1.pth.tar').exists() and load(folder, 'milestone-3')['epoch'] == 2
    first = folder / 'milestone-1.pth.tar'
    # From there on, nothing is learned.
    train(tmp_path, *arguments, '--epochs', '5', '--resume', first, '--lr', '1e-9', config='digits')
    assert [int(row['epoch']) for row in summary(folder)] == list(range(5))
    kept = sorted(name for name in os.listdir(folder) if name.startswith('checkpoint-'))
    assert len(kept) == 3
    again = load(folder, 'model_best')
    assert again['metric'] >= best['metric']
    assert max(load(folder, name.removesuffix('.pth.tar'))['metric'] for name in kept) == again['metric']


def test_a_run_stops_early_and_goes_on_as_if_it_had_not(tmp_path):
    """Milestones and the last epoch are validated, whatever the interval; the schedule stays as it was."""
    arguments = [*PLAIN, '--epochs', '4', '--val-interval', '3', '--save-epochs', '1', '--resume', 'auto']
    train(tmp_path, *arguments, '--experiment', 'run', '--stop-epoch', '2', config='digits')
    folder = tmp_path / 'run'
    assert [int(row['epoch']) for row in summary(folder)] == [0, 1] and load(folder)['epoch'] == 1
    assert load(folder, 'milestone-1')['epoch'] == 0
    train(tmp_path, *arguments, '--experiment', 'run', config='digits')
    train(tmp_path, *arguments, '--experiment', 'whole', config='digits')
    stopped, whole = summary(folder), summary(tmp_path / 'whole')
    assert [int(row['epoch']) for row in stopped] == [0, 1, 2, 3]
    assert [row for row in stopped if row['epoch'] != '1'] == whole
    failed = train(tmp_path, *arguments, '--experiment', 'late', '--stop-epoch', '5', config='digits', code=2)
    assert '--stop-epoch 5 is behind the 4 epochs of the schedule' in failed.stderr
    assert not (tmp_path / 'late').exists()


def test_a_schedule_that_watches_a_metric_remembers_it(tmp_path):
    """Of timm's scheduler for plateaus, checkpoints hold what it has seen, and the rate below its noise."""
    config = Path(ROOT, 'configs', 'digits.yaml').read_text().replace('sched_on_updates: true', '')
    (tmp_path / 'digits.yaml').write_text(config)
    arguments = [*PLAIN, '--epochs', '6', '--lr', '1e-9', '--sched', 'plateau', '--patience-epochs', '1']
    arguments += ['--cooldown-epochs', '1', '--lr-noise', '0.4', '--config', tmp_path / 'digits.yaml']
    train(tmp_path, *arguments, '--experiment', 'whole')
    for stop in (1, 3, 4, 6):
        train(tmp_path, *arguments, '--experiment', 'run', '--resume', 'auto', '--stop-epoch', stop)
    assert len({row['lr'] for row in summary(tmp_path / 'whole')}) > 3
    assert not differences(tmp_path / 'run', tmp_path / 'whole')


def test_a_finished_run_stays_finished(tmp_path):
    arguments = [*PLAIN, '--experiment', 'run', '--epochs', '1', '--resume', 'auto']
    train(tmp_path, *arguments)
    before = {name: (tmp_path / 'run' / name).read_bytes() for name in ('last.pth.tar', 'summary.csv')}
    train(tmp_path, *arguments)
    assert before == {name: (tmp_path / 'run' / name).read_bytes() for name in before}
    # Into a folder of its own: its student is there.
    last = tmp_path / 'run' / 'last.pth.tar'
    train(tmp_path, *PLAIN, '--experiment', 'other', '--epochs', '1', '--resume', last)
    (row,) = summary(tmp_path / 'other')
    assert float(row['eval_top1']) == float(summary(tmp_path / 'run')[0]['eval_top1'])
    assert (tmp_path / 'other' / 'student' / 'model.safetensors').exists()
    # Without validation there is no metric to show.
    train(tmp_path, *PLAIN, '--experiment', 'third', '--epochs', '1', '--resume', last, '--val-split', '')
    assert (tmp_path / 'third' / 'student' / 'model.safetensors').exists()


@pytest.mark.parametrize('first, then', [('digits_gpd', 'digits'), ('digits', 'digits_gpd')])
def test_a_run_is_resumed_as_what_it_was(tmp_path, first, then):
    train(tmp_path, *PLAIN, '--experiment', 'run', '--epochs', '1', config=first)
    command = (tmp_path / 'run' / 'args.yaml').read_text()
    last = tmp_path / 'run' / 'last.pth.tar'
    for experiment in ('run', 'other'):
        failed = train(
            tmp_path, *PLAIN, '--experiment', experiment, '--epochs', '2', '--resume', last, config=then, code=2
        )
        assert 'gpd' in failed.stderr.splitlines()[-1] and 'Traceback' not in failed.stderr
    assert (tmp_path / 'run' / 'args.yaml').read_text() == command


def test_no_checkpoint_to_resume_automatically_is_a_beginning(tmp_path):
    train(tmp_path, *PLAIN, '--experiment', 'run', '--epochs', '1', '--resume', 'auto', config='digits')
    assert len(summary(tmp_path / 'run')) == 1
    (tmp_path / 'run' / 'recovery-0-2.pth.tar').write_bytes(b'nothing')  # of a file system that lost it
    again = train(tmp_path, *PLAIN, '--experiment', 'run', '--epochs', '1', '--resume', 'auto', config='digits')
    assert 'recovery-0-2.pth.tar cannot be read as a checkpoint' in again.stderr and len(summary(tmp_path / 'run')) == 1
    (tmp_path / 'run' / 'last.pth.tar').write_bytes(b'nothing')
    failed = run('train.py', '--dataset', 'digits', *PLAIN, '--resume', 'auto', '--device', 'cpu', code=2)
    assert '--resume auto needs --experiment' in failed.stderr


# -- NaN ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nan_at(number, task_class):
    """The loss of a forward pass, counted from 1, is NaN."""
    forward, steps = task_class.forward, []

    def spoil(task, *args):
        result = forward(task, *args)
        steps.append(0)
        if len(steps) == number:
            result['loss'] = result['loss'] * float('nan')
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_class, 'forward', spoil)
        yield


@pytest.mark.parametrize('config, task_class', [('digits', ClassificationTask), ('digits_gpd', GapPreservingTask)])
def test_nan_is_found_before_the_update(tmp_path, config, task_class):
    arguments = [*PLAIN, '-b', '50', '--epochs', '2']
    with nan_at(4, task_class):  # the last update of the second epoch
        failed = train(tmp_path, *arguments, '--experiment', 'stop', config=config, code=3)
    error = failed.stderr.splitlines()[-1]
    assert error.startswith('train.py: error: epoch 1, update 1, learning rate ') and 'loss is nan' in error
    assert load(tmp_path / 'stop')['epoch'] == 0

    with nan_at(4, task_class):
        train(tmp_path, *arguments, '--experiment', 'skip', '--on-nan', 'skip', config=config)
    train(tmp_path, *arguments, '--experiment', 'free', config=config)
    row, free = (summary(tmp_path / name)[1] for name in ('skip', 'free'))
    assert row['train_loss'] != free['train_loss'] and float(row['train_loss']) < 100
    steps = {state.get('step') for state in load(tmp_path / 'skip')['optimizer']['state'].values()}
    assert steps == {None}  # SGD counts none; its momentum is finite
    tensors = [value for _, value in checkpoint_values(load(tmp_path / 'skip')) if isinstance(value, torch.Tensor)]
    assert tensors and all(tensor.isfinite().all() for tensor in tensors)


def test_an_epoch_without_any_update_ends_the_run(tmp_path):
    arguments = [*PLAIN, '-b', '50', '--epochs', '2', '--lr', '1e20', '--on-nan', 'skip', '--experiment', 'run']
    failed = train(tmp_path, *arguments, config='digits', code=3)
    assert 'no update had a finite loss and finite gradients: lower --lr' in failed.stderr.splitlines()[-1]


def test_a_run_goes_back_and_on_with_other_random_numbers(tmp_path):
    # --start-epoch is where the command begins, not where a run goes back to.
    arguments = [*PLAIN, '-b', '50', '--epochs', '2', '--on-nan', 'rewind', '--start-epoch', '0']
    with nan_at(3, GapPreservingTask):
        result = train(tmp_path, *arguments, '--experiment', 'run')
    assert 'the run goes back to' in result.stderr
    first, second = summary(tmp_path / 'run')
    train(tmp_path, *arguments, '--experiment', 'free')
    expected_first, expected_second = summary(tmp_path / 'free')
    assert first == expected_first and second['train_loss'] != expected_second['train_loss']
    assert load(tmp_path / 'run')['run']['rewinds'] == 1
    with nan_at(1, GapPreservingTask):
        failed = train(tmp_path, *arguments, '--experiment', 'none', code=3)
    assert 'there is no checkpoint to go back to' in failed.stderr
