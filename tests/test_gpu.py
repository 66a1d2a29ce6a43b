"""What users run, on a GPU: skipped where there is none."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch

from conftest import TINY_RESNET
from programs import ROOT, quick_arguments, run, summary, train
from timm_gpd import DistillationTask, GapPreservingTask, StaticTeacherConfig, expand

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
ON_GPU = ['--device', 'cuda']


def make_task(device, **kwargs):
    torch.manual_seed(0)
    student = timm.create_model('test_resnet', **TINY_RESNET).double()
    static = timm.create_model('test_vit', num_classes=10, in_chans=1, img_size=32).double()
    for model in (student, static):
        model.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    return GapPreservingTask(student.to(device), static, device=torch.device(device), verbose=False, **kwargs).train()


def take_step(task, device):
    """Loss, gradients and the student of a task, on the CPU."""
    torch.manual_seed(1)
    images, target = torch.randn(8, 1, 32, 32, dtype=torch.float64), torch.arange(8)
    loss = task(images.to(device), target.to(device))['loss']
    loss.backward()
    gradients = {name: parameter.grad.cpu() for name, parameter in task.get_trainable_module().named_parameters()}
    return loss.item(), gradients, task.get_dynamic_teacher().extract_student().cpu().state_dict()


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(num_branches=6, distill_type='dkd,reviewkd,nd'),
        dict(distill_type='kd,ofa', scale='balanced', share_weight=0.5),
        dict(ratio=3, noise=0.0, distill_type='dist', method='sandwich'),
    ],
    ids=lambda kwargs: ' '.join(map(str, kwargs.values())),
)
def test_a_step_is_that_of_the_cpu(kwargs):
    here, there = make_task('cpu', **kwargs), make_task('cuda', **kwargs)
    # Branches and distillers start at random, which every device draws in its own way.
    there.get_trainable_module().load_state_dict(here.get_trainable_module().state_dict())
    loss, gradients, student = take_step(there, 'cuda')
    expected_loss, expected_gradients, expected_student = take_step(here, 'cpu')
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    torch.testing.assert_close(student, expected_student)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-7, atol=1e-10 * largest, msg=name)


@pytest.mark.parametrize('task_class', [DistillationTask, GapPreservingTask])
def test_a_static_teacher_on_another_device(task_class):
    """The student is on the GPU and the teacher is not: the losses are those with both there."""
    losses = []
    for device in ('cpu', None):
        torch.manual_seed(0)
        student = timm.create_model('test_resnet', **TINY_RESNET).double().cuda()
        static = timm.create_model('test_vit', num_classes=20, in_chans=1, img_size=48).double()
        given = StaticTeacherConfig(static, img_size=48, class_map=range(10, 20), device=device)
        task = task_class(student, given, distill_type='kd,at', device=torch.device('cuda'), verbose=False).train()
        assert {parameter.device.type for parameter in task.teacher.parameters()} == {device or 'cuda'}
        torch.manual_seed(1)
        result = task(torch.randn(8, 1, 32, 32, dtype=torch.float64).cuda(), torch.arange(8).cuda())
        losses.append([result['kd/kd'].item(), result['kd/at'].item()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)


@pytest.fixture(scope='module')
def on_cpu(tmp_path_factory):
    """Summaries of a run on the CPU: of GPD, and of GPD with a static teacher."""
    folder = tmp_path_factory.mktemp('cpu')
    train(folder, '--experiment', 'gpd')
    train(folder, '--experiment', 'static', *static_teacher(folder))
    return {kind: summary(folder / kind) for kind in ('gpd', 'static')}


def static_teacher(folder):
    torch.manual_seed(0)
    teacher = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    torch.save(teacher.state_dict(), folder / 'teacher.pth')
    return ['--kd-model-name', 'test_resnet', '--kd-model-path', folder / 'teacher.pth', '--kd-distill-type', 'dkd']


@pytest.mark.parametrize('kind', ['gpd', 'static'])
@pytest.mark.parametrize(
    'flags, tolerance',
    [
        ('', 2e-3),
        ('--amp', 0.03),
        ('--amp --amp-dtype bfloat16 --fast-norm', 0.05),
        ('--model-dtype bfloat16', 0.1),
        ('--channels-last', 2e-3),
        ('--torchcompile', 2e-3),
        ('--grad-checkpointing', 2e-3),
        ('--amp --torchcompile --channels-last --model-ema', 0.03),
    ],
)
def test_train_validate_and_load_elsewhere(flags, tolerance, kind, on_cpu, tmp_path):
    """A run's first epoch loses what the CPU's does; its student is what ``validate.py`` measures, and a timm model."""
    extra = static_teacher(tmp_path) if kind == 'static' else []
    train(tmp_path, '--experiment', 'run', *ON_GPU, *flags.split(), *extra)
    rows = summary(tmp_path / 'run')
    for key in ('train_loss', 'train_teacher_task_loss'):
        assert float(rows[0][key]) == pytest.approx(float(on_cpu[kind][0][key]), rel=tolerance)
    folder = tmp_path / 'run' / 'student'
    student = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    images = torch.randn(2, *student.pretrained_cfg['input_size'])
    with torch.no_grad():
        torch.testing.assert_close(student.cuda()(images.cuda()).cpu(), student.cpu()(images), rtol=1e-3, atol=1e-3)
    data = ['--dataset', 'digits', '--data-dir', tmp_path.parent / 'data', '--digits-train-size', '100']
    result = run('validate.py', '--model', f'local-dir:{folder}', *data, '--workers', '0', *ON_GPU)
    top1 = json.loads(result.stdout.partition('--result\n')[2])['top1']
    # In half precision an image or two may fall on the other side.
    trained = [float(row['eval_top1']) for row in rows]
    assert min(abs(top1 - each) for each in trained) <= (1 if '--amp' in flags or 'bfloat16' in flags else 1e-3)


def test_a_run_goes_on_where_it_stopped(tmp_path):
    flags = ['--drop-path', '0.1', '--mixup', '0.5', '--model-ema', '--amp', '--epochs', '4', *ON_GPU]
    train(tmp_path, '--experiment', 'whole', *flags)
    train(tmp_path, '--experiment', 'pieces', *flags, '--stop-epoch', '2')
    train(tmp_path, '--experiment', 'pieces', *flags, '--resume', 'auto')
    whole, pieces = (torch.load(tmp_path / name / 'last.pth.tar', weights_only=False) for name in ('whole', 'pieces'))
    for key, value in whole['state_dict'].items():
        torch.testing.assert_close(pieces['state_dict'][key], value, rtol=1e-2, atol=1e-3, msg=key)
    assert pieces['amp_scaler'] == whole['amp_scaler']
    assert [row['epoch'] for row in summary(tmp_path / 'pieces')] == ['0', '1', '2', '3']


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_a_student_on_the_gpu_expands(memory_format):
    """Convolutions of images there are TensorFloat32 by default, which rounds a thousand times as much."""
    student = timm.create_model('resnet18').cuda().to(memory_format=memory_format)
    teacher = expand(student, num_branches=6)
    images = torch.randn(4, 3, 128, 128, device='cuda').to(memory_format=memory_format)
    student.eval(), teacher.eval()
    with torch.no_grad():
        outputs = teacher.joint(images)
        torch.testing.assert_close(outputs.student, student(images), rtol=0.01, atol=0.01)
        torch.testing.assert_close(outputs.teacher, outputs.student, rtol=0.01, atol=0.01)
    assert torch.backends.cudnn.allow_tf32


def test_out_of_memory_is_one_line(tmp_path):
    """A share of the GPU's memory that cannot hold the first step."""
    program = 'import runpy, sys, torch; torch.cuda.set_per_process_memory_fraction(0.004); sys.argv = sys.argv[1:]; '
    program += 'runpy.run_path(sys.argv[0], run_name="__main__")'
    arguments = [*quick_arguments(tmp_path), *ON_GPU, '-b', '100']
    arguments += ['--model-kwargs', 'channels=[512,512,512,512]', 'stem_width=256']
    result = subprocess.run(
        [sys.executable, '-c', program, os.path.join(ROOT, 'train.py'), *map(str, arguments)],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([ROOT, os.environ.get('PYTHONPATH', '')])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2, result.stderr[-3000:]
    last = result.stderr.strip().splitlines()[-1]
    assert 'out of memory with batches of 100: lower --batch-size' in last and 'Traceback' not in result.stderr


def test_stored_outputs_are_those_of_the_gpu_and_leave_its_memory_alone(tmp_path):
    def stored():
        torch.manual_seed(0)
        student = timm.create_model('test_resnet', **TINY_RESNET)
        static = timm.create_model('test_vit', num_classes=10, in_chans=1, img_size=32)
        for model in (student, static):
            model.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
        config = StaticTeacherConfig(static, cache=str(tmp_path))
        return DistillationTask(student.cuda(), config, device=torch.device('cuda'), verbose=False).static_teacher

    images = torch.randn(8, 1, 32, 32, device='cuda')
    first = stored()
    expected = first(images).logits
    second = stored()
    found = second(images).logits
    assert found.device.type == 'cuda' and torch.equal(found, expected) and second.computed == 0
    assert {parameter.device.type for parameter in second.static.teacher.parameters()} == {'cpu'}
    torch.testing.assert_close(second(images + 1).logits, second.static(images + 1).logits)
    assert {parameter.device.type for parameter in second.static.teacher.parameters()} == {'cuda'}
