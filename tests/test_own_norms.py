"""Clipping by each model's own norm: with the other's losses off, each follows its own plain training."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm.task import ClassificationTask

from conftest import TINY_RESNET
from steps import batch, train_epoch
from timm_gpd import DistillationTask, GapPreservingTask
from timm_gpd.errors import InputError
from timm_gpd.expansion.verify import randomize_, relative_error
from timm_gpd.task.gap_control import Switch
from timm_gpd.task.own_norms import OwnNorms
from timm_gpd.task.step_loss import StepLoss
from timm_gpd.training.compute import create_compute

CPU = create_compute('cpu', model_dtype='float64')
LIMIT = 0.05


class AlwaysPaused(Switch):
    """The dynamic teacher's losses off."""

    def decide(self, *of_batch):
        return {**super().decide(*of_batch), 'paused': torch.ones(())}


class OfTeacher(StepLoss):
    """The student's losses off."""

    def forward(self, learner, *rest):
        result = super().forward(learner, *rest)
        return {**result, 'loss': result['loss'] * (learner == 'dynamic_teacher')}


def make_student(name='test_resnet'):
    # Smooth activations: at ReLU's kink a rounding error of 1e-17 changes the gradient.
    if name == 'test_resnet':
        student = timm.create_model(name, act_layer='silu', zero_init_last=False, **TINY_RESNET)
    else:
        student = timm.create_model(name, num_classes=10, in_chans=1)
    student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    return randomize_(student.double())


def make_task(student, **kwargs):
    return GapPreservingTask(student, dtype=torch.float64, verbose=False, **{'noise': 0.1, **kwargs}).train()


def sgd(task):
    return torch.optim.SGD(task.get_trainable_module().parameters(), 0.1, 0.9, weight_decay=1e-2)


def adamw(task):
    return torch.optim.AdamW(task.get_trainable_module().parameters(), 1e-3, weight_decay=0.1)


def batches(count=4):
    return [batch(seed) for seed in range(count)]


def trained(task, optimizer=sgd, **settings):
    train_epoch(task, batches(), optimizer(task), CPU, **{'clip_grad': LIMIT, 'clip_mode': 'own-norm', **settings})
    return task


def difference(model, expected):
    tensors = model.state_dict()
    return max(relative_error(tensors[name], t) for name, t in expected.state_dict().items() if t.dim() > 0)


@pytest.mark.parametrize(
    'scale, optimizer, accumulated',
    [('student', sgd, 1), ('student', adamw, 2), ('balanced', sgd, 2), ('balanced', adamw, 1)],
)
def test_without_the_teachers_losses_the_student_is_in_plain_training(scale, optimizer, accumulated):
    student = make_student()
    plain = ClassificationTask(copy.deepcopy(student), dtype=torch.float64, verbose=False)
    trained(plain, optimizer, clip_mode='norm', grad_accum_steps=accumulated)
    task = make_task(student, scale=scale, gap_control=AlwaysPaused(), gpd_weight=0.0)
    trained(task, optimizer, grad_accum_steps=accumulated)
    assert difference(task.get_student(), plain.get_trainable_module()) < 1e-9
    free = trained(make_task(student, scale=scale), optimizer, clip_grad=None, grad_accum_steps=accumulated)
    assert difference(free.get_student(), plain.get_trainable_module()) > 1e-4, 'the limit binds'


@pytest.mark.parametrize(
    'scale, name, ratio, optimizer, accumulated',
    [
        ('balanced', 'test_resnet', 3, sgd, 2),
        ('balanced', 'test_convnext', 2, sgd, 1),
        ('teacher', 'test_resnet', 2, adamw, 1),
    ],
)
def test_without_the_students_losses_the_teacher_is_a_plain_wide_model(scale, name, ratio, optimizer, accumulated):
    """With balanced, by the norm of all that is stored, it is not."""
    task = make_task(make_student(name), ratio=ratio, scale=scale, gpd_weight=0.0)
    task.get_learners().step_loss = OfTeacher(task.criterion)
    by_all = copy.deepcopy(task)
    plain = ClassificationTask(task.get_dynamic_teacher().extract_teacher(), dtype=torch.float64, verbose=False)
    trained(plain, optimizer, clip_mode='norm', grad_accum_steps=accumulated)
    trained(task, optimizer, grad_accum_steps=accumulated)
    trained(by_all, optimizer, clip_mode='norm', grad_accum_steps=accumulated)
    own, by_all = (
        difference(t.get_dynamic_teacher().extract_teacher(), plain.get_trainable_module()) for t in (task, by_all)
    )
    assert own < 1e-9
    assert by_all > 1e-4 if scale == 'balanced' else by_all < 1e-9


def make_static_teacher():
    teacher = timm.create_model('test_resnet', **TINY_RESNET)
    teacher.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.3,), std=(0.2,))
    return teacher


def gradients(task, loss):
    found = torch.autograd.grad(loss, list(task.get_trainable_module().parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(task.get_trainable_module().parameters(), found)]


def norms_of_plain_models(task, x, target):
    """What two whole models, extracted, would see."""
    norms = []
    for model, learner in ((task.get_student(), 'student'), (task.get_dynamic_teacher().extract_teacher(), 'teacher')):
        logits = model.train()(x)
        loss = nn.functional.cross_entropy(logits, target)
        if learner == 'student':
            with torch.no_grad():
                labels = task.get_dynamic_teacher().extract_teacher().train()(x)
            loss = loss + task.gpd_weight * task.gpd_loss(logits, labels, target)
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    return norms


@pytest.mark.parametrize('scale', ['student', 'teacher', 'balanced'])
def test_both_gradients_are_clipped_before_they_meet(scale):
    """c_T G_T + c_S G_S, with norms of the extracted models, and G as each loss alone gives it."""
    task = make_task(make_student(), scale=scale, ratio=3)
    x, target = batch()
    x = x.double()
    norms = norms_of_plain_models(task, x, target)
    joint = task.get_dynamic_teacher().joint(x)
    of_teacher = gradients(task, nn.functional.cross_entropy(joint.teacher, target))
    joint = task.get_dynamic_teacher().joint(x)
    gap = task.gpd_weight * task.gpd_loss(joint.student, joint.teacher.detach(), target)
    of_student = gradients(task, nn.functional.cross_entropy(joint.student, target) + gap)
    for limit in (2 * max(norms), 0.5 * sum(norms), 0.5 * min(norms)):  # nothing binds, one of them, both
        clip = OwnNorms(task)
        task.zero_grad()
        task(x, target)['loss'].backward()
        clip(float(limit))
        c_student, c_teacher = ((limit / norm).clamp(max=1) for norm in norms)
        for parameter, student, teacher in zip(task.get_trainable_module().parameters(), of_student, of_teacher):
            expected = c_student * student + c_teacher * teacher
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_what_losses_from_a_static_teacher_learn_with_counts_and_is_clipped_with_its_model():
    """The student's part alone: as with distillation without a dynamic teacher."""
    torch.manual_seed(0)
    student, static = make_student(), make_static_teacher()
    settings = dict(distill_type='reviewkd')
    plain = DistillationTask(copy.deepcopy(student), static, dtype=torch.float64, verbose=False, **settings)
    task = make_task(student, static_teacher=static, gap_control=AlwaysPaused(), gpd_weight=0.0, **settings)
    distillers = [t.get_learners().step_loss.distillers for t in (task, plain)]
    distillers[0]['student'].load_state_dict(distillers[1]['student'].state_dict())
    before = copy.deepcopy(plain)
    for one, mode in ((plain, 'norm'), (task, 'own-norm')):
        torch.manual_seed(1)
        trained(one, clip_mode=mode)
    assert difference(distillers[0]['student'], distillers[1]['student']) < 1e-9
    assert difference(task.get_student(), plain.get_trainable_module().model) < 1e-9
    assert difference(before.get_learners(), plain.get_learners()) > 1e-4


@pytest.mark.parametrize('ratio', [2, 3])
def test_beside_a_ratio_between_the_student_is_clipped_as_alone(ratio, monkeypatch):
    """As wider models give nothing to its entries here, these have the gradient of plain training, clipped."""
    student = make_student()
    task = make_task(student, noise=0.0, ratio=3, method='netaug', share_weight=0.0)
    monkeypatch.setattr(task.ratios, 'draw', lambda: (ratio,))
    plain = ClassificationTask(copy.deepcopy(student), dtype=torch.float64, verbose=False)
    x, target = batch()
    clip = OwnNorms(task)
    for one in (task, plain.train()):
        one(x.double(), target)['loss'].backward()
    clip(LIMIT)
    norm = nn.utils.clip_grad_norm_(plain.parameters(), LIMIT)
    assert norm > 2 * LIMIT
    wide = task.get_dynamic_teacher().wide
    for name, parameter in plain.get_trainable_module().named_parameters():
        gradient = task.get_dynamic_teacher().plan.extract({name: wide.get_parameter(name).grad})[name]
        tensor_map = task.get_dynamic_teacher().plan.tensors.get(name)
        gradient = gradient / (1 if tensor_map is None else tensor_map.divisor)
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_an_update_that_is_left_out_leaves_nothing_behind():
    student = make_student('test_convnext')  # without running statistics, which would be no numbers
    broken = [(images * float('nan'), target) for images, target in batches(1)]
    tasks = [make_task(student, scale='balanced') for _ in range(2)]
    tasks[1].load_state_dict(tasks[0].state_dict())
    for task, data in zip(tasks, (batches(), [*broken, *batches()])):
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), 0.1)
        settings = dict(clip_grad=LIMIT, clip_mode='own-norm', on_nan='skip')
        train_epoch(task, data, optimizer, CPU, **settings)
    assert difference(*tasks) == 0


def test_what_it_does_not_go_with():
    with pytest.raises(InputError, match='one branch'):
        OwnNorms(make_task(make_student(), num_branches=2))
    task = make_task(make_student())
    OwnNorms(task)
    with pytest.raises(InputError, match='leave out compile'):
        task.compile()
