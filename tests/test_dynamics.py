"""Training dynamics: what the student learns, and that it is what is extracted."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from conftest import TINY_RESNET
from timm_gpd import GapPreservingTask, expand
from timm_gpd.errors import InputError
from timm_gpd.expansion.verify import randomize_, relative_error
from timm_gpd.teacher.shared_tensors import add_to_first_replicas


def batches(count, batch_size=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield (
            torch.randn(batch_size, 1, 32, 32, generator=generator),
            torch.randint(10, (batch_size,), generator=generator),
        )


OPTIMIZERS = [
    ('sgd', dict(lr=0.1, momentum=0.9, weight_decay=1e-2)),
    ('adamw', dict(lr=1e-3, weight_decay=0.1)),
]


@pytest.mark.parametrize('scale', ['student', 'balanced'])
@pytest.mark.parametrize('opt, hyperparameters', OPTIMIZERS, ids=[opt for opt, _ in OPTIMIZERS])
def test_without_teacher_losses_the_student_is_in_plain_training(opt, hyperparameters, scale):
    # Smooth activations: at ReLU's kink a rounding error of 1e-17 changes the gradient.
    student = timm.create_model('test_resnet', act_layer='silu', zero_init_last=False, **TINY_RESNET).double()
    plain = copy.deepcopy(student).train()
    teacher = expand(student, ratio=2, noise=0.1, scale=scale).train()
    plain_optimizer = create_optimizer_v2(plain, opt=opt, **hyperparameters)
    optimizer = create_optimizer_v2(teacher, opt=opt, **hyperparameters)
    for x, target in batches(5):
        x = x.double()
        for model, opt_ in ((plain, plain_optimizer), (teacher, optimizer)):
            logits = model(x) if model is plain else model.joint(x)[0]
            opt_.zero_grad()
            F.cross_entropy(logits, target).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt_.step()
        extracted = teacher.extract_student().state_dict()
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(extracted[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize('ratio', [2, 3])
def test_balanced_without_student_losses_is_plain_training_of_the_wide_model(ratio):
    """Its shared entries, too, with momentum and weight decay; stored as the student's they learn at 1/r² of it."""
    student = timm.create_model('test_resnet', act_layer='silu', zero_init_last=False, **TINY_RESNET).double()
    difference = {}
    for scale in ('student', 'balanced'):
        teacher = expand(student, ratio=ratio, noise=0.1, scale=scale).train()
        plain = teacher.extract_teacher().train()
        optimizers = [torch.optim.SGD(m.parameters(), 0.1, 0.9, weight_decay=1e-2) for m in (plain, teacher)]
        for x, target in batches(5):
            for model, optimizer in zip((plain, teacher), optimizers):
                logits = model(x.double()) if model is plain else model.joint(x.double()).teacher
                optimizer.zero_grad()
                F.cross_entropy(logits, target).backward()
                optimizer.step()
        extracted = teacher.extract_teacher().state_dict()
        difference[scale] = max(relative_error(extracted[n], t) for n, t in plain.state_dict().items() if t.dim() > 0)
    assert difference['balanced'] < 1e-9 and difference['student'] > 1e-2


@pytest.mark.parametrize('branches', [1, 3])
@pytest.mark.parametrize('scale', ['student', 'teacher', 'balanced'])
def test_the_share_weight_scales_what_the_teacher_gives_the_students_entries(scale, branches):
    """An entry's gradient is that of the student's loss and the teacher's, the latter times the factor on replica 0."""
    if scale == 'balanced' and branches > 1:
        with pytest.raises(InputError, match='scale balanced .* take one branch'):
            expand(timm.create_model('test_resnet', **TINY_RESNET), 2, branches, scale=scale)
        return
    student = randomize_(timm.create_model('test_resnet', **TINY_RESNET)).double()
    task = GapPreservingTask(student, num_branches=branches, scale=scale, noise=0.1, verbose=False).train()
    teacher = task.get_dynamic_teacher()
    x, target = next(batches(1))

    def gradients(share_weight, of):
        teacher.share_weight = share_weight
        output = getattr(teacher.joint(x.double()), of)
        parameters = dict(teacher.wide.named_parameters())
        found = torch.autograd.grad(F.cross_entropy(output, target), list(parameters.values()), allow_unused=True)
        return {name: torch.zeros_like(parameters[name]) if g is None else g for name, g in zip(parameters, found)}

    alone, whole = gradients(1.0, 'student'), gradients(1.0, 'teacher')
    for share_weight in (0.0, 0.25):
        assert all(map(torch.equal, gradients(share_weight, 'student').values(), alone.values()))
        for name, gradient in gradients(share_weight, 'teacher').items():
            tensor_map = teacher.plan.tensors.get(name)
            is_student = torch.ones_like(gradient)
            if tensor_map is not None:
                is_student = torch.zeros_like(gradient)
                add_to_first_replicas([is_student], [gradient.new_ones(tensor_map.shape)], [tensor_map])
            expected = torch.where(is_student > 0, share_weight * whole[name], whole[name])
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15, msg=name)
    # A task's early backward pass goes the same way.
    teacher.share_weight = 0.25
    task(x.double(), target)['loss'].backward()
    static, joint = gradients(0.25, 'teacher'), teacher.joint(x.double())
    gap = task.gpd_weight * task.gpd_loss(joint.student, joint.teacher.detach())
    parameters = dict(teacher.wide.named_parameters())
    of_student = torch.autograd.grad(
        F.cross_entropy(joint.student, target) + gap, parameters.values(), allow_unused=True
    )
    for (name, parameter), gradient in zip(parameters.items(), of_student):
        expected = static[name] if gradient is None else static[name] + gradient
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-10, msg=name)


def test_teacher_scale_moves_the_student_r_squared_times_as_fast(tiny_student):
    x, target = next(batches(1))
    moved = {}
    for scale in ('student', 'teacher'):
        teacher = expand(tiny_student.double(), ratio=2, scale=scale).train()
        before = teacher.extract_student().layer2[0].conv2.weight
        F.cross_entropy(teacher.joint(x.double())[0], target).backward()
        torch.optim.SGD(teacher.parameters(), lr=0.1).step()
        moved[scale] = teacher.extract_student().layer2[0].conv2.weight - before
    torch.testing.assert_close(moved['teacher'], 4 * moved['student'], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('scale', ('student', 'teacher'))
def test_scales_start_as_the_same_functions(tiny_student, scale):
    x = torch.randn(4, 1, 32, 32)
    teacher = expand(tiny_student.eval(), ratio=3, noise=0.2, scale=scale)
    for logits in teacher.joint(x):
        assert relative_error(logits, tiny_student(x)) <= 1e-5


@pytest.mark.parametrize('scale', ('student', 'teacher'))
def test_the_extracted_student_is_the_one_that_trained(tiny_student, scale):
    task = GapPreservingTask(tiny_student, ratio=2, noise=0.1, scale=scale, verbose=False).train()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.05, momentum=0.9)
    for x, target in batches(6):
        optimizer.zero_grad()
        task(x, target)['loss'].backward()
        optimizer.step()
    teacher = task.get_dynamic_teacher().eval()
    x = torch.randn(4, 1, 32, 32)
    student = teacher.extract_student()
    with torch.no_grad():
        assert relative_error(student(x), teacher.joint(x)[0]) <= 1e-5
        assert relative_error(task.get_eval_model()(x), student(x)) <= 1e-5
        # The two models have parted, and so have their statistics.
        assert relative_error(teacher(x), student(x)) > 1e-2
    assert not torch.equal(teacher.wide.bn1.running_mean[::2], student.bn1.running_mean)


def test_noise_tells_replicas_apart(tiny_student):
    x, target = next(batches(1))

    def gradients_differ(noise):
        teacher = expand(randomize_(tiny_student), ratio=4, noise=noise).train()
        F.cross_entropy(teacher(x), target).backward()
        gradient_OI = teacher.wide.layer2[0].conv2.weight.grad
        return not torch.allclose(gradient_OI[1::4], gradient_OI[2::4], rtol=1e-3)

    assert not gradients_differ(0.0)
    assert gradients_differ(0.5)


def test_tied_and_frozen_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(3, 8)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.fc = nn.Linear(8, 5)
            self.fc.bias.requires_grad_(False)
            self.num_classes, self.in_chans = 5, 3

        def get_classifier(self):
            return self.fc

        def forward(self, x):
            return self.fc(self.b(self.a(self.stem(x.mean((2, 3))))))

    teacher = expand(Tied(), ratio=2)
    x = torch.randn(2, 3, 8, 8)
    student_logits, teacher_logits = teacher.joint(x)
    assert relative_error(teacher_logits, student_logits) < 1e-5
    student = teacher.extract_student()
    assert student.b.weight is student.a.weight
    assert not student.fc.bias.requires_grad and not teacher.wide.fc.bias.requires_grad
    assert relative_error(student(x), student_logits) < 1e-5


def swap_replicas(tensor, tensor_map):
    """A teacher tensor with replicas 1 and 2 in each other's place, on all axes."""
    for axis, axis_map in tensor_map.axes:
        parts = tensor.split([segment.teacher_size for segment in axis_map], axis)
        parts = [
            part
            if segment.ratio == 1
            else part.unflatten(axis, (-1, 3, segment.block))
            .index_select(axis + 1, torch.tensor([0, 2, 1]))
            .flatten(axis, axis + 2)
            for segment, part in zip(axis_map, parts)
        ]
        tensor = torch.cat(parts, axis)
    return tensor


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_vit', 'test_convnext', 'test_mambaout'])
def test_a_teacher_of_ratio_3_is_wider_than_one_of_ratio_2(name):
    """Without noise all gradients of replicas 1 and 2 are equal, so one of the two is there for nothing."""
    for noise in (0.0, None):
        torch.manual_seed(0)
        student = randomize_(timm.create_model(name, num_classes=4)).double()
        task = GapPreservingTask(student, ratio=3, noise=noise, verbose=False)
        size = 160 if name == 'test_vit' else 64  # pixels
        teacher, x = task.get_dynamic_teacher(), torch.randn(4, 3, size, size).double()
        with torch.no_grad():
            logits = teacher.eval().joint(x)
        assert relative_error(logits.teacher, logits.student) <= 1e-12
        task.train()
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            task(x, torch.arange(4))['loss'].backward()
            nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
            optimizer.step()
        differ = {
            tensor_name: relative_error(swap_replicas(tensor, teacher.plan.tensors[tensor_name]), tensor)
            for tensor_name, tensor in teacher.wide.named_parameters()
            if tensor_name in teacher.plan.tensors
        }
        assert len(differ) > 20
        if noise == 0:
            assert max(differ.values()) <= 1e-9
        else:
            summing = [name for name in differ if teacher.plan.tensors[name].divisor > 1]
            assert min(differ[name] for name in summing) > 1e-3
            assert sum(error > 1e-12 for error in differ.values()) > 0.9 * len(differ)
