"""Training with ratios between: sandwich and netaug as the formulas say, in any process, interrupted or not."""

import copy

import pytest
import timm
import torch
import torch.nn as nn

from conftest import TINY_RESNET
from steps import batch, saved_tensors_counted, train, train_epoch
from timm_gpd import GapPreservingTask
from timm_gpd.task.nested import DrawnRatios
from timm_gpd.teacher import DynamicTeacher, nested
from timm_gpd.training.compute import create_compute


@pytest.fixture(autouse=True)
def plans_of_ratios_between_are_right(monkeypatch):
    """tests/test_nested.py checks them."""
    monkeypatch.setattr(nested, 'verify_plan', lambda student, plan: 0.0)


def make_task(method='sandwich', ratio=4, **kwargs):
    student = timm.create_model('test_resnet', **TINY_RESNET)
    student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    return GapPreservingTask(student, ratio=ratio, method=method, verbose=False, **kwargs).train()


def gradients(task, loss):
    """By parameter name, with None where there is none."""
    parameters = dict(task.get_trainable_module().named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)))


def expected_loss(task, x, target, ratios):
    """The sum of losses, each of a whole model of its ratio, differentiated at once."""
    teacher = task.get_dynamic_teacher()
    student = teacher.at_ratio(1)(x)
    wider = [teacher.at_ratio(ratio)(x) for ratio in ratios]
    loss = task.criterion(student, target) + task.criterion(wider[0], target)
    if task.gpd_loss is not None:
        loss = loss + task.gpd_weight * task.gpd_loss(student, wider[0])
        loss = loss + sum(task.gpd_loss(logits, wider[0]) for logits in wider[1:])
    return loss


STORAGE = pytest.mark.parametrize(
    'storage',
    [{}, {'scale': 'teacher', 'noise': 0.3}, {'num_branches': 6, 'noise': 0.3}],
    ids=['plain', 'teacher', '6'],
)


@STORAGE
@pytest.mark.parametrize('method, ratios', [('sandwich', (4, 3, 2)), ('netaug', (3,)), ('netaug', (4,))])
def test_loss_and_gradients_are_those_of_the_sum(method, ratios, storage, monkeypatch):
    task = make_task(method, **storage).double()
    twin = copy.deepcopy(task)
    drawn = ratios[1:] if method == 'sandwich' else ratios
    monkeypatch.setattr(task.ratios, 'draw', lambda: drawn)
    x, target = batch()
    x = x.double()
    result = task(x, target)
    loss = expected_loss(twin, x, target, ratios)
    torch.testing.assert_close(result['loss'], loss, rtol=1e-12, atol=0)
    actual, expected = gradients(task, result['loss'] / 4), gradients(twin, loss / 4)
    assert all(gradient is not None for gradient in actual.values()), 'DDP waits for every gradient'
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)
    assert set(result) == {
        *('loss', 'output', 'task_loss', 'teacher_output', 'teacher_task_loss'),
        *(('gpd_loss', 'between_loss') if method == 'sandwich' else ()),
    }


@pytest.mark.parametrize('method, kinds', [('sandwich', {4, 1, 'between'}), ('netaug', {1, 'between'})])
def test_running_statistics_are_those_of_the_models_that_own_them(method, kinds, monkeypatch):
    """Student and dynamic teacher as if they had run alone; a ratio between leaves none."""
    task = make_task(method)
    twin = copy.deepcopy(task).get_dynamic_teacher()
    monkeypatch.setattr(task.ratios, 'draw', lambda: (2,))
    x, target = batch()
    task(x, target)
    twin.forward_student(x)
    if 4 in kinds:
        twin(x)
    buffers = dict(twin.named_buffers())
    for name, buffer in task.get_dynamic_teacher().named_buffers():
        torch.testing.assert_close(buffer, buffers[name], msg=name)


def test_a_step_of_netaug_runs_the_student_and_the_ratio_that_was_drawn(monkeypatch):
    task = make_task('netaug')
    monkeypatch.setattr(task.ratios, 'draw', lambda: (2,))
    widths = []
    for model in (task.get_dynamic_teacher().wide, task.get_dynamic_teacher().student):
        model.layer1[0].register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    monkeypatch.setattr(DynamicTeacher, 'teacher_parameters', None)
    task(*batch())['loss'].backward()
    assert widths == [16, 8], 'the dynamic teacher has 32'


def test_activations_of_one_model_are_held_at_a_time(monkeypatch):
    task = make_task('sandwich')
    with saved_tensors_counted() as (count, counts):
        for model in (task.get_dynamic_teacher().wide, task.get_dynamic_teacher().student):
            model.register_forward_pre_hook(count)
            model.register_forward_hook(count)
        task(*batch())['loss'].backward()
    before, after = counts[::2], counts[1::2]
    assert len(before) == 4
    # What reads the stored tensors is of their size, and stays no longer than that of one model.
    assert max(before) < 0.6 * min(after), (before, after)


def test_of_ratio_two_sandwich_is_joint_training():
    tasks = [make_task(method, ratio=2) for method in ('joint', 'sandwich')]
    tasks[1].load_state_dict(tasks[0].state_dict())
    results = [task(*batch()) for task in tasks]
    assert set(results[0]) == set(results[1])
    for one, other in zip(*(gradients(task, result['loss']).values() for task, result in zip(tasks, results))):
        assert torch.equal(one, other)


def test_draws_are_of_the_update_and_the_seed():
    choices, updates = range(2, 6), range(40)

    def draw(seed, update, count=2):
        ratios = DrawnRatios(choices, count, seed)
        ratios.begin_update(update)
        first = ratios.draw()
        assert ratios.draw() == first, 'batches of an update have its ratios'
        return first

    drawn = [draw(0, update) for update in updates]
    assert drawn == [draw(0, update) for update in updates] != [draw(1, update) for update in updates]
    assert all(len(set(ratios)) == 2 and ratios == tuple(sorted(ratios, reverse=True)) for ratios in drawn)
    assert {ratio for ratios in drawn for ratio in ratios} == set(choices)
    assert draw(0, 3, count=9) == (5, 4, 3, 2) and draw(0, 3, count=0) == ()
    untold = DrawnRatios(choices, 2, 0)
    assert [untold.draw() for _ in updates] == drawn, 'a loop that tells nothing has a new update with every step'


@pytest.mark.parametrize('method', ['sandwich', 'netaug'])
def test_the_loop_tells_the_update(method, monkeypatch):
    """Two batches an update: both have its ratios, and a loop that starts later draws what the first one drew."""
    drawn = []

    def record(task):
        draw = task.ratios.draw
        monkeypatch.setattr(task.ratios, 'draw', lambda: drawn.append(draw()) or drawn[-1])
        return task

    compute = create_compute('cpu')
    batches = [batch(seed) for seed in range(8)]
    task = record(make_task(method, ratio=5, between=1))
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
    for epoch in range(2):
        train_epoch(task, batches, optimizer, compute, epoch, 2, grad_accum_steps=2)
    whole = drawn.copy()
    assert len(whole) == 16 and whole[::2] == whole[1::2] and len(set(whole)) > 1
    drawn.clear()
    task = record(make_task(method, ratio=5, between=1))
    train_epoch(
        task,
        batches,
        torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01),
        compute,
        1,
        2,
        grad_accum_steps=2,
    )
    assert drawn == whole[8:]


@pytest.mark.parametrize('method', ['sandwich', 'netaug'])
def test_a_checkpoint_of_it_goes_on(method):
    task, twin = make_task(method, ratio=3), make_task(method, ratio=3)
    for each in (task, twin):
        each.setup_ema(decay=0.5)
    train(task, torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05), 3)
    twin.load_checkpoint_state(**task.get_checkpoint_state())
    averages = task.get_checkpoint_state(ema=True)
    twin.load_checkpoint_state(averages['state_dict_ema'], averages['task_state_ema'], ema=True)
    for each in (task, twin):
        each.begin_update(3, 0.5)
    x, target = batch(7)
    assert torch.equal(task(x, target)['loss'], twin(x, target)['loss'])
    averaged = task.get_student(ema=True)
    assert not torch.equal(averaged.fc.weight, task.get_student().fc.weight)
    assert torch.equal(averaged(x), twin.get_student(ema=True)(x))


def test_mixed_precision_and_gradient_checkpointing():
    task = make_task('sandwich', ratio=3)
    twin = copy.deepcopy(task)
    task.get_dynamic_teacher().set_grad_checkpointing()
    with torch.autocast('cpu', torch.bfloat16):
        result = task(*batch())
    result['loss'].backward()
    twin(*batch())['loss'].backward()
    found, expected = (
        torch.cat([parameter.grad.flatten() for parameter in each.get_trainable_module().parameters()])
        for each in (task, twin)
    )
    assert 0 < (found - expected).norm() < 0.3 * expected.norm()  # rounding, of batches of eight


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(method='slim'), 'method must be one of joint, sandwich, netaug'),
        (dict(method='netaug', ratio=1), 'raise the ratio'),
        (dict(method='sandwich', ratio=1), 'raise the ratio'),
        (dict(method='sandwich', between=-1), 'between must be an integer of at least 0'),
        (dict(method='netaug', static_teacher=nn.Identity()), 'netaug distils nothing: leave out the static teacher'),
    ],
)
def test_what_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_task(**kwargs)


def test_a_compiler_is_refused_where_ratios_between_would_run():
    with pytest.raises(ValueError, match='run uncompiled: leave out compile'):
        make_task('netaug', ratio=3).compile(backend='eager')
