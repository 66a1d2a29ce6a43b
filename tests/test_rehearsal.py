"""`expand` runs what it hands out, and refuses it where the student inside is not the student."""

import pytest
import torch

from conftest import small_resnet
from steps import change_what_the_student_gets
from timm_gpd import UnsupportedModelError, expand
from timm_gpd.teacher import DynamicTeacher


def distort_output(monkeypatch):
    change_what_the_student_gets(monkeypatch, lambda tensor: tensor * 1.5)


def lose_gradients(monkeypatch):
    change_what_the_student_gets(monkeypatch, lambda tensor: tensor.detach() + 0 * tensor)


def lose_statistics(monkeypatch):
    extract = DynamicTeacher.extract_student

    def extract_student(self):
        student = extract(self)
        student.bn1.running_var.add_(1)
        return student

    monkeypatch.setattr(DynamicTeacher, 'extract_student', extract_student)


@pytest.mark.parametrize(
    'fault, what',
    [
        (distort_output, 'the output'),
        (lose_gradients, 'the gradient of conv1.0.weight'),
        (lose_statistics, 'bn1.running_var'),
    ],
)
@pytest.mark.parametrize('kwargs', [{}, {'scale': 'teacher', 'ratio': 3, 'noise': 0.0}, {'num_branches': 2}])
def test_a_fault_is_found(fault, what, kwargs, monkeypatch):
    if fault is lose_gradients and 'num_branches' in kwargs:
        what = 'the gradient of conv1.1.weight'  # of tensors that have no branches
    student = small_resnet()
    expand(student, **kwargs)
    fault(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=f'ResNet cannot be trained inside a dynamic teacher: {what} there'):
        expand(student, **kwargs)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    'kwargs',
    [{}, {'ratio': 3, 'noise': 0.0}, {'scale': 'teacher', 'ratio': 3, 'noise': 0.0}, {'num_branches': 6, 'noise': 0.1}],
    ids=str,
)
def test_what_is_right_passes_and_is_left_as_it_was(dtype, kwargs):
    student = small_resnet(drop_rate=0.5, drop_path_rate=0.5).to(dtype)
    student.conv1[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    state = torch.get_rng_state()
    if 'noise' not in kwargs:
        expand(student, **kwargs)
        assert torch.equal(torch.get_rng_state(), state)
    teacher = expand(student, **kwargs)
    assert all(module.training for module in (student, *teacher.modules()))
    assert all(parameter.grad is None for model in (student, teacher) for parameter in model.parameters())
    for after in (student.state_dict(), teacher.extract_student().state_dict()):
        assert all(torch.allclose(after[name].double(), before[name].double(), rtol=1e-2) for name in before)
    assert torch.equal(teacher.student.bn1.running_mean, before['bn1.running_mean'])


def test_a_student_that_does_not_run_backward_is_compared_in_the_rest(monkeypatch):
    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError('backward can only be called in training mode')

    student = small_resnet()
    student.layer1.register_forward_hook(lambda module, args, output: ForwardOnly.apply(output))
    expand(student)
    lose_statistics(monkeypatch)
    with pytest.raises(UnsupportedModelError, match='bn1.running_var'):
        expand(student)
