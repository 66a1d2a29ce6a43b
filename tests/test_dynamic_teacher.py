"""How one set of stored tensors runs as two models: gradients, gradient checkpointing, compilation."""

import copy
import shutil

import pytest
import timm
import torch
import torch._dynamo
import torch.nn as nn
import torch.nn.functional as F

from timm_gpd import GapPreservingTask, expand
from timm_gpd.axes import AxisMap, Segment, TensorMap
from timm_gpd.teacher.shared_tensors import SharedTensors

HEADS = AxisMap((Segment(6, 2, 3), Segment(4, 3)))
TENSOR_MAPS = {
    'kernel': TensorMap((4, 6, 3, 3), ((0, AxisMap.uniform(4, 2)), (1, AxisMap.uniform(6, 3))), sum_axis=1),
    'heads': TensorMap((10, 8), ((0, HEADS), (1, AxisMap.uniform(8, 2, 4))), sum_axis=1),
    'norm': TensorMap((4,), ((0, AxisMap.uniform(4, 2)),)),
}


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_shared_tensors_and_their_gradients_are_those_of_the_plain_formula(memory_format):
    stored = {
        name: torch.randn(tensor_map.teacher_shape, dtype=torch.float64, requires_grad=True)
        for name, tensor_map in TENSOR_MAPS.items()
    }
    stored['kernel'] = stored['kernel'].detach().to(memory_format=memory_format).requires_grad_()
    stored['head'] = torch.randn(5, dtype=torch.float64, requires_grad=True)
    wide_scales, narrow_scales = {'kernel': 1 / 3, 'heads': 0.5}, {'norm': 4.0}
    teacher, student = SharedTensors(TENSOR_MAPS, wide_scales, narrow_scales)(stored)
    expected_teacher = {name: tensor * wide_scales.get(name, 1) for name, tensor in stored.items()}
    expected_student = {
        name: (TENSOR_MAPS[name].first_replica(tensor) if name in TENSOR_MAPS else tensor) * narrow_scales.get(name, 1)
        for name, tensor in stored.items()
    }

    def gradients(teacher, student):
        loss = sum((tensor**2).sum() for tensor in teacher.values())
        loss = loss + sum((tensor**3).sum() for tensor in student.values())
        return torch.autograd.grad(loss, list(stored.values()), retain_graph=True)

    for name in stored:
        assert student[name].is_contiguous(memory_format=memory_format if name == 'kernel' else torch.contiguous_format)
        torch.testing.assert_close(teacher[name], expected_teacher[name])
        torch.testing.assert_close(student[name], expected_student[name])
    for actual, expected in zip(gradients(teacher, student), gradients(expected_teacher, expected_student)):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('used', ['teacher', 'student'])
def test_a_tensor_that_one_model_uses_gets_its_gradient_and_an_unused_one_none(used):
    stored = {
        name: torch.randn(tensor_map.teacher_shape, requires_grad=True) for name, tensor_map in TENSOR_MAPS.items()
    }
    teacher, student = SharedTensors(TENSOR_MAPS, {}, {})(stored)
    {'teacher': teacher, 'student': student}[used]['kernel'].sum().backward()
    expected = torch.ones_like(stored['kernel']) if used == 'teacher' else torch.zeros_like(stored['kernel'])
    expected[::2, ::3] = 1
    torch.testing.assert_close(stored['kernel'].grad, expected)
    assert stored['heads'].grad is None and stored['norm'].grad is None


def joint_gradients(teacher, x):
    """Of a loss whose gradient is the same for every sum order, by parameter name."""
    teacher.zero_grad()
    student_logits, of_teacher = teacher.joint(x, teacher_loss=lambda logits: {'loss': logits.cos().sum()})
    (student_logits.square().sum() + of_teacher['gradients']).backward()
    return {name: parameter.grad for name, parameter in teacher.named_parameters()}


@pytest.mark.parametrize(
    'scale, branches', [('student', 1), ('teacher', 1), ('balanced', 1), ('student', 6), ('teacher', 6)]
)
def test_gradient_checkpointing_changes_no_gradient(tiny_student, scale, branches):
    teacher = expand(tiny_student, scale=scale, num_branches=branches).train()
    recomputing = copy.deepcopy(teacher)
    recomputing.set_grad_checkpointing()
    parameters = dict(recomputing.named_parameters())
    x = torch.randn(4, 1, 32, 32)
    expected = joint_gradients(teacher, x)
    for name, gradient in joint_gradients(recomputing, x).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    after = dict(recomputing.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items()), (
        'parameters are back in their places'
    )


def test_gradient_checkpointing_of_several_batches_before_one_backward_pass(tiny_student):
    gradients = []
    for enable in (False, True):
        teacher = expand(tiny_student).train()
        teacher.set_grad_checkpointing(enable)
        batches = torch.randn(2, 4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        losses = [sum(logits.square().sum() for logits in teacher.joint(x)) for x in batches]
        gradients.append(torch.autograd.grad(sum(losses), list(teacher.parameters())))
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-5)


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


STAGES = {
    "teacher's forward": lambda task: task.get_dynamic_teacher().wide.layer3[0].register_forward_hook(stop),
    "teacher's backward": lambda task: (
        task.get_dynamic_teacher().wide.layer2[0].conv2.register_full_backward_hook(stop)
    ),
    "student's forward": lambda task: task.get_dynamic_teacher().student.layer3[0].register_forward_hook(stop),
    "student's backward": lambda task: (
        task.get_dynamic_teacher().student.layer2[0].conv2.register_full_backward_hook(stop)
    ),
    'end of backward': lambda task: task.get_dynamic_teacher().wide.bn1.weight.register_hook(stop),
}


@pytest.mark.parametrize('recompute', [False, True], ids=['eager', 'checkpointing'])
@pytest.mark.parametrize('stage', STAGES)
def test_a_step_that_fails_leaves_no_trace(tiny_student, stage, recompute):
    """Whatever the stage: what is saved then is whole, and the next step is that of a task without failure."""
    task = GapPreservingTask(tiny_student, noise=0.1, num_branches=2, verbose=False).train()
    task.get_dynamic_teacher().set_grad_checkpointing(recompute)
    twin = copy.deepcopy(task)
    x, target = torch.randn(4, 1, 32, 32), torch.arange(4)
    hook = STAGES[stage](task)
    with pytest.raises(Stop):
        task(x, target)['loss'].backward()
    hook.remove()
    state, expected = task.get_checkpoint_state(), twin.get_checkpoint_state()
    for key in ('state_dict', 'task_state'):
        assert list(state[key]) == list(expected[key])
    tensors = state['task_state']['dynamic_teacher']
    assert list(tensors) == list(expected['task_state']['dynamic_teacher'])
    for name, _ in twin.get_dynamic_teacher().named_parameters():
        assert torch.equal(tensors[name], expected['task_state']['dynamic_teacher'][name])
    twin.load_checkpoint_state(state['state_dict'], state['task_state'])  # statistics have moved

    gradients = []
    for each in (task, twin):
        each.zero_grad()
        result = each(x, target)
        result['loss'].backward()
        gradients.append([result['loss'].detach(), *[p.grad for p in each.get_trainable_module().parameters()]])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.stem(x)).relu()
        return self.fc((x + self.norm2(self.conv(x)).relu()).mean((2, 3)))


STUDENTS = {
    'convolutions': Convolutions,
    'efficientnet': lambda: timm.create_model('test_efficientnet', num_classes=10),
    'vit': lambda: timm.create_model('test_vit', depth=2, num_classes=10, img_size=32),
}


@pytest.mark.usefixtures('may_change_settings')
@pytest.mark.parametrize(
    'name, branches, backend',
    [
        ('convolutions', 6, 'aot_eager'),  # this and inductor take time by the layer
        ('efficientnet', 6, 'eager'),
        ('vit', 1, 'eager'),
        pytest.param(
            'convolutions', 1, 'inductor', marks=pytest.mark.skipif(not shutil.which('g++'), reason='needs a compiler')
        ),
    ],
)
def test_compiles_as_one_graph(name, branches, backend):
    """No graph break anywhere in the joint step, and the same gradients."""
    task = GapPreservingTask(STUDENTS[name](), num_branches=branches, verbose=False).double().train()
    x, target = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.arange(2)
    compiled = copy.deepcopy(task)
    torch._dynamo.reset()
    compiled.compile(backend=backend, fullgraph=True)
    results = task(x, target), compiled(x, target)
    assert set(results[0]) == set(results[1])
    for key, expected in results[0].items():
        torch.testing.assert_close(results[1][key], expected, rtol=1e-9, atol=1e-12)
    for result in results:
        result['loss'].backward()
    gradients = [
        {name: parameter.grad for name, parameter in t.get_trainable_module().named_parameters()}
        for t in (task, compiled)
    ]
    for parameter, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('branches', [1, 6])
def test_kernels_are_merged_once_a_step(tiny_student, branches, monkeypatch):
    from timm_gpd.teacher.branches import BranchedKernel

    teacher = expand(tiny_student, num_branches=branches)
    calls = []
    merge = BranchedKernel.forward
    monkeypatch.setattr(BranchedKernel, 'forward', lambda self, *inputs: calls.append(self) or merge(self, *inputs))
    teacher.joint(torch.randn(2, 1, 32, 32))
    assert (
        len(calls)
        == len(set(calls))
        == sum(isinstance(module, BranchedKernel) for module in teacher.branches.modules())
    )
    assert bool(calls) == (branches > 1)


@pytest.mark.parametrize(
    'name, branches, scale',
    [
        ('test_resnet', 6, 'student'),
        ('test_resnet', 6, 'teacher'),
        ('test_resnet', 1, 'balanced'),
        ('test_vit', 1, 'student'),
        ('test_vit', 1, 'teacher'),
        ('test_vit', 1, 'balanced'),
    ],
)
def test_extracted_models_are_ordinary_ones_with_the_same_functions(name, branches, scale):
    dynamic_teacher = expand(timm.create_model(name, num_classes=5), num_branches=branches, noise=0.5, scale=scale)
    optimizer = torch.optim.SGD(dynamic_teacher.parameters(), lr=0.1)
    x = torch.randn(4, 3, 160, 160)
    for _ in range(2):  # branches leave 0, batch statistics move
        sum(F.cross_entropy(logits, torch.arange(4)) for logits in dynamic_teacher.joint(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    student, teacher = dynamic_teacher.eval().extract_student(), dynamic_teacher.extract_teacher()
    names = [name for name, _ in student.named_parameters()]
    memory = {parameter.data_ptr() for parameter in dynamic_teacher.parameters()}
    for plain, tensors in (
        (teacher, dynamic_teacher.teacher_parameters()),
        (student, dynamic_teacher.student_parameters()),
    ):
        assert [name for name, _ in plain.named_parameters()] == names
        assert all(p.equal(tensors[n]) and p.data_ptr() not in memory for n, p in plain.named_parameters())
    with torch.no_grad():
        student_logits, teacher_logits = dynamic_teacher.joint(x)
        assert not torch.allclose(student_logits, teacher_logits)
        torch.testing.assert_close(student(x), student_logits)
        torch.testing.assert_close(teacher(x), teacher_logits)


@pytest.mark.parametrize('branches', [1, 6])
def test_one_model_alone_costs_one_model(tiny_student, branches, monkeypatch):
    """Of the other model nothing is computed: no slice for the teacher, no scaled copies for the student."""
    teacher = expand(tiny_student, num_branches=branches).eval()
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        student_logits, teacher_logits = teacher.joint(x)
        slices, first_replica = [], TensorMap.first_replica
        monkeypatch.setattr(
            TensorMap, 'first_replica', lambda self, tensor: slices.append(1) or first_replica(self, tensor)
        )
        assert torch.equal(teacher(x), teacher_logits) and not slices
        monkeypatch.setattr(SharedTensors, 'of_teacher', None)
        monkeypatch.setattr(SharedTensors, '__call__', None)
        assert torch.equal(teacher.forward_student(x), student_logits) and slices
