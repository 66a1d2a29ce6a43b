"""From joint to plain training and back, between two steps: the student's next step is the one that it would take."""

import logging

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

from conftest import TINY_RESNET
from steps import batch, train
from timm_gpd import DistillationTask, GapPreservingTask
from timm_gpd.errors import InputError
from timm_gpd.expansion.verify import relative_error
from timm_gpd.task import hand_over

RATE = 0.01


@pytest.fixture
def student(tiny_student):
    return tiny_student.double()


def joint_task(student, **settings):
    return GapPreservingTask(student, dtype=torch.float64, verbose=False, **settings).train()


def plain_task(student):
    return ClassificationTask(student, verbose=False).train()


def optimizer_of(task, name='momentum', **settings):
    return create_optimizer_v2(task.get_trainable_module(), name, **{'lr': RATE, 'weight_decay': 0.01, **settings})


def step(task, optimizer, number, clip=None):
    """A step of plain training, or of joint training without the teacher's losses; what it adds to the student."""
    images, target = batch(number)
    images = images.double()
    before = {name: parameter.clone() for name, parameter in parameters(task).items()}
    optimizer.zero_grad()
    if isinstance(task, GapPreservingTask):
        F.cross_entropy(task.get_dynamic_teacher().forward_student(images), target).backward()
        for parameter in task.get_trainable_module().parameters():  # nothing is what the teacher's losses give
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    else:
        task(images, target)['loss'].backward()
    if clip:
        nn.utils.clip_grad_norm_(list(task.get_clip_parameters()), clip)
    optimizer.step()
    return {name: parameter - before[name] for name, parameter in parameters(task).items()}


def parameters(task):
    student = task.get_student() if isinstance(task, GapPreservingTask) else task.get_trainable_module()
    return {name: parameter.detach() for name, parameter in student.named_parameters()}


def train_jointly(student, name='momentum', rate=RATE, decay=0.01, **settings):
    """A task and its optimizer after some joint steps."""
    torch.set_default_dtype(torch.float64)
    try:
        task = joint_task(student, noise=0.1, **settings)
        optimizer = optimizer_of(task, name, lr=rate, weight_decay=decay)
        train(task, optimizer, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    return task, optimizer


def go_on_alone(task, optimizer, name='momentum', **settings):
    plain = plain_task(task.get_student())
    alone = optimizer_of(plain, name, **settings)
    hand_over(task, optimizer, plain, alone)
    return plain, alone


def go_on_jointly(task, optimizer, name='momentum', decay=0.01, **settings):
    joint = joint_task(task.get_trainable_module(), **settings)
    both = optimizer_of(joint, name, weight_decay=decay)
    hand_over(task, optimizer, joint, both)
    return joint, both


def assert_same(actual, expected, factors=None):
    """Steps are the same, but for a factor of each tensor and rounding."""
    for name, change in expected.items():
        change = change / (factors[name] if factors else 1)
        assert torch.allclose(actual[name], change, rtol=1e-9, atol=1e-9 * change.abs().max().item()), name


# -- the defining property --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, clip, ratio, scale',
    [
        ('momentum', None, 3, 'student'),
        ('momentum', 1.0, 2, 'balanced'),
        ('adamw', 1.0, 2, 'student'),
        ('lion', None, 2, 'student'),
    ],
)
def test_the_next_step_is_that_of_joint_training_without_the_teachers_losses(student, name, clip, ratio, scale):
    task, optimizer = train_jointly(student, name, ratio=ratio, scale=scale)
    plain, alone = go_on_alone(task, optimizer, name, lr=1.0)  # the group's rate goes over
    assert_same(step(plain, alone, 7, clip), step(task, optimizer, 7, clip))

    joint, both = go_on_jointly(plain, alone, name, ratio=ratio, noise=0.1, scale=scale)
    assert_same(step(joint, both, 8, clip), step(plain, alone, 8, clip))


@pytest.mark.parametrize('name, power', [('momentum', 2), ('adam', 1)])
def test_with_the_teachers_scale_joint_training_moves_the_student_further(student, name, power):
    """By the square of the divisor with SGD and by the divisor with Adam: what goes over are averages of gradients."""
    settings = dict(scale='teacher', ratio=3)
    task, optimizer = train_jointly(student, name, decay=0, **settings)
    for group in optimizer.param_groups:
        group['eps'] = 1e-30  # which is not scaled
    plain, alone = go_on_alone(task, optimizer, name)
    tensors = task.get_dynamic_teacher().plan.tensors
    further = {name: tensors[name].divisor ** power if name in tensors else 1 for name in parameters(plain)}
    assert set(further.values()) == {1, 3**power}
    assert_same(step(plain, alone, 7), step(task, optimizer, 7), further)

    joint, both = go_on_jointly(plain, alone, name, decay=0, **settings)
    assert_same(step(plain, alone, 8), step(joint, both, 8), further)


@pytest.mark.parametrize('scale, num_branches', [('student', 1), ('balanced', 1), ('teacher', 3)])
def test_there_and_back_is_the_same_optimizer(student, scale, num_branches):
    plain = plain_task(student)
    optimizer = optimizer_of(plain, 'adamw')
    for number in range(2):
        step(plain, optimizer, number)
    joint, both = go_on_jointly(plain, optimizer, 'adamw', scale=scale, num_branches=num_branches)
    again, alone = go_on_alone(joint, both, 'adamw')
    expected, found = optimizer.state_dict(), alone.state_dict()
    assert found['param_groups'] == expected['param_groups']
    for number, state in expected['state'].items():
        for key, value in state.items():
            torch.testing.assert_close(found['state'][number][key], value, rtol=1e-12, atol=0)
    for (name, parameter), (_, before) in zip(again.named_parameters(), plain.named_parameters()):
        assert alone.state[parameter]['exp_avg'].stride() == parameter.stride(), name
        assert alone.state[parameter]['step'] is not optimizer.state[before]['step']


@pytest.mark.parametrize('scale', ['student', 'teacher', 'balanced'])
def test_other_replicas_begin_with_what_they_would_have_gathered(student, scale):
    """After one step momentum is its gradient; that of the teacher's own loss, of the same function, is this one."""
    plain = plain_task(student)
    optimizer = optimizer_of(plain, lr=0.0, weight_decay=0)
    step(plain, optimizer, 1)
    joint, both = go_on_jointly(plain, optimizer, scale=scale, decay=0)
    teacher = joint.get_dynamic_teacher()
    images, target = batch(1)
    F.cross_entropy(teacher(images.double()), target).backward()
    for name, parameter in teacher.wide.named_parameters():
        tensor_map = teacher.plan.tensors.get(name)
        if tensor_map is None:
            continue
        others = torch.ones_like(parameter, dtype=torch.bool)
        tensor_map.first_replica(others)[...] = False
        assert others.any()
        gathered = both.state[parameter]['momentum_buffer']
        assert torch.allclose(gathered[others], parameter.grad[others], rtol=1e-9, atol=1e-12), name


def test_a_branched_kernel_takes_the_step_of_the_kernel_that_it_started_from(student):
    plain = plain_task(student)
    optimizer = optimizer_of(plain)
    step(plain, optimizer, 1)
    joint, both = go_on_jointly(plain, optimizer, num_branches=3)
    teacher = joint.get_dynamic_teacher()
    kernel, tensor_map = teacher.branches.get_parameter('conv1.3.kernel'), teacher.plan.tensors['conv1.3.weight']
    before = kernel.detach().clone()
    step(joint, both, 2)
    change = (kernel.detach() - before).transpose(1, 2).reshape(tensor_map.teacher_shape)
    expected = step(plain, optimizer, 2)
    assert_same({'conv1.3.weight': tensor_map.first_replica(change)}, {'conv1.3.weight': expected['conv1.3.weight']})


# -- what else goes over ----------------------------------------------------------------------------------------------


def test_every_parameter_keeps_the_settings_of_its_group(student):
    task = joint_task(student)
    settings = dict(layer_decay=0.5, weight_decay=0.1)
    optimizer = optimizer_of(task, 'adamw', **settings)
    for number, group in enumerate(optimizer.param_groups):
        group['lr'] = group['initial_lr'] = 0.1 + number
    plain = plain_task(task.get_student())
    alone = optimizer_of(plain, 'adamw', **settings)
    hand_over(task, optimizer, plain, alone)

    def read(optimizer, names):
        return {
            names[id(parameter)]: (group['lr'], group['initial_lr'], group['weight_decay'], group['lr_scale'])
            for group in optimizer.param_groups
            for parameter in group['params']
        }

    wide = {id(parameter): name for name, parameter in task.get_dynamic_teacher().wide.named_parameters()}
    own = {id(parameter): name for name, parameter in plain.get_trainable_module().named_parameters()}
    assert read(optimizer, wide) == read(alone, own) and len(set(read(alone, own).values())) > 4


def test_the_average_and_the_losses_from_a_static_teacher_go_on(student):
    static = timm.create_model('test_resnet', **TINY_RESNET).double()
    kinds = dict(static_teacher=static, distill_type='reviewkd,nd', dtype=torch.float64, verbose=False)
    task = GapPreservingTask(student, noise=0.1, **kinds).double().train()
    optimizer = optimizer_of(task)
    task.setup_ema(decay=0.5)
    torch.set_default_dtype(torch.float64)
    train(task, optimizer, 2)
    torch.set_default_dtype(torch.float32)
    plain = DistillationTask(task.get_student(), **kinds).double().train()
    alone = optimizer_of(plain)
    plain.setup_ema(decay=0.5)
    hand_over(task, optimizer, plain, alone)

    def compare(first, first_optimizer, second, second_optimizer):
        for ema in (False, True):
            learned, expected = (t.get_learners(ema).step_loss.state_dict() for t in (second, first))
            shared = learned.keys() & expected.keys()
            assert any('running_mean' in name for name in shared) and not any('dynamic' in name for name in shared)
            assert all(torch.equal(learned[name], expected[name]) for name in shared)
            old, new = (t.get_eval_model(ema=ema).state_dict() for t in (first, second))
            assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
        distillers = [dict(t.get_learners().step_loss.named_parameters()) for t in (first, second)]
        for name in distillers[0].keys() & distillers[1].keys():
            old, new = distillers[0][name], distillers[1][name]
            momentum = second_optimizer.state[new]['momentum_buffer']
            assert torch.equal(momentum, first_optimizer.state[old]['momentum_buffer']) and momentum.any()

    compare(task, optimizer, plain, alone)
    joint = GapPreservingTask(plain.get_student(), **kinds).double().train()
    both = optimizer_of(joint)
    joint.setup_ema(decay=0.5)
    hand_over(plain, alone, joint, both)
    compare(plain, alone, joint, both)


@pytest.mark.parametrize(
    'name, scale',
    [('adafactor', 'student'), ('rmsproptf', 'teacher'), ('lookahead_momentum', 'student')],
)
def test_what_an_optimizer_cannot_take_over_starts_anew(student, caplog, name, scale):
    task, optimizer = train_jointly(student, name, scale=scale)
    with caplog.at_level(logging.WARNING):
        plain, alone = go_on_alone(task, optimizer, name)
        step(plain, alone, 7)
        joint, both = go_on_jointly(plain, alone, name, scale=scale)
        step(joint, both, 8)
    said = [record.message for record in caplog.records if 'the optimizer starts anew for' in record.message]
    assert len(said) == (1 if name == 'lookahead_momentum' else 2)


@pytest.mark.parametrize('scale', ['student', 'balanced'])
@pytest.mark.parametrize('name', ['madgrad', 'lookahead_momentum'])
def test_copies_of_weights_that_an_optimizer_keeps_do_not_pull_replicas_back(student, name, scale):
    """They would be the student's for every replica, which has noise, and may be stored in another scale."""
    plain = plain_task(student)
    optimizer = optimizer_of(plain, name, weight_decay=0)
    for number in range(7):
        step(plain, optimizer, number)
    joint, both = go_on_jointly(plain, optimizer, name, ratio=3, noise=0.3, scale=scale, decay=0)
    for group in both.param_groups:
        group['lr'] = 0.0
    before = {name: tensor.clone() for name, tensor in joint.get_dynamic_teacher().wide.named_parameters()}
    for number in range(7):
        step(joint, both, number)
    for tensor_name, tensor in joint.get_dynamic_teacher().wide.named_parameters():
        if tensor_name in joint.get_dynamic_teacher().plan.tensors:
            assert relative_error(tensor, before[tensor_name]) < 0.01  # MADGRAD adds 1e-6 to a rate of 0


# -- misuse -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_handed_over_is_refused(student):
    task = joint_task(student)
    optimizer = optimizer_of(task)
    plain = plain_task(task.get_student())
    alone = optimizer_of(plain)
    with pytest.raises(InputError, match='from a GapPreservingTask to a task of the student alone'):
        hand_over(plain, alone, plain, alone)
    with pytest.raises(InputError, match='give each task its own'):
        hand_over(task, optimizer, plain, optimizer)
    with pytest.raises(InputError, match='AdamW cannot go on with what SGD remembers'):
        hand_over(task, optimizer, plain, torch.optim.AdamW(plain.parameters()))
    task.setup_ema()
    with pytest.raises(InputError, match='call setup_ema of the one after it first'):
        hand_over(task, optimizer, plain, alone)
    step(plain, alone, 1)
    with pytest.raises(InputError, match='another student: make it of task.get_student'):
        hand_over(plain, alone, task, optimizer)
