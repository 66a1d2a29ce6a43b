"""Students that do what no model of timm does: right, or refused in a line that says why."""

from collections import deque, namedtuple
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_gpd import GapPreservingTask, UnsupportedModelError, expand, plan_expansion
from timm_gpd.errors import InputError
from timm_gpd.task.gpd_loss import GpdLoss
from timm_gpd.teacher import DynamicTeacher


class Net(nn.Module):
    """Two convolutions and a classifier of seven classes, whose features a subclass may change."""

    in_chans = 3

    def __init__(self, classes=7) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def get_classifier(self):
        return self.fc

    def features(self, x):
        x = self.norm1(self.conv1(x)).relu()
        return self.norm2(self.conv2(x)).relu().mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


IMAGES, TARGET = torch.linspace(-1, 1, 4 * 3 * 64).sin().view(4, 3, 8, 8), torch.tensor([0, 3, 5, 6])


def task_of(student, **kwargs):
    return GapPreservingTask(student, verbose=False, **kwargs)


def agrees(student):
    """Both models in training mode, with the student's own running statistics left out."""
    teacher = expand(student, noise=0.1).train()
    expected = student.train()(IMAGES)
    for logits in teacher.joint(IMAGES):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher(IMAGES), expected, rtol=1e-4, atol=1e-5)
    return teacher


# -- what only training mode does -----------------------------------------------------------------------------------


class Normalized(Net):
    def forward(self, x):
        features = self.features(x)
        return self.fc(F.normalize(features, dim=1) if self.training else features)


class InPlace(Net):
    def forward(self, x):
        return super().forward(x.mul_(0.5) if self.training else x)


class Random(Net):
    def forward(self, x):
        return self.fc(F.dropout(self.features(x), 0.5, self.training))


def test_what_differs_in_training_mode_is_refused():
    with pytest.raises(UnsupportedModelError, match='relative, in training mode'):
        expand(Normalized())
    with pytest.raises(UnsupportedModelError, match='changes the images that it is given, in place'):
        expand(InPlace())


def test_what_is_random_in_training_mode_is_not_compared_there():
    assert expand(Random()).joint(IMAGES).teacher.shape == (4, 7)


# -- modules in other places than attributes ------------------------------------------------------------------------


class Hooked(Net):
    """Deep supervision: a hook, which is a method, keeps what the first convolution gives."""

    def __init__(self):
        super().__init__()
        self.kept, self.aux = [], nn.Linear(8, 7)
        self.conv1.register_forward_hook(self.keep)

    def get_classifier(self):
        return self.fc, self.aux

    def keep(self, module, args, output):
        self.kept.append(output)

    def forward(self, x):
        self.kept.clear()
        return super().forward(x) + sum(self.aux(kept.mean((2, 3))) for kept in self.kept)


Pair = namedtuple('Pair', 'first second')


class Held(Net):
    """Runs its second convolution through something that holds it."""

    def __init__(self, hold, get):
        super().__init__()
        self.held, self.get = hold(self.conv2), get

    def features(self, x):
        x = self.norm1(self.conv1(x)).relu()
        return self.norm2(self.get(self.held)(x)).relu().mean((2, 3))


def test_hooks_that_are_methods_are_of_the_model_that_runs():
    student = Hooked()
    teacher = agrees(student)
    for _ in range(3):
        teacher.joint(IMAGES)
    assert teacher.wide.kept == [] and teacher.student.kept == []
    task = task_of(student)
    task(IMAGES, TARGET)['loss'].backward()
    assert task.get_dynamic_teacher().wide.aux.weight.grad.any()


@pytest.mark.parametrize(
    'hold, get',
    [
        (partial, lambda held: held),
        (lambda module: Pair(module, 1), lambda held: held.first),
        (lambda module: deque([module]), lambda held: held[0]),
        (lambda module: {'of': [(module,)]}, lambda held: held['of'][0][0]),
    ],
    ids=['partial', 'named tuple', 'deque', 'nested'],
)
def test_modules_are_found_in_what_holds_them(hold, get):
    agrees(Held(hold, get))


@pytest.mark.usefixtures('may_change_settings')
def test_parts_that_were_compiled_run_as_they_are():
    teacher = expand(Net()).eval()
    expected = teacher(IMAGES)
    torch._dynamo.reset()
    teacher.wide.compile(backend='eager')
    teacher.student.conv2.compile(backend='eager')
    assert torch.equal(teacher(IMAGES), expected)
    torch.testing.assert_close(teacher.joint(IMAGES).student, expected, rtol=1e-5, atol=1e-6)


# -- whatever the loss depends on gets its gradient -----------------------------------------------------------------


def full_gradient(task, tensor, images=IMAGES, target=TARGET):
    """By the sum of both losses, of which the student's takes the teacher's logits as constants."""
    student, teacher = task.get_dynamic_teacher().joint(images)
    loss = task.criterion(student, target) + task.criterion(teacher, target)
    loss = loss + task.gpd_weight * task.gpd_loss(student, teacher.detach())
    return torch.autograd.grad(loss, tensor)[0]


def test_parameters_that_a_criterion_closes_over():
    student, temperature = Net(), nn.Parameter(torch.tensor(1.5))
    learned, fixed = (
        task_of(student, criterion=lambda output, target, by=by: F.cross_entropy(output * by, target)).eval()
        for by in (temperature, 1.5)
    )
    for task in (learned, fixed):
        task(IMAGES, TARGET)['loss'].backward()
    torch.testing.assert_close(temperature.grad, full_gradient(learned, temperature))
    # The ordinary backward pass gives all others what the early one does.
    for parameter, other in zip(learned.get_trainable_module().parameters(), fixed.get_trainable_module().parameters()):
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.usefixtures('may_change_settings')
def test_parameters_that_a_criterion_closes_over_where_it_is_compiled():
    """A compiler shows no graph to look for them in."""
    temperature = nn.Parameter(torch.tensor(1.5))
    task = task_of(Net(), criterion=lambda output, target: F.cross_entropy(output * temperature, target)).eval()
    expected = full_gradient(task, temperature)
    torch._dynamo.reset()
    task.compile(backend='eager')
    task(IMAGES, TARGET)['loss'].backward()
    torch.testing.assert_close(temperature.grad, expected)


def test_targets_that_are_learned():
    target = torch.randn(4, 7).softmax(-1).requires_grad_()
    task = task_of(Net()).eval()
    task(IMAGES, target)['loss'].backward()
    torch.testing.assert_close(target.grad, full_gradient(task, target, target=target))


@pytest.mark.usefixtures('may_change_settings')
@pytest.mark.parametrize('is_compiled', [False, True])
def test_a_prompt_that_a_hook_adds(is_compiled):
    student = Net()
    prompt = nn.Parameter(torch.randn(3, 1, 1))
    student.conv1.register_forward_pre_hook(lambda module, args: (args[0] + prompt,))
    task = task_of(student).eval()
    expected = full_gradient(task, prompt)
    if is_compiled:
        torch._dynamo.reset()
        task.compile(backend='eager')
    task(IMAGES, TARGET)['loss'].backward()
    torch.testing.assert_close(prompt.grad, expected)


# -- arguments ------------------------------------------------------------------------------------------------------


def test_a_plan_of_another_student_is_refused():
    for other in (Net(10), timm.create_model('test_resnet')):
        with pytest.raises(InputError, match='the plan is of another student'):
            DynamicTeacher(Net(), plan_expansion(other))
    with pytest.raises(InputError, match='branches must be kxk followed by'):
        DynamicTeacher(Net(), plan_expansion(Net()), branches=5)


def test_one_class_needs_a_loss_of_logits():
    student = timm.create_model('test_resnet', num_classes=1)
    with pytest.raises(InputError, match='gpd_loss sce compares probabilities of classes.*take mse or l1'):
        task_of(student)
    assert task_of(student, gpd_loss='mse').gpd_weight == 3
    one = torch.randn(4, 1)
    with pytest.raises(InputError, match='gpd_loss kl compares probabilities'):  # a student that counts no classes
        GpdLoss('kl')(one, one)


def test_a_students_state_is_one_whatever_its_modules_are_called():
    class Branches(Net):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList([self.conv1, self.conv2])

    teacher, other = expand(Branches()).eval(), Branches().eval()
    teacher.load_state_dict(other.state_dict())
    torch.testing.assert_close(teacher(IMAGES), other(IMAGES), rtol=1e-5, atol=1e-6)
    same = expand(Branches()).eval()
    same.load_state_dict(teacher.state_dict())
    assert torch.equal(same(IMAGES), teacher(IMAGES))


def test_modules_that_give_no_logits_are_refused():
    with pytest.raises(
        UnsupportedModelError, match=r'logits of shape \(4, 14\) .* instead of \(4, 7\): name the modules'
    ):
        expand(Net(), classifier='conv2')


def test_a_task_needs_logits_alone():
    class Twofold(Net):
        def forward(self, x):
            return (super().forward(x),) * 2 if self.training else super().forward(x)

    with pytest.raises(InputError, match='returns a tuple in training mode, and a task needs its logits'):
        task_of(Twofold()).train()(IMAGES, TARGET)
