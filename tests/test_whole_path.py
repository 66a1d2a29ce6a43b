"""The whole path with students whose modules are shared or keep what they computed; and that the check finds faults."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn

from conftest import small_resnet
from steps import change_what_the_student_gets
from timm_gpd import GapPreservingTask, expand
from timm_gpd.axes import TensorMap
from timm_gpd.coverage.whole_path import CHECKS, PathError, WholePath
from timm_gpd.expansion.copies import copy_model, plain_copy
from timm_gpd.expansion.images import input_shape
from timm_gpd.teacher import DynamicTeacher

pytestmark = pytest.mark.usefixtures('memory_is_kept')


class Net(nn.Module):
    """A student of 8 channels with a body of some kind, for images of any size."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = body
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(self.norm(self.body(self.stem(x).relu())).mean((2, 3)))


def conv(channels=8):
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False)


class Parent(nn.Module):
    """Adds what another's module makes of its input to its own."""

    def __init__(self, shared):
        super().__init__()
        self.own, self.shared = nn.Conv2d(8, 8, 1), shared

    def forward(self, x):
        return self.own(x).tanh() + self.shared(x)


def listed_twice():
    shared = nn.Sequential(conv(), nn.BatchNorm2d(8))
    return Net(nn.Sequential(shared, nn.ReLU(), shared))


def in_two_parents():
    shared = nn.Sequential(conv(), nn.BatchNorm2d(8))
    return Net(nn.Sequential(Parent(shared), Parent(shared)))


class ChildTwice(Net):
    """Runs one child of the root under both of its names."""

    def __init__(self):
        super().__init__(conv())
        self.again = self.body

    def forward(self, x):
        return self.fc(self.norm(self.again(self.body(self.stem(x).relu()).relu())).mean((2, 3)))


def tied_parameter():
    first, second = conv(), conv()
    second.weight = first.weight
    return Net(nn.Sequential(first, nn.ReLU(), second))


class Selfish(nn.Module):
    """Holds another module in a list of Python's as well, which no one lists."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(conv(), nn.BatchNorm2d(8))
        self.stages = [self.inner, nn.functional.relu, self.inner]

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


SHARED = {
    'in a list twice': listed_twice,
    'in two parents': in_two_parents,
    'a child of the root twice': ChildTwice,
    'a tied parameter': tied_parameter,
    'in a list of Python': lambda: Net(Selfish()),
}


def coat():
    """A CoaT: one position encoding and one relative one for all blocks of a stage."""
    return timm.create_model(
        'coat_lite_tiny', num_classes=5, img_size=64, serial_depths=(2, 2, 1, 1), embed_dims=(16, 32, 64, 64)
    )


@pytest.mark.parametrize('create', [*SHARED.values(), coat], ids=[*SHARED, 'CoaT'])
def test_students_with_shared_modules_go_the_whole_path(create):
    path = WholePath(create)
    for check in CHECKS:
        getattr(path, check)()


def gradients(task, x, target):
    task.zero_grad()
    result = task(x, target)
    result['loss'].backward()
    return [result['loss'].detach(), *[parameter.grad for parameter in task.get_trainable_module().parameters()]]


@pytest.mark.usefixtures('may_change_settings')
@pytest.mark.parametrize('create', SHARED.values(), ids=SHARED)
def test_shared_modules_with_branches_and_compiled(create):
    torch.manual_seed(0)
    task = GapPreservingTask(create(), num_branches=6, noise=0.1, verbose=False).double().train()
    x, target = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.arange(4)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    for _ in range(2):  # branches leave 0
        gradients(task, x, target)
        optimizer.step()

    compiled = copy.deepcopy(task)
    torch._dynamo.reset()
    compiled.compile(backend='eager', fullgraph=True)
    for actual, expected in zip(gradients(compiled, x, target), gradients(task, x, target)):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)

    teacher = task.eval().get_dynamic_teacher()
    loaded = create().double().eval()
    loaded.load_state_dict(task.get_student().state_dict(), strict=True)
    other = GapPreservingTask(create(), num_branches=6, verbose=False).double().eval()
    state = task.get_checkpoint_state()
    other.load_checkpoint_state(state['state_dict'], state['task_state'])
    with torch.no_grad():
        student_logits, teacher_logits = teacher.joint(x)
        torch.testing.assert_close(loaded(x), student_logits, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(teacher.extract_teacher()(x), teacher_logits, rtol=1e-12, atol=1e-12)
        for copied in (other.get_dynamic_teacher(), copy.deepcopy(teacher)):
            assert all(torch.equal(*pair) for pair in zip(copied.joint(x), (student_logits, teacher_logits)))


def test_what_is_shared_stays_shared():
    """In both extracted models, as in the student: one module, one parameter."""
    for create in SHARED.values():
        student = create()
        teacher = expand(student, num_branches=2)
        for plain in (teacher.extract_student(), teacher.extract_teacher()):
            for named in ('named_modules', 'named_parameters'):
                assert [name for name, _ in getattr(plain, named)()] == [name for name, _ in getattr(student, named)()]


# -- computed tensors that a module keeps ---------------------------------------------------------------------------

CACHING = {
    'levit': partial(timm.create_model, 'levit_128s', depth=(1, 1, 1)),
    'tiny_vit': partial(timm.create_model, 'tiny_vit_5m_224', depths=(1, 1, 1, 1)),
    'efficientformer': partial(
        timm.create_model, 'efficientformer_l1', depths=(1, 1, 1, 2), embed_dims=(24, 48, 112, 224)
    ),
    'efficientformer_v2': partial(timm.create_model, 'efficientformerv2_s0', depths=(1, 1, 2, 2), num_vit=1),
    'efficientvit_msra': partial(timm.create_model, 'efficientvit_m0', img_size=64),
}


class Hoarder(nn.Module):
    """In evaluation mode it computes with what it has kept in an attribute, a dict and nested lists, if it has."""

    def __init__(self):
        super().__init__()
        self.weight, self.shift, self.conv = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8)), conv()
        self.forget()
        self.last, self.seen = None, {'inputs': []}  # kept, and never used

    def forget(self):
        self.kept, self.table, self.list = None, {}, [[], ()]

    def train(self, mode=True):
        if mode:
            self.forget()
        return super().train(mode)

    def forward(self, x):
        self.last = x
        self.seen['inputs'].append((x * 2,))
        if self.training:
            return self.run(x, *self.compute())
        if self.kept is None:
            self.kept, self.table['here'], listed = self.compute()
            self.list = [[listed], (listed,)]
        return self.run(x, self.kept, self.table['here'], self.list[1][0])

    def compute(self):
        weight, shift = self.weight[:, None, None], self.shift[:, None, None]
        return weight.exp(), weight.sin(), shift.tanh()

    def run(self, x, first, second, third):
        return self.conv(x * first + second) * third


CACHING['artificial'] = lambda: Net(Hoarder())


@pytest.mark.parametrize('create', CACHING.values(), ids=CACHING)
def test_a_student_that_was_evaluated_before_is_copied_extracted_and_loaded(create):
    student, other = create().eval(), create().eval()
    x = torch.randn(2, *(input_shape(student) if hasattr(student, 'pretrained_cfg') else (3, 8, 8)))
    student(x)  # with gradients: what it keeps has a graph
    with torch.no_grad():
        for parameter in student.parameters():  # and is stale
            parameter.mul_(1.25)
    teacher = expand(student).eval()
    student.train().eval()
    expected = student(x).detach()
    torch.testing.assert_close(teacher.joint(x).teacher, expected, rtol=1e-4, atol=1e-5)
    for plain in (teacher.extract_student(), copy.deepcopy(teacher).extract_student()):
        assert not plain.training and torch.equal(plain(x), expected)
    assert torch.equal(teacher.extract_teacher()(x), teacher(x))

    with torch.no_grad():
        teacher.joint(x)
        teacher.load_student(other.state_dict())
        logits = other(x)
        torch.testing.assert_close(teacher.joint(x).teacher, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(teacher.joint(x).student, logits, rtol=1e-5, atol=1e-6)
        assert torch.equal(teacher.extract_student()(x), logits)


def test_what_a_compiled_run_keeps_is_used_by_no_later_one():
    """A compiler runs the models themselves, not twins of them, and what they keep stays."""
    student, other = Net(Hoarder()).eval(), Net(Hoarder()).eval()
    teacher = expand(student).eval()
    x = torch.randn(2, 3, 8, 8)
    torch._dynamo.reset()
    torch.compile(teacher.joint, backend='eager')(x)
    assert teacher.student.body.kept is not None
    assert torch.equal(teacher.extract_student()(x), student(x))
    for copied in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert torch.equal(copied.forward_student(x), student(x))
    with torch.no_grad():
        teacher.load_student(other.state_dict())
        torch.testing.assert_close(teacher.joint(x).student, other(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(teacher.joint(x).teacher, other(x), rtol=1e-4, atol=1e-5)


def test_copies_take_any_kept_tensor_and_leave_modes_alone():
    model = Net(nn.Sequential(Hoarder(), nn.BatchNorm2d(8))).train()
    model.body[0].eval()
    x = torch.randn(2, 3, 8, 8)
    model(x)
    assert model.body[0].kept.grad_fn is not None
    copied = plain_copy(model)
    assert [module.training for module in copied.modules()] == [module.training for module in model.modules()]
    assert copied.body[0].kept is None and model.body[0].kept is not None
    assert not copied.body[0].last.requires_grad and torch.equal(copied.body[0].last, model.body[0].last)
    narrow = copy_model(model, lambda name, tensor: tensor.flatten()[:1])
    assert all(len(parameter) == 1 for parameter in narrow.parameters())


# -- noise ----------------------------------------------------------------------------------------------------------


def test_noise_for_a_layer_that_sums_over_tokens_and_channels():
    """Its input has several segments: the registers' and class tokens' channels, and those of the patches."""
    path = WholePath(partial(timm.create_model, 'vit_dpwee_patch16_reg1_gap_256', depth=2, img_size=64))
    assert path.noise() > 0


# -- the check itself -----------------------------------------------------------------------------------------------


def forget_statistics(monkeypatch):
    extract = DynamicTeacher.extract_student
    monkeypatch.setattr(
        DynamicTeacher,
        'extract_student',
        lambda self: extract(self).apply(
            lambda module: module.reset_running_stats() if isinstance(module, nn.BatchNorm2d) else None
        ),
    )


def save_another_state(monkeypatch):
    state = GapPreservingTask.get_task_state
    monkeypatch.setattr(
        GapPreservingTask,
        'get_task_state',
        lambda self, **kwargs: {
            **state(self),
            'dynamic_teacher': {name: tensor + 1 for name, tensor in state(self)['dynamic_teacher'].items()},
        },
    )


FAULTS = {
    'gradient': lambda monkeypatch: change_what_the_student_gets(monkeypatch, lambda tensor: tensor * 1.5),
    'extraction': forget_statistics,
    'state': save_another_state,
    'steps': lambda monkeypatch: monkeypatch.setattr(torch.optim.SGD, 'step', lambda self: None),
    'copies': lambda monkeypatch: monkeypatch.setattr(
        DynamicTeacher, '__deepcopy__', lambda self, memo: self, raising=False
    ),
    'noise': lambda monkeypatch: monkeypatch.setattr(TensorMap, 'noise_like', lambda self, tensor, std: 0 * tensor),
}


@pytest.mark.parametrize('check', CHECKS)
def test_a_fault_is_found(check, monkeypatch):
    path = WholePath(small_resnet)
    FAULTS[check](monkeypatch)
    with pytest.raises(PathError):
        getattr(path, check)()
