"""What a person sees of a run: log lines, progress bar, log file, and the summary at the start."""

import io
import logging
import re
import sys
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.nn as nn
from timm.task import ClassificationTask

from steps import Batches
from timm_gpd import DistillationTask, GapPreservingTask, expand
from timm_gpd.errors import RunEnded, UsageError
from timm_gpd.training.checkpoints import Position
from timm_gpd.training.compute import create_compute
from timm_gpd.training.loop import LoopSettings, TrainingLoop
from timm_gpd.training.processes import Processes
from timm_gpd.training.report.log_file import LogFile
from timm_gpd.training.report.overview import count_macs, describe, expected_cost, measure_models
from timm_gpd.training.report.progress import Progress
from timm_gpd.training.student import InputConfig

STEP = dict(loss=2.5, loss_mean=2.25, lr=0.1, images=64, seconds=0.5, data_seconds=0.125)
TINY = InputConfig((1, 32, 32), (0.5,), (0.5,), 'bilinear', 1.0)


class Screen(io.StringIO):
    """A terminal, as far as a program can tell."""

    def isatty(self):
        return True


@contextmanager
def terminal(monkeypatch):
    """A terminal as stderr, and timm's log handler on it. Not a fixture: pytest changes stderr after those."""
    screen, level = Screen(), logging.root.level
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stderr', screen)
        patch.setenv('COLUMNS', '120')  # older versions of tqdm cut what is longer than a line
        handler = logging.StreamHandler()
        logging.root.addHandler(handler)
        logging.root.setLevel(logging.INFO)
        try:
            yield screen
        finally:
            logging.root.removeHandler(handler)
            logging.root.setLevel(level)


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def run_epoch(progress, epoch, updates, **changes):
    for update in range(updates):
        progress.step(epoch, update, **{**STEP, **changes})


def test_log_lines_are_timms(lines):
    with Progress(2, 5, log_interval=2) as progress:
        progress.step(0, 0, **{**STEP, 'seconds': 1.5, 'data_seconds': 0.375})
        progress.step(0, 1, **STEP)
        progress.step(0, 2, **{**STEP, 'images': 32})
        progress.step(0, 4, **STEP)
        progress.step(1, 0, **STEP)
    assert lines() == [
        'Train: 0 [   0/5 ( 20%)]  Loss: 2.50 (2.25)  Time: 1.500s,   42.67/s  (1.500s,   42.67/s)  LR: 1.000e-01  '
        'Data: 0.375 (0.375)',
        'Train: 0 [   2/5 ( 60%)]  Loss: 2.50 (2.25)  Time: 0.500s,   64.00/s  (0.833s,   38.40/s)  LR: 1.000e-01  '
        'Data: 0.125 (0.208)',
        'Train: 0 [   4/5 (100%)]  Loss: 2.50 (2.25)  Time: 0.500s,  128.00/s  (0.750s,   85.33/s)  LR: 1.000e-01  '
        'Data: 0.125 (0.188)',
        'Train: 1 [   0/5 ( 20%)]  Loss: 2.50 (2.25)  Time: 0.500s,  128.00/s  (0.500s,  128.00/s)  LR: 1.000e-01  '
        'Data: 0.125 (0.125)',
    ]


def test_other_processes_are_silent(lines, monkeypatch):
    with terminal(monkeypatch) as screen, Progress(1, 2, log_interval=1, is_primary=False) as progress:
        run_epoch(progress, 0, 2)
        progress.validated({'top1': 50.0})
    assert not lines() and not screen.getvalue()


def test_a_terminal_shows_a_bar_and_log_files_get_all(monkeypatch, lines):
    with terminal(monkeypatch) as screen:
        with Progress(3, 4, log_interval=1) as progress:
            run_epoch(progress, 0, 4)
            progress.validated({'top1': 51.5, 'teacher_top1': 53.25, 'gap': 1.75, 'loss': 1.0})
            run_epoch(progress, 1, 4, loss_mean=1.125)
            logging.getLogger('timm').warning('mind the gap')
            logging.getLogger('train').info('all is well')
            bar = str(progress.bar)
            progress.validated({'top1': 52.5})
            assert ', student 52.50, 128 img/s' in str(progress.bar)
        text = screen.getvalue()
        logging.getLogger('train').info('afterwards')
        assert screen.getvalue() == f'{text}afterwards\n'
    assert re.fullmatch(
        r'epoch 1/2  67%\|.*\| \d\d:\d\d left, loss 1.12, student 51.50, teacher 53.25, 128 img/s', bar
    ), bar
    assert 'epoch 0: loss 2.25, student 51.50, teacher 53.25, gap 1.75\n' in text
    assert 'mind the gap\n' in text and 'all is well' not in text and 'Train:' not in text
    assert 'all is well' in lines() and len([line for line in lines() if line.startswith('Train: ')]) == 8


def test_time_left_counts_validations_and_not_what_was_done_before(monkeypatch):
    with terminal(monkeypatch), Progress(4, 10, updates_done=20) as progress:
        progress.bar.mininterval = 0.0  # it measures the speed of every update
        progress.bar.start_t -= 60.0  # ten updates and a validation took a minute
        run_epoch(progress, 2, 10)
        match = re.search(r'epoch 2/3  75%\|.*\| (\d\d):(\d\d) left', str(progress.bar))
    assert 60 <= 60 * int(match[1]) + int(match[2]) <= 62


class Recorder(Progress):
    def __init__(self):
        super().__init__(1, 2)
        self.steps = []

    def step(self, *arguments):
        self.steps.append(arguments)


@pytest.mark.parametrize('world_size', [1, 2])
def test_the_loop_tells_every_update(tiny_student, world_size):
    task = ClassificationTask(tiny_student, nn.CrossEntropyLoss(), verbose=False)
    data = Batches((torch.randn(size, 1, 32, 32), torch.randint(10, (size,))) for size in (4, 4, 2))
    optimizer = torch.optim.SGD(tiny_student.parameters(), lr=0.25)
    compute, recorder = create_compute('cpu'), Recorder()
    processes = Processes(compute.device)
    loop = TrainingLoop(task, data, optimizer, compute, processes, LoopSettings(grad_accum_steps=2), progress=recorder)
    loop.processes = Processes(compute.device, world_size=world_size)  # whose images are counted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, 'sum', lambda self, numbers: numbers)
        loop.train_epoch(Position())
    assert [step[:2] for step in recorder.steps] == [(0, 0), (0, 1)]
    assert [step[5] for step in recorder.steps] == [8 * world_size, 2 * world_size]
    for _, _, loss, mean, lr, _, seconds, data_seconds in recorder.steps:
        assert 0 < loss < 10 and 0 < mean < 10 and lr == 0.25 and 0 <= data_seconds < seconds < 60


def test_the_log_file_has_what_came_before_it_and_what_ended_the_run(tmp_path, lines):
    path = tmp_path / 'train.log'
    logger = logging.getLogger('train')
    for part, error in (('one', UsageError('no room')), ('two', RunEnded('SIGTERM', 0)), ('three', KeyError('bug'))):
        with pytest.raises(type(error)), LogFile() as log:
            logger.info(f'{part}: before')
            log.open(str(path))
            logger.info(f'{part}: after')
            raise error
    text = [line.split(' - ')[-1] for line in path.read_text().splitlines()]
    assert text[:7] == [
        'one: before',
        'one: after',
        'The run ended: no room',
        'two: before',
        'two: after',
        'The run ended: SIGTERM',
        'three: before',
    ]
    assert text[8] == 'The run ended: Traceback (most recent call last):' and text[-1] == "KeyError: 'bug'"
    assert 'The run ended' not in ''.join(lines())  # the program prints it
    assert not any(isinstance(handler, LogFile) for handler in logging.root.handlers)


def test_without_a_file_nothing_is_written_and_a_full_disk_is_said_once(tmp_path, lines):
    with LogFile():
        logging.getLogger('train').info('not a primary process')
    assert not list(tmp_path.iterdir())
    with LogFile() as log:
        logging.getLogger('train').info('before')
        log.open('/dev/full')
        logging.getLogger('train').info('after')
    assert [line for line in lines() if 'train.log' in line] == [
        'train.log is not written any more: No space left on device'
    ]
    assert lines()[-1] == 'after'


# -- sizes -------------------------------------------------------------------------------------------------------------


def macs_of_layers(model, images):
    """Of convolutions and linear layers, counted by hooks."""
    counts = []

    def count(module, inputs, output):
        counts.append(output.numel() * module.weight[0].numel())

    hooks = [
        module.register_forward_hook(count) for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return sum(counts)


def test_macs_are_those_of_the_layers_and_the_mode_stays(tiny_student):
    images = torch.zeros(2, 1, 32, 32)
    expected = macs_of_layers(tiny_student.eval(), images)
    tiny_student.train()
    before = {name: buffer.clone() for name, buffer in tiny_student.named_buffers()}
    assert count_macs(tiny_student, images) == expected > 0
    assert all(module.training for module in tiny_student.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in tiny_student.named_buffers())


def test_attention_is_counted_fused_or_not():
    model = timm.create_model('test_vit', img_size=64)
    images = torch.zeros(1, 3, 64, 64)
    tokens, width = model.pos_embed.shape[1], model.embed_dim
    attention = len(model.blocks) * 2 * tokens * tokens * width
    assert count_macs(model, images) == macs_of_layers(model.eval(), images) + attention
    for block in model.blocks:
        block.attn.fused_attn = not block.attn.fused_attn
    assert count_macs(model, images) == macs_of_layers(model, images) + attention


@pytest.mark.parametrize('branches', [1, 6])
def test_models_of_a_run_and_what_they_cost(tiny_student, branches):
    static = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    images = torch.zeros(1, 1, 32, 32)
    student, wide, teacher = (
        macs_of_layers(model.eval(), images)
        for model in (
            tiny_student,
            GapPreservingTask(tiny_student, verbose=False).get_dynamic_teacher().extract_teacher(),
            static,
        )
    )
    gpd = GapPreservingTask(tiny_student, static, num_branches=branches, distill_type='logit,reviewkd', verbose=False)
    sizes = measure_models(gpd, TINY)
    assert {name: size.macs for name, size in sizes.items()} == {
        'student': student,
        'dynamic teacher': wide,
        'static teacher': teacher,
    }
    assert sizes['student'].parameters == sum(p.numel() for p in tiny_student.parameters())
    assert 3 < sizes['dynamic teacher'].parameters / sizes['student'].parameters < 4
    assert expected_cost(sizes) == pytest.approx(1 + wide / student + teacher / (3 * student))
    distilled = measure_models(DistillationTask(tiny_student, static, verbose=False), TINY)
    assert list(distilled) == ['student', 'static teacher']
    assert expected_cost(distilled) == pytest.approx(1 + teacher / (3 * student))
    trained = sum(p.numel() for p in gpd.get_trainable_module().parameters())
    text = '\n'.join(describe(gpd, TINY))
    assert f'{trained:,} parameters' in text and f'{expected_cost(sizes):.1f} x plain' in text
    for name, size in sizes.items():
        assert re.search(rf'^{name} +{size.parameters:,} ', text, re.MULTILINE)


@pytest.mark.parametrize(
    'arguments, shares',
    [
        (dict(ratio=3, method='sandwich', between=1), {3: 1, 2: 1}),
        (dict(ratio=4, method='sandwich', between=1), {4: 1, 2: 1 / 2, 3: 1 / 2}),
        (dict(ratio=3, method='netaug'), {2: 1 / 2, 3: 1 / 2}),
        (dict(ratio=2, method='netaug'), {2: 1}),
    ],
)
def test_ratios_that_are_drawn_cost_their_share(tiny_student, arguments, shares):
    task = GapPreservingTask(tiny_student, verbose=False, **arguments)
    modes = [module.training for module in task.modules()]
    sizes = measure_models(task, TINY)
    assert [module.training for module in task.modules()] == modes
    images = torch.zeros(1, 1, 32, 32)
    plain = {ratio: expand(tiny_student, ratio, noise=0.0).extract_teacher().eval() for ratio in shares}
    cost = sum(share * macs_of_layers(plain[ratio], images) for ratio, share in shares.items())
    assert expected_cost(sizes) == pytest.approx(1 + cost / macs_of_layers(tiny_student.eval(), images))
    for ratio, model in plain.items():
        name = 'dynamic teacher' if ratio == arguments['ratio'] else f'ratio {ratio}'
        assert sizes[name].parameters == sum(parameter.numel() for parameter in model.parameters())
        assert re.search(rf'^{name} +{sizes[name].parameters:,} ', '\n'.join(describe(task, TINY)), re.MULTILINE)


def test_parameters_that_are_passed_to_modules_do_not_stop_the_count():
    model = timm.create_model('pit_ti_224', depth=(1, 1, 1), num_classes=10)  # its tokens are
    assert count_macs(model, torch.zeros(1, 3, 224, 224)) > 0
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_plain_training_costs_a_plain_step(tiny_student):
    task = ClassificationTask(tiny_student, nn.CrossEntropyLoss(), verbose=False)
    assert expected_cost(measure_models(task, TINY)) == 1
    assert describe(task, TINY)[-1] == 'This is plain training.'
