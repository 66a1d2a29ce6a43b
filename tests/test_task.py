"""The task: its losses, its checkpoints, its average, its static teacher."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver

from conftest import TINY_RESNET
from steps import batch, train
from timm_gpd import GapPreservingTask
from timm_gpd.errors import InputError
from timm_gpd.losses import GPD_LOSSES, dist_loss, dkd_loss, kd_loss, nkd_loss, ofa_loss, rld_loss, wttm_loss
from timm_gpd.task.gpd_loss import WeightSchedule


def make_task(student, **kwargs):
    return GapPreservingTask(student, verbose=False, **kwargs).train()


@pytest.mark.parametrize('gpd_loss', list(GPD_LOSSES))
def test_loss_is_the_sum_of_its_terms(tiny_student, gpd_loss):
    static = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    static.pretrained_cfg.update(mean=(0.3,), std=(0.2,))
    task = make_task(
        tiny_student,
        static_teacher=static,
        gpd_loss=gpd_loss,
        gpd_weight=2.0,
        distill_loss_weight=0.7,
        task_loss_weight=0.3,
        temperature=2.0,
    )
    assert isinstance(task, TrainingTask)
    x, target = batch()
    result = task(x, target)
    student, teacher = result['output'], result['teacher_output']
    static.eval()
    # The student's images are normalised by 0.5 and 0.5, the static teacher's by its own mean and deviation.
    static_logits = static((x * 0.5 + 0.5 - 0.3) / 0.2)

    def kl(a, b, temperature):
        log_a, log_b = F.log_softmax(a / temperature, 1), F.log_softmax(b / temperature, 1)
        return (log_b.exp() * (log_b - log_a)).sum(1).mean() * temperature**2

    labels = teacher.softmax(1)
    gap = {
        'sce': -((0.9 * labels + 0.01) * F.log_softmax(student, 1)).sum(1).mean(),
        'ce': -(labels * F.log_softmax(student, 1)).sum(1).mean(),
        'kl': kl(student, teacher, 1.0),
        'dkd': dkd_loss(student, teacher, target),
        'rld': rld_loss(student, teacher, target),
        'nkd': nkd_loss(student, teacher, target),
        'wttm': wttm_loss(student, teacher),
        'dist': dist_loss(student, teacher),
        'ofa': ofa_loss(student, teacher, target),
        'mse': ((student - teacher) ** 2).mean(),
        'l1': (student - teacher).abs().mean(),
    }[gpd_loss]
    expected = (
        0.3 * (F.cross_entropy(student, target) + F.cross_entropy(teacher, target))
        + 0.7 * (kl(student, static_logits, 2.0) + kl(teacher, static_logits, 2.0))
        + 2.0 * gap
    )
    torch.testing.assert_close(result['loss'], expected)
    assert set(result) == {
        'loss',
        'output',
        'teacher_output',
        'task_loss',
        'teacher_task_loss',
        'gpd_loss',
        'kd/logit',
        'teacher_kd/logit',
    }


def test_hyperparameters_of_the_loss_between_the_two(tiny_student):
    task = make_task(tiny_student, gpd_loss='kl', gpd_loss_args={'temperature': 2, 'standardize': 'true'})
    result = task(*batch())
    expected = kd_loss(result['output'], result['teacher_output'].detach(), temperature=2, standardize=True)
    torch.testing.assert_close(result['gpd_loss'], expected)
    for gpd_loss, arguments, problem in (
        ('kl', {'beta': 1}, 'beta is no hyperparameter of gpd_loss kl: choose of temperature, standardize'),
        ('mse', {'beta': 1}, 'beta is no hyperparameter of gpd_loss mse: it has none'),
        ('kl', {'standardize': 2}, 'kl.standardize must be true or false'),
        ('dkd', {'temperature': 0}, 'dkd.temperature must be more than 0'),
    ):
        with pytest.raises(InputError, match=problem):
            GapPreservingTask(tiny_student, gpd_loss=gpd_loss, gpd_loss_args=arguments, verbose=False)


@pytest.mark.parametrize('kind, half', [('constant', 3.0), ('linear', 2.0), ('cosine', 2.0)])
def test_the_weight_of_that_loss_goes_with_training(tiny_student, kind, half):
    task = make_task(tiny_student, gpd_weight=3.0, gpd_weight_schedule=kind, gpd_weight_end=1.0)
    x, target = batch()
    for progress, weight in ((0.0, 3.0), (0.5, half), (1.0, 3.0 if kind == 'constant' else 1.0)):
        task.begin_update(0, progress)
        result = task(x, target)
        terms = result['task_loss'] + result['teacher_task_loss'].detach() + weight * result['gpd_loss']
        torch.testing.assert_close(result['loss'], terms)
    early, late = (WeightSchedule(kind, 3.0, 1.0).at(progress) for progress in (0.25, 0.75))
    assert early >= half >= late and (kind == 'constant') == (early == late)


def test_the_student_does_not_teach_the_teacher(tiny_student):
    result = make_task(tiny_student)(*batch())
    result['gpd_loss'].backward()  # reaches the student alone, or it would raise


def test_a_loss_on_the_teachers_output_is_refused(tiny_student):
    """It would train nothing, without a word."""
    for term in ('teacher_output', 'teacher_task_loss'):
        result = make_task(tiny_student)(*batch())
        with pytest.raises(RuntimeError, match='no gradient any more.*part of the criterion'):
            (result['loss'] + result[term].mean()).backward()
    with torch.no_grad():
        assert not make_task(tiny_student)(*batch())['teacher_output'].requires_grad


def test_mixup_targets(tiny_student):
    x, target = batch()
    soft = F.one_hot(target, 10) * 0.6 + F.one_hot(target.flip(0), 10) * 0.4
    result = make_task(tiny_student, criterion=SoftTargetCrossEntropy())(x, soft)
    for loss, logits in (('task_loss', 'output'), ('teacher_task_loss', 'teacher_output')):
        expected = 0.6 * F.cross_entropy(result[logits], target) + 0.4 * F.cross_entropy(result[logits], target.flip(0))
        torch.testing.assert_close(result[loss], expected)


def test_weights_follow_timm():
    student = timm.create_model('test_resnet', **TINY_RESNET)
    task = make_task(student, static_teacher=copy.deepcopy(student), task_loss_weight=0.2)
    assert (task.task_loss_weight, task.distill_loss_weight) == (0.2, 0.8)
    task = make_task(student, static_teacher=copy.deepcopy(student), distill_loss_weight=0.5)
    assert (task.task_loss_weight, task.distill_loss_weight) == (1.0, 0.5)


def test_static_teacher_must_know_the_same_classes(tiny_student):
    with pytest.raises(ValueError, match='static teacher has 7 classes and the student 10'):
        make_task(tiny_student, static_teacher=timm.create_model('test_resnet', num_classes=7, in_chans=1))


def test_static_teacher_is_not_trained(tiny_student):
    static = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    static.pretrained_cfg.update(mean=(0.5,), std=(0.5,))
    before = copy.deepcopy(static.state_dict())
    task = make_task(tiny_student, static_teacher=static)
    train(task, torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1), 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in static.state_dict().items())


def test_checkpoint_is_a_plain_student_and_resumes(tiny_student, tmp_path):
    task = make_task(copy.deepcopy(tiny_student), noise=0.1)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    task.setup_ema(decay=0.9)
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, task=task, checkpoint_dir=str(tmp_path))
    train(task, optimizer, 3)
    saver.save_checkpoint(0, metric=1.0)
    path = str(tmp_path / 'last.pth.tar')

    checkpoint = torch.load(path, weights_only=True)
    plain = timm.create_model('test_resnet', **TINY_RESNET).eval()
    load_checkpoint(plain, path, use_ema=False)
    x, _ = batch()
    torch.testing.assert_close(plain(x), task.get_dynamic_teacher().eval().joint(x)[0], rtol=1e-4, atol=1e-5)
    assert checkpoint['state_dict'].keys() == checkpoint['state_dict_ema'].keys() == tiny_student.state_dict().keys()
    averaged = task.get_eval_model(ema=True)(x).detach()

    task.train()
    expected = train(task, optimizer, 3, first=3)
    resumed = make_task(timm.create_model('test_resnet', **TINY_RESNET))
    optimizer = torch.optim.SGD(resumed.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    assert resume_task_checkpoint(resumed, path, optimizer=optimizer) == 1
    resumed.setup_ema(decay=0.9)
    load_task_ema_checkpoint(resumed, path)
    assert torch.equal(resumed.get_eval_model(ema=True).eval()(x), averaged)
    assert train(resumed.train(), optimizer, 3, first=3) == expected


def test_average_of_the_teacher_averages_the_student(tiny_student):
    task = make_task(tiny_student, scale='teacher')
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05)
    task.setup_ema(decay=0.5)
    name = 'layer3.0.conv1.weight'
    average = task.get_eval_model().state_dict()[name]
    for step in range(3):
        train(task, optimizer, 1, first=step)
        average = 0.5 * average + 0.5 * task.get_eval_model().state_dict()[name]
    torch.testing.assert_close(task.get_eval_model(ema=True).state_dict()[name], average)


def test_a_plain_checkpoint_starts_the_teacher_from_that_student(tiny_student):
    other = timm.create_model('test_resnet', **TINY_RESNET).eval()
    task = make_task(tiny_student)
    task.load_checkpoint_state(other.state_dict())
    x, _ = batch()
    for logits in task.get_dynamic_teacher().eval().joint(x):
        torch.testing.assert_close(logits, other(x), rtol=1e-4, atol=1e-5)


def test_resume_with_other_settings_is_refused(tiny_student):
    state = make_task(copy.deepcopy(tiny_student), ratio=2).get_checkpoint_state()
    with pytest.raises(ValueError, match='resume with the settings of the checkpoint'):
        make_task(tiny_student, ratio=3).load_checkpoint_state(state['state_dict'], state['task_state'])


def test_unknown_gpd_loss(tiny_student):
    with pytest.raises(ValueError, match='gpd_loss must be one of sce, ce, kl, .*, mse, l1, .*, but is'):
        make_task(tiny_student, gpd_loss='none')


def test_no_weight_decay_and_layer_decay_reach_the_stored_parameters():
    student = timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=10, depth=2)
    teacher = make_task(student).get_trainable_module()
    assert 'model.wide.pos_embed' in teacher.no_weight_decay()
    plain, wide = (
        create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.1, layer_decay=0.7)
        for model in (student, teacher)
    )

    def groups(optimizer):
        return sorted(
            (group['lr_scale'], group['weight_decay'], len(group['params'])) for group in optimizer.param_groups
        )

    assert groups(plain) == groups(wide)
