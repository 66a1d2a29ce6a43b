"""The parts of the scripts, each for the values that it computes."""

import os

import pytest
import timm
import torch
from timm.task import ClassificationTask, DistillationTeacher

from programs import ROOT
from steps import train_epoch
from timm_gpd import GapPreservingTask
from timm_gpd.training.args import parse_train_args, parse_validate_args
from timm_gpd.training.compute import create_compute
from timm_gpd.training.data.datasets import resolve_data
from timm_gpd.training.data.loaders import create_train_loader
from timm_gpd.training.optimizer import resolve_lr
from timm_gpd.training.schedule import create_schedule
from timm_gpd.training.student import InputConfig, create_student, resolve_input
from timm_gpd.training.task import create_task, get_student, get_validation_models

CPU = create_compute('cpu')


def batches(count, size=4):
    return [(torch.randn(size, 3, 64, 64), torch.randint(10, (size,))) for _ in range(count)]


def make_task(gpd, model='test_vit', **kwargs):
    """Of a student without statistics of the batch, so that an update is a sum over images."""
    torch.manual_seed(0)
    student = timm.create_model(model, num_classes=10, **({'img_size': 64} if 'vit' in model else {}))
    if gpd:
        return GapPreservingTask(student, verbose=False, **kwargs)
    return ClassificationTask(student, torch.nn.CrossEntropyLoss(), verbose=False)


def parameters(task):
    return torch.cat([parameter.detach().flatten() for parameter in task.get_trainable_module().parameters()])


def step(task, data, compute=CPU, lr=0.1, **settings):
    """One epoch of plain SGD: the update of the parameters, and the means of the losses."""
    before = parameters(task)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=lr)
    metrics = train_epoch(task, data, optimizer, compute, **settings)
    return parameters(task) - before, metrics


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize('parse', [parse_train_args, parse_validate_args])
def test_arguments_stay_as_they_were_given(parse):
    args = parse(['images', '--num-classes', '3'])
    for name in ('num_classes', 'new'):
        with pytest.raises(AttributeError, match=f'arguments are read-only: {name} '):
            setattr(args, name, 4)
    with pytest.raises(AttributeError, match='arguments are read-only: num_classes '):
        del args.num_classes
    assert args.num_classes == 3 and args.data_dir == 'images' and not hasattr(args, 'new')


@pytest.mark.parametrize('gpd', [False, True])
def test_accumulated_batches_are_one_batch(gpd):
    data = batches(2)
    whole = [tuple(torch.cat(parts) for parts in zip(*data))]
    update, metrics = step(make_task(gpd), data, grad_accum_steps=2)
    expected, expected_metrics = step(make_task(gpd), whole)
    assert relative(update, expected) < 1e-4 < relative(step(make_task(gpd), data[:1])[0], expected)
    assert metrics == pytest.approx(expected_metrics, rel=1e-4)


def test_the_last_update_of_an_epoch_has_the_batches_that_are_left():
    data = batches(3)
    update, _ = step(make_task(True), data, grad_accum_steps=2)
    task = make_task(True)
    first, _ = step(task, data[:2], grad_accum_steps=2)
    second, _ = step(task, data[2:])
    assert relative(update, first + second) < 1e-4


def test_a_task_is_told_where_training_stands():
    told, task = [], make_task(gpd=True)
    task.begin_update = lambda *where: told.append(where)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    train_epoch(task, batches(5), optimizer, CPU, epoch=1, num_epochs=2, grad_accum_steps=2)
    assert told == [(3, 0.5), (3, 0.5), (4, 4 / 6), (4, 4 / 6), (5, 5 / 6)]


@pytest.mark.parametrize('gpd', [False, True])
def test_clipping(gpd):
    data = batches(1)
    free, _ = step(make_task(gpd), data)
    assert free.norm() > 0.1 * 0.5
    by_norm, _ = step(make_task(gpd), data, clip_grad=0.5)
    assert by_norm.norm().item() == pytest.approx(0.1 * 0.5, rel=1e-3)
    assert relative(by_norm / by_norm.norm(), free / free.norm()) < 1e-3
    by_value, _ = step(make_task(gpd), data, clip_grad=1e-3, clip_mode='value')
    assert by_value.abs().max().item() == pytest.approx(1e-4, rel=1e-2)
    small = free.abs() < 0.5e-4
    assert relative(by_value[small], free[small]) < 1e-2
    loose, _ = step(make_task(gpd), data, clip_grad=1e6)
    assert relative(loose, free) < 1e-5


@pytest.mark.parametrize('gpd', [False, True])
def test_bfloat16_is_close_and_parameters_stay_whole(gpd):
    data = batches(1)
    compute = create_compute('cpu', amp=True, amp_dtype='bfloat16')
    assert compute.loss_scaler is None
    task = make_task(gpd)
    with compute.autocast():
        assert task(*data[0])['output'].dtype == torch.bfloat16
    update, metrics = step(make_task(gpd), data, compute)
    expected, expected_metrics = step(make_task(gpd), data)
    assert update.dtype == torch.float32 and 1e-5 < relative(update, expected) < 0.1
    assert metrics['loss'] == pytest.approx(expected_metrics['loss'], rel=1e-2)


def test_float16_scales_the_loss():
    assert create_compute('cpu', amp=True).loss_scaler is not None and CPU.loss_scaler is None


@pytest.mark.parametrize('gpd', [False, True])
def test_channels_last_computes_the_same(gpd):
    data = batches(1, size=8)
    compute = create_compute('cpu', channels_last=True)
    assert compute.prepare(*data[0])[0].is_contiguous(memory_format=torch.channels_last)
    task = make_task(gpd, 'test_resnet')
    compute.place(task.get_trainable_module())
    _, metrics = step(task, data, compute, lr=0.0)
    _, expected = step(make_task(gpd, 'test_resnet'), data, lr=0.0)
    assert metrics == pytest.approx(expected, rel=1e-4)


def digits(tmp_path, *arguments):
    return parse_train_args(
        [
            '-c',
            os.path.join(ROOT, 'configs', 'digits.yaml'),
            '--data-dir',
            str(tmp_path.parent / 'data'),
            '--digits-train-size',
            '100',
            *arguments,
        ]
    )


@pytest.mark.parametrize('prefetcher', [True, False])
def test_mixed_images_have_mixed_targets(tmp_path, prefetcher):
    args = digits(tmp_path, '--mixup', '1.0', *([] if prefetcher else ['--no-prefetcher']))
    input_config = resolve_input(args, create_student(args))
    loader, mixup_fn = create_train_loader(args, resolve_data(args), input_config, 10, CPU.device)
    assert (mixup_fn is None) == prefetcher
    images, target = next(iter(loader))
    if mixup_fn is not None:
        images, target = mixup_fn(images, target)
    assert images.shape == (50, 1, 32, 32) and target.shape == (50, 10)
    assert torch.allclose(target.sum(1), torch.ones(50)) and set((target > 0).sum(1).tolist()) == {1, 2}


def test_input_and_data_are_values_of_their_own(tmp_path):
    args = digits(tmp_path)
    given = dict(vars(args))
    student = create_student(args)
    config = resolve_input(args, student)
    assert config == InputConfig((1, 32, 32), (0.5,), (0.5,), 'bilinear', 1.0)
    source = resolve_data(args)
    assert source.dataset == '' and source.folder == str(tmp_path.parent / 'data' / 'digits-100-42')
    assert student.pretrained_cfg['input_size'] == (3, 160, 160) and vars(args) == given


@pytest.mark.parametrize(
    'arguments, lr',
    [
        (['--lr', '0.3'], 0.3),
        (['-b', '64', '--grad-accum-steps', '2', '--lr-base', '0.2', '--lr-base-size', '512'], 0.2 * 128 / 512),
        (['-b', '64', '--opt', 'adamw', '--lr-base', '0.2', '--lr-base-size', '256'], 0.2 * 0.5),
    ],
)
def test_learning_rate(arguments, lr):
    args = parse_train_args(arguments)
    assert resolve_lr(args) == pytest.approx(lr) and args.lr == (0.3 if '--lr' in arguments else None)


@pytest.mark.parametrize('on', ['epochs', 'updates'])
def test_a_schedule_starts_at_the_epoch_of_the_run(on):
    flags = ['--sched-on-updates'] if on == 'updates' else []
    args = parse_train_args(['--epochs', '10', '--warmup-epochs', '0', *flags])

    def rate(start_epoch):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler, num_epochs = create_schedule(args, optimizer, 7, start_epoch, lower_is_better=False)
        assert num_epochs == 10
        return optimizer.param_groups[0]['lr']

    assert rate(0) == pytest.approx(1.0) and rate(5) == pytest.approx(0.5)  # half of a cosine


@pytest.mark.parametrize('gpd', [False, True])
def test_the_static_teacher_is_made_once(tmp_path, monkeypatch, gpd):
    torch.save(timm.create_model('test_resnet', num_classes=10).state_dict(), tmp_path / 'teacher.pth')
    made, init = [], DistillationTeacher.__init__

    def count(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTeacher, '__init__', count)
    args = parse_train_args(
        [
            '--model',
            'test_resnet',
            '--num-classes',
            '10',
            '--kd-model-name',
            'test_resnet',
            '--kd-model-path',
            str(tmp_path / 'teacher.pth'),
            *(['--gpd'] if gpd else []),
        ]
    )
    task = create_task(args, create_student(args), CPU.device)
    assert len(made) == 1 and task.teacher.teacher is made[0]
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())


@pytest.mark.parametrize('ema', [False, True])
@pytest.mark.parametrize('gpd', [False, True])
def test_models_to_validate_are_plain_ones(gpd, ema):
    task = make_task(gpd, 'test_resnet')
    if ema:
        task.setup_ema(decay=0.5)
        step(task, batches(1))
        task.update_ema(step=5)
    x = torch.randn(2, 3, 64, 64)
    models = get_validation_models(task, ema)
    assert list(models) == (['', 'teacher_'] if gpd else [''])
    expected = task.get_eval_model(ema=ema)
    for student in (models[''], get_student(task, ema)):
        assert type(student) is type(timm.create_model('test_resnet'))
        with torch.no_grad():
            assert torch.allclose(student.eval()(x), expected.eval()(x), atol=1e-5)
    if gpd:
        dynamic_teacher = task.get_dynamic_teacher(ema=ema).eval()
        with torch.no_grad():
            assert torch.allclose(models['teacher_'].eval()(x), dynamic_teacher(x), atol=1e-5)
