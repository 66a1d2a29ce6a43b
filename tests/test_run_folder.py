"""A run's folder: summary.csv, gap.png, what is tracked, and what is refused before anything is written."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from timm.utils import update_summary

from programs import ROOT, summary, train
from timm_gpd.errors import RunEnded, UsageError
from timm_gpd.training.args import parse_train_args
from timm_gpd.training.report import plot
from timm_gpd.training.report.files import replaced_file
from timm_gpd.training.report.plot import GapPlot, draw_gap
from timm_gpd.training.report.run_folder import RunFolder
from timm_gpd.training.report.summary import Summary, summary_row
from timm_gpd.training.report.tracking import Tracker, check_tracking
from timm_gpd.training.student import InputConfig

INPUT = InputConfig((3, 64, 64), (0.5,), (0.5,), 'bilinear', 1.0)


def row(epoch, top1=50.0, **more):
    return summary_row(epoch, {'loss': 2.0 / (epoch + 1), **more}, {'top1': top1}, lr=0.1)


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


# -- summary.csv -------------------------------------------------------------------------------------------------------


def test_the_summary_is_timms_byte_for_byte(tmp_path):
    ours, theirs = Summary(str(tmp_path / 'ours.csv')), str(tmp_path / 'theirs.csv')
    for epoch in range(3):
        train_metrics = {'loss': 1.0 / 3**epoch, 'kd/dkd': 1e-5 * epoch}
        eval_metrics = {'loss': 2.5, 'top1': 12.345678901234567, 'top5': 100.0}
        ours.write(summary_row(epoch, train_metrics, eval_metrics, lr=1e-3))
        update_summary(epoch, train_metrics, eval_metrics, theirs, lr=1e-3)
    assert (tmp_path / 'ours.csv').read_bytes() == (tmp_path / 'theirs.csv').read_bytes()
    assert list(summary_row(0, {'loss': 1.0}, {}, lr=0.1)) == ['epoch', 'train_loss', 'lr']


def test_epochs_that_are_run_again_replace_their_rows(tmp_path):
    table = Summary(str(tmp_path / 'summary.csv'))
    assert table.rows() == []
    table.truncate(0)
    assert not (tmp_path / 'summary.csv').exists()
    for epoch in range(5):
        table.write(row(epoch))
    before = table.rows()
    table.truncate(3)
    assert table.rows() == before[:3]
    table.write(row(3, 75.0))
    assert [found['eval_top1'] for found in table.rows()] == ['50.0'] * 3 + ['75.0']
    table.write(row(1, 80.0))  # what stands after it is of the run that this one replaces
    assert table.rows()[:1] == before[:1]
    assert [(found['epoch'], found['eval_top1']) for found in table.rows()] == [('0', '50.0'), ('1', '80.0')]
    table.truncate(0)
    table.write(row(0, gpd_loss=1.0))
    assert list(table.rows()[0]) == ['epoch', 'train_loss', 'train_gpd_loss', 'eval_top1', 'lr']


@pytest.mark.parametrize(
    'old, new, said',
    [
        ({}, {'gpd_loss': 1.0}, 'and this one has train_gpd_loss: '),
        ({'gpd_loss': 1.0}, {}, 'and this one has no train_gpd_loss: '),
        ({'kd/kd': 1.0}, {'kd/dkd': 1.0}, 'and this one has no train_kd/kd but train_kd/dkd: '),
    ],
)
def test_other_columns_are_refused(tmp_path, old, new, said):
    table = Summary(str(tmp_path / 'summary.csv'))
    table.write(row(0, **old))
    before = files(tmp_path)
    with pytest.raises(UsageError) as error:
        table.write(row(1, **new))
    assert said in str(error.value) and '--experiment' in str(error.value) and '\n' not in str(error.value)
    assert files(tmp_path) == before


def test_columns_in_another_order_find_their_place(tmp_path):
    table = Summary(str(tmp_path / 'summary.csv'))
    table.write({'epoch': 0, 'train_loss': 1.0, 'lr': 0.5})
    table.write({'lr': 0.25, 'epoch': 1, 'train_loss': 2.0})
    assert table.rows()[1] == {'epoch': '1', 'train_loss': '2.0', 'lr': '0.25'}


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(OSError, match='full'), replaced_file(str(path)) as partial, open(partial, 'w') as file:
        file.write('ne')
        raise OSError('full')
    assert files(tmp_path) == {path: b'old'}
    with replaced_file(str(path)) as partial:
        Path(partial).write_text('new')
        assert path.read_text() == 'old'
    (tmp_path / 'plain').touch()
    assert files(tmp_path)[path] == b'new' and len(files(tmp_path)) == 2
    assert path.stat().st_mode == (tmp_path / 'plain').stat().st_mode


# -- the plot ----------------------------------------------------------------------------------------------------------


def measured(student, teacher=None, static=None):
    rows = []
    for epoch, top1 in enumerate(student):
        found = {'epoch': epoch, 'eval_top1': top1}
        if teacher is not None:
            found.update(eval_teacher_top1=teacher[epoch], eval_gap=teacher[epoch] - top1)
        if static is not None:
            found['eval_static_top1'] = static
        rows.append({name: str(value) for name, value in found.items()})
    return rows


STUDENT = [5.0, 40.0, 60.0, 66.0, 69.0, 69.5, 70.5, 70.0]
TEACHER = [1.0, 44.0, 65.0, 68.0, 71.0, 71.5, 72.5, 71.5]


def curves(panel):
    """Data of the curves of a panel, by the names in its legend; '' are what marks points."""
    found = {}
    for line in panel.get_lines():
        label = str(line.get_label())
        name = '' if label.startswith('_') else label.split(':')[0]
        found.setdefault(name, []).append((list(line.get_xdata()), list(line.get_ydata())))
    return found


def test_the_plot_has_the_gap_in_a_panel_of_its_own(tmp_path):
    figure = draw_gap(measured(STUDENT, TEACHER, 73.0), str(tmp_path / 'gap.png'), 'resnet18')
    top, bottom = figure.axes
    epochs = list(range(8))
    assert curves(top)['student'] == [(epochs, STUDENT)]
    assert curves(top)['dynamic teacher'] == [(epochs, TEACHER)]
    ((_, static),) = curves(top)['static teacher']
    assert static == [73.0, 73.0]
    assert curves(bottom)['gap'] == [(epochs, [b - a for a, b in zip(STUDENT, TEACHER)])]
    # The star is where the student was best, the dot at the end.
    assert {(x[0], y[0]) for x, y in curves(top)[''] if len(x) == 1} == {(6, 70.5), (6, 72.5), (7, 70.0), (7, 71.5)}
    assert {(x[0], y[0]) for x, y in curves(bottom)[''] if len(x) == 1} == {(6, 2.0), (7, 1.5)}
    low, high = top.get_ylim()
    assert 60 < low < 69 and 73 < high < 80, 'the later half fits, and the first epochs do not squeeze it'
    low, high = bottom.get_ylim()
    assert low < 1.5 and 2.0 < high < 4.0
    assert Image.open(tmp_path / 'gap.png').size == (840, 780)
    assert os.listdir(tmp_path) == ['gap.png']


@pytest.mark.parametrize(
    'column, name, label, unit',
    [
        ('train_paused', 'paused', 'paused steps (%)', 100),
        ('train_gap_factor', 'factor', 'factor for the gap', 1),
    ],
)
def test_what_controls_the_gap_has_a_panel_below_it(tmp_path, column, name, label, unit):
    rows = measured(STUDENT, TEACHER)
    shares = [0.0, 0.25, 0.5, 0.75, 0.5, 0.5, 0.25, 0.125]
    for row, share in zip(rows[1:], shares[1:]):  # the first epoch was of the student alone
        row[column] = str(share)
    panels = draw_gap(rows, str(tmp_path / 'gap.png')).axes
    assert len(panels) == 3 and panels[2].get_ylabel() == label
    ((_, values),) = curves(panels[2])[name]
    assert values[1:] == [unit * share for share in shares[1:]]
    assert len(draw_gap(measured(STUDENT, TEACHER), str(tmp_path / 'gap.png')).axes) == 2


def test_the_plot_of_a_plain_run_and_of_one_that_was_best_early(tmp_path):
    (panel,) = draw_gap(measured([90.0, 20.0, 30.0, 31.0]), str(tmp_path / 'gap.png')).axes
    low, high = panel.get_ylim()
    assert low < 30 and high > 90, 'the best epoch is shown'
    rows = [{name.replace('top1', 'map'): value for name, value in row.items()} for row in measured(STUDENT, TEACHER)]
    panels = draw_gap(rows, str(tmp_path / 'gap.png')).axes
    assert curves(panels[0])['dynamic teacher'] == [(list(range(8)), TEACHER)]
    assert [panel.get_ylabel() for panel in panels] == [
        'mean average precision (%)',
        'gap (points of mean average precision)',
    ]
    (panel,) = draw_gap(measured([50.0]), str(tmp_path / 'gap.png')).axes
    low, high = panel.get_ylim()
    assert low < 50 < high


def test_drawing_takes_a_bounded_share_of_a_run(tmp_path, monkeypatch):
    clock, drawn = SimpleNamespace(now=100.0), []

    def draw(rows, path, title):
        drawn.append((clock.now, len(rows)))
        clock.now += 0.5

    monkeypatch.setattr(plot, 'time', SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(plot, 'draw_gap', draw)
    gap_plot = GapPlot(str(tmp_path / 'gap.png'), 'resnet18')
    for epoch in range(1, 401):  # an epoch a second
        clock.now += 1.0
        gap_plot.update(measured([50.0] * epoch))
    spent = 0.5 * len(drawn)
    assert 5 <= len(drawn) and spent <= plot.MAX_SHARE * 400 + 0.5
    gap_plot.update(measured([50.0] * 400), last=True)
    assert drawn[-1][1] == 400
    gap_plot.update([{'epoch': '0', 'eval_loss': '50'}], last=True)
    assert drawn[-1][1] == 400, 'without accuracies there is nothing to draw'
    for _ in range(3):  # epochs of an hour are all drawn
        clock.now += 3600.0
        gap_plot.update(measured([50.0]))
    assert len(drawn) >= 9 and [count for _, count in drawn[-3:]] == [1, 1, 1]


def test_without_matplotlib_it_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    gap_plot = GapPlot(str(tmp_path / 'gap.png'), 'resnet18')
    for _ in range(2):
        gap_plot.update(measured([50.0]), last=True)
    assert [record.getMessage() for record in caplog.records] == [
        'gap.png was not drawn: pip install "timm-gpd[demo]" brings matplotlib'
    ]


# -- the folder --------------------------------------------------------------------------------------------------------


NAMED = ['--kd-model-name', 'resnet34']


def run_of(tmp_path, *arguments):
    return RunFolder(parse_train_args(['--output', str(tmp_path), '--experiment', 'run', *arguments]), INPUT)


@pytest.mark.parametrize(
    'first, then, said',
    [
        (['--gpd'], [], 'gpd True, and this one has False'),
        ([], ['--gpd'], 'gpd False, and this one has True'),
        ([], ['--kd-model-name', 'resnet34'], "kd_model_name None, and this one has 'resnet34'"),
        (['--kd-model-name', 'resnet50'], ['--kd-model-name', 'resnet34'], "kd_model_name 'resnet50', and"),
        (NAMED, [*NAMED, '--kd-distill-type', 'dkd'], "kd_distill_type 'logit', and"),
    ],
)
def test_a_run_with_other_columns_is_refused_before_anything_is_written(tmp_path, first, then, said):
    begun = run_of(tmp_path, *first)
    begun.open()
    begun.write_epoch(0, {'loss': 1.0}, {'top1': 50.0}, lr=0.1)
    before = files(tmp_path)
    for resume in (str(tmp_path / 'run' / 'last.pth.tar'), 'auto'):
        with pytest.raises(UsageError, match=f'holds a run with {said}.*: resume with the arguments of that run'):
            run_of(tmp_path, *then, '--resume', resume)
        run_of(tmp_path, *first, '--epochs', '7', '--resume', resume)
    if not first:
        run_of(tmp_path, '--kd-distill-type', 'dkd', '--resume', 'auto')  # of no teacher: it changes nothing
    assert files(tmp_path) == before


def test_results_are_the_best_epochs_with_validation_and_without(tmp_path):
    folder = run_of(tmp_path)
    folder.open()
    for epoch, top1 in enumerate([10.0, 30.0, 20.0]):
        folder.write_epoch(epoch, {'loss': 3.0 - epoch}, {'top1': top1}, lr=0.1)
    assert [found['epoch'] for found in folder.best_results('top1', False, 2)] == [1, 2]
    plain = run_of(tmp_path / 'plain')
    plain.open()
    for epoch, loss in enumerate([3.0, 1.0, 2.0]):
        assert plain.write_epoch(epoch, {'loss': loss}, {}, lr=0.1) == {'epoch': epoch, 'train_loss': loss, 'lr': 0.1}
    assert [found['epoch'] for found in plain.best_results('loss', True)] == [1, 2, 0]


@pytest.fixture(scope='module')
def full(tmp_path_factory):
    """A run with both teachers; its log, and what ``--resume`` of its first epoch made of the folder."""
    folder = tmp_path_factory.mktemp('runs')
    student = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    torch.save(student.state_dict(), folder / 'static.pth')
    arguments = [
        '--experiment',
        'run',
        '--kd-model-name',
        'test_resnet',
        '--kd-model-path',
        folder / 'static.pth',
        '--checkpoint-hist',
        '2',
    ]
    result = train(folder, *arguments)
    before = summary(folder / 'run')
    train(folder, *arguments, '--resume', folder / 'run' / 'checkpoint-0.pth.tar', '--epochs', '3')
    return folder / 'run', result, before


def test_a_run_that_goes_on_from_an_earlier_checkpoint_repeats_no_epoch(full):
    folder, _, before = full
    rows = summary(folder)
    assert [found['epoch'] for found in rows] == ['0', '1', '2']
    assert rows[0] == before[0] and rows[0].keys() == before[0].keys()


def test_a_run_says_what_it_is_at_its_start(full):
    folder, result, _ = full
    text = (folder / 'train.log').read_text()
    for told in (result.stderr, text):
        for name in ('student', 'dynamic teacher', 'static teacher'):
            assert re.search(rf'{name} +[\d,]+ +[\d.]+ [kMG]$', told, re.MULTILINE), name
        assert re.search(r'A step is expected to cost \d\.\d x plain training', told)
        assert 'Train: 0 [   0/2' in told and 'Test (teacher): ' in told and 'Student written to' in told
    assert text.index('Model test_resnet created') < text.index('A step is expected') < text.index('Train: 0')
    assert text.count('A step is expected') == 2, 'of the run that was resumed too'


def documented(heading):
    """First cells of the tables under a heading of docs/run_folder.md, as patterns of names."""
    text = Path(ROOT, 'docs', 'run_folder.md').read_text()
    section = text.split(f'\n## {heading}\n')[1].split('\n## ')[0]
    cells = [line.split('|')[1] for line in section.splitlines() if line.startswith('| `')]
    names = [name for cell in cells for name in re.findall(r'`([^`]+)`', cell)]
    return [re.sub(r'<\w+>', '.+', re.escape(name).replace(r'\<', '<').replace(r'\>', '>')) for name in names]


def test_every_file_and_every_column_is_documented(full):
    folder, _, _ = full
    names = documented('Files')
    for found in os.listdir(folder):
        assert any(re.fullmatch(name, f'{found}/' if (folder / found).is_dir() else found) for name in names), found
    columns = list(summary(folder)[0])
    names = documented('summary.csv')
    assert {'train_kd/logit', 'train_teacher_kd/logit', 'eval_static_top1', 'eval_gap'} <= set(columns)
    assert all(any(re.fullmatch(name, column) for name in names) for column in columns), columns


# -- TensorBoard and wandb ---------------------------------------------------------------------------------------------


def tracking(*arguments):
    return parse_train_args(['--resume', 'last.pth.tar', *arguments])


@pytest.mark.parametrize(
    'arguments, package',
    [(['--log-tensorboard'], 'tensorboard'), (['--log-wandb'], 'wandb')],
)
def test_a_missing_package_is_named(monkeypatch, arguments, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, 'torch.utils.tensorboard', raising=False)
    with pytest.raises(UsageError, match=f'^{arguments[0]} needs {package}: pip install {package}'):
        check_tracking(tracking(*arguments))
    check_tracking(tracking())


@pytest.mark.parametrize('arguments', [['--resume', ''], ['--log-wandb', '--resume', '']])
def test_a_wandb_run_is_continued_by_a_run_that_is_resumed(monkeypatch, arguments):
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace())
    with pytest.raises(UsageError, match='--wandb-resume-id .*: give --log-wandb and --resume'):
        check_tracking(tracking('--wandb-resume-id', 'abc', *arguments))
    check_tracking(tracking('--wandb-resume-id', 'abc', '--log-wandb'))


class FakeWandb:
    """What is used of the package; it notes its calls."""

    class Error(Exception):
        pass

    def __init__(self, fails=False):
        self.fails, self.calls, self.id = fails, [], 'a1b2'

    def init(self, **arguments):
        if self.fails:
            raise self.Error('No API key configured.\nUse `wandb login`.')
        self.calls.append(('init', arguments))
        return self

    def log(self, row):
        self.calls.append(('log', row))

    def finish(self, exit_code):
        self.calls.append(('finish', exit_code))


def test_wandb_gets_what_timm_sends(monkeypatch, tmp_path):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    args = tracking('--log-wandb', '--wandb-project', 'gpd', '--wandb-tags', 'a', 'b')
    with Tracker(args, str(tmp_path / 'run')) as tracker:
        tracker.log(row(0))
        tracker.log(row(1))
    (_, init), *logs = fake.calls
    assert init.pop('config') == vars(args)
    assert init == dict(project='gpd', name='run', tags=['a', 'b'], dir=str(tmp_path / 'run'))
    assert logs == [('log', row(0)), ('log', row(1)), ('finish', 0)]

    for error, code in ((KeyboardInterrupt(), 1), (RunEnded('preempted', 0), 0), (UsageError('no room'), 2)):
        fake.calls.clear()
        args = tracking('--log-wandb', '--wandb-resume-id', 'a1b2')
        with pytest.raises(type(error)), Tracker(args, 'run'):
            raise error
        (_, init), end = fake.calls
        assert init['id'] == 'a1b2' and init['resume'] == 'must' and end == ('finish', code)


def test_a_wandb_that_does_not_start_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', FakeWandb(fails=True))
    with pytest.raises(UsageError, match=r'^wandb: No API key configured\. \('):
        Tracker(tracking('--log-wandb'), 'run')


def test_other_processes_track_nothing(monkeypatch, tmp_path):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    args = tracking('--log-wandb', '--log-tensorboard')
    with Tracker(args, str(tmp_path / 'run'), is_primary=False) as tracker:
        tracker.log(row(0))
    assert not fake.calls and not list(tmp_path.iterdir())


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = tracking('--log-tensorboard')
    for start_epoch, epochs in ((0, (0, 1, 2)), (1, (1, 2, 3))):  # continued from the first epoch
        with Tracker(args, str(tmp_path), start_epoch) as tracker:
            for epoch in epochs:
                tracker.log(row(epoch, top1=10.0 * start_epoch + epoch, gpd_loss=1.0))
    events = EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    assert set(events.Tags()['scalars']) == {'train/loss', 'train/gpd_loss', 'eval/top1', 'lr'}
    assert [(event.step, event.value) for event in events.Scalars('eval/top1')] == [(0, 0), (1, 11), (2, 12), (3, 13)]


@pytest.mark.usefixtures('may_change_settings')  # it sets variables of the environment
def test_wandb_itself_takes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    with Tracker(tracking('--log-wandb', '--wandb-tags', 'test'), str(tmp_path)) as tracker:
        tracker.log(row(0))
    assert list(tmp_path.glob('wandb/offline-run-*/*.wandb'))
