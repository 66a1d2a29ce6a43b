"""The dynamic teacher's backward pass before the student's forward pass: the same gradients, less memory."""
import copy
import gc
import weakref

import pytest
import timm
import torch

from conftest import TINY_RESNET
from steps import batch
from timm_gpd import GapPreservingTask
from timm_gpd.teacher.early_backward import backward_early


def make_task(student, **kwargs):
    return GapPreservingTask(student, verbose=False, **kwargs).double().train()


def gradients(task, loss):
    parameters = dict(task.get_trainable_module().named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found))


@pytest.mark.parametrize('settings', [
    dict(),
    dict(scale='teacher', noise=0.1),
    dict(num_branches=6, noise=0.1),
    dict(static_teacher='resnet', distill_type='dkd,reviewkd', num_branches=2),
], ids=['plain', 'teacher', 'branches', 'static'])
def test_gradients_are_those_of_the_sum_of_losses(settings):
    if 'static_teacher' in settings:
        settings['static_teacher'] = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    task = make_task(timm.create_model('test_resnet', **TINY_RESNET), **settings)
    twin = copy.deepcopy(task)
    x, target = batch()
    x = x.double()
    actual = gradients(task, task(x, target)['loss'] / 4)  # as accumulating gradients divides it

    dynamic_teacher = twin.get_dynamic_teacher()
    if twin.teacher is None:
        student, teacher, distillation = *dynamic_teacher.joint(x), 0
    else:
        learners, goal = twin.get_trainable_module(), twin.teacher(x)
        outputs = learners.run(x)
        student, teacher = outputs['student'].logits, outputs['dynamic_teacher'].logits
        distillation = sum(
            sum(learners.distillers[name](output, goal, target).values()) for name, output in outputs.items())
    loss = twin.criterion(student, target) + twin.criterion(teacher, target) + distillation
    loss = loss + twin.gpd_weight * twin.gpd_loss(student, teacher)
    for name, expected in gradients(twin, loss / 4).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-9, atol=1e-12, msg=name)


def count_saved_when_student_runs(task, run):
    """Tensors kept for a backward pass when the student starts."""
    saved, counts = weakref.WeakSet(), []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            saved.add(self)

    def count(*_):
        gc.collect()
        counts.append(len(saved))

    hook = task.get_dynamic_teacher().student.register_forward_pre_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda packed: packed.tensor):
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
    tensor = torch.tensor(3., requires_grad=True)
    tied = tensor * 1
    tensors = {'a': tied, 'b': tied, 'frozen': torch.tensor(2.)}
    result, gradients = backward_early(lambda t: {'loss': t['a'] * t['b'] * t['frozen'], 'a': t['a']}, tensors)
    assert not tensors and result['loss'] == 18 and not any(value.requires_grad for value in result.values())
    (2 * gradients()).backward()
    assert gradients() == 0 and tensor.grad == 24


def test_without_gradients_it_only_runs():
    tensor = torch.tensor(3., requires_grad=True)
    with torch.no_grad():
        result, gradients = backward_early(lambda t: {'loss': t['a'] * 2}, {'a': tensor})
    assert result['loss'] == 6 and not gradients().requires_grad
    _, gradients = backward_early(lambda t: {'loss': t['a'] * 2}, {'a': torch.tensor(3.)})
    assert not gradients().requires_grad
