"""The dynamic teacher's backward pass before the student's forward pass: the same gradients, less memory."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from conftest import TINY_RESNET
from steps import batch, saved_tensors_counted
from timm_gpd import GapPreservingTask
from timm_gpd.teacher.early_backward import EarlyBackward


def make_task(student, **kwargs):
    return GapPreservingTask(student, verbose=False, **kwargs).double().train()


def gradients(task, loss):
    parameters = dict(task.get_trainable_module().named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found))


@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(scale='teacher', noise=0.1),
        dict(num_branches=6, noise=0.1),
        dict(static_teacher='resnet', distill_type='dkd,reviewkd', num_branches=2),
    ],
    ids=['plain', 'teacher', 'branches', 'static'],
)
def test_gradients_are_those_of_the_sum_of_losses(settings):
    if 'static_teacher' in settings:
        settings['static_teacher'] = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    task = make_task(timm.create_model('test_resnet', **TINY_RESNET), **settings)
    twin = copy.deepcopy(task)
    x, target = batch()
    x = x.double()
    actual = gradients(task, task(x, target)['loss'] / 4)  # as accumulating gradients divides it

    dynamic_teacher = twin.get_dynamic_teacher()
    if twin.static_teacher is None:
        student, teacher, distillation = *dynamic_teacher.joint(x), 0
    else:
        learners, static_output = twin.get_learners(), twin.static_teacher(x)
        outputs = learners.run(x)
        student, teacher = outputs['student'].logits, outputs['dynamic_teacher'].logits
        distillation = sum(
            sum(learners.step_loss.distillers[name](output, static_output, target).values())
            for name, output in outputs.items()
        )
    loss = twin.criterion(student, target) + twin.criterion(teacher, target) + distillation
    loss = loss + twin.gpd_weight * twin.gpd_loss(student, teacher)
    for name, expected in gradients(twin, loss / 4).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-9, atol=1e-12, msg=name)


def count_saved_when_student_runs(task, run):
    """Tensors kept for a backward pass when the student starts."""
    with saved_tensors_counted() as (count, counts):
        hook = task.get_dynamic_teacher().student.register_forward_pre_hook(count)
        result = run()
    hook.remove()
    assert len(counts) == 1
    return counts[0], result


def test_nothing_of_the_teacher_is_kept_while_the_student_runs(tiny_student):
    task = make_task(tiny_student)
    x, target = batch()
    count, result = count_saved_when_student_runs(task, lambda: task(x.double(), target))
    assert count == 0
    result['loss'].backward()
    count, _ = count_saved_when_student_runs(task, lambda: task.get_dynamic_teacher().joint(x.double()))
    assert count > 20, 'the measurement sees what the joint forward pass keeps'


def test_float16_waits_for_the_scale_of_its_gradients(tiny_student):
    task = GapPreservingTask(tiny_student, verbose=False).train()
    with torch.autocast('cpu', torch.float16):
        count, result = count_saved_when_student_runs(task, lambda: task(*batch()))
    assert count > 20
    result['loss'].backward()


def test_a_tensor_under_two_names_gets_its_gradient_once():
    tensor = torch.tensor(3.0, requires_grad=True)
    tied = tensor * 1
    early = EarlyBackward([tied, tied, torch.tensor(2.0)])
    result = early.run({'loss': tied * tied * 2, 'a': tied})
    assert result['loss'] == 18 and not any(value.requires_grad for value in result.values())
    loss = result['loss'] + early.join()
    (2 * loss).backward()
    assert loss == 18 and tensor.grad == 24


def test_without_gradients_it_only_runs():
    tensor = torch.tensor(3.0, requires_grad=True)
    with torch.no_grad():
        early = EarlyBackward([tensor])
        assert early.run({'loss': tensor * 2})['loss'] + early.join() == 6 and not early.is_early
    early = EarlyBackward([torch.tensor(3.0)])
    loss = early.run({'loss': torch.tensor(6.0)})['loss'] + early.join()
    assert loss == 6 and not loss.requires_grad and not early.is_early


def test_a_loss_gives_its_gradients_once(tiny_student):
    task = make_task(tiny_student)
    x, target = batch()
    loss = task(x.double(), target)['loss']
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='differentiated once.*call backward.. once for every forward pass'):
        loss.backward()
    with pytest.raises(RuntimeError, match='no second derivatives.*leave out create_graph=True'):
        task(x.double(), target)['loss'].backward(create_graph=True)


def test_what_the_teachers_loss_depends_on_gets_its_gradient(tiny_student):
    """Images, what made them, and parameters of the criterion: from the sum of losses, not the student's share."""

    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(1.5))

        def forward(self, logits, target):
            return F.cross_entropy(logits / self.temperature, target)

    task = make_task(tiny_student, criterion=Tempered(), noise=0.5)
    twin = copy.deepcopy(task)
    prompts = [torch.full((1, 1, 32, 32), 0.1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    x, target = batch()
    task(x + prompts[0], target)['loss'].backward()
    student, teacher = twin.get_dynamic_teacher().joint(x + prompts[1])
    loss = sum(twin.criterion(logits, target) for logits in (student, teacher))
    (loss + twin.gpd_weight * twin.gpd_loss(student, teacher.detach())).backward()
    torch.testing.assert_close(prompts[0].grad, prompts[1].grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(task.criterion.temperature.grad, twin.criterion.temperature.grad, rtol=1e-9, atol=0)
