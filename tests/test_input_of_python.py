"""What Python code hands over, right and wrong, is taken or refused in one line."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import small_resnet
from timm_gpd import GapPreservingTask, UnsupportedModelError, expand
from timm_gpd.errors import InputError
from timm_gpd.teacher.rehearsal import gradient_pairs, gradients_of


class Transposed(nn.Module):
    """A parameter of which the later axis meets channels first."""

    def __init__(self, how):
        super().__init__()
        self.stem, self.w, self.fc = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(6, 8)), nn.Linear(6, 5)
        self.v = nn.Parameter(torch.randn(8, 6))
        self.how = how

    def forward(self, x):
        return self.fc(self.how(self, self.stem(x).relu().mean((2, 3))))


@pytest.mark.parametrize(
    'how',
    [
        lambda net, h: h @ net.w.t(),
        lambda net, h: F.linear(h, net.v.T),
        lambda net, h: torch.einsum('oc,bc->bo', net.w, h),
        lambda net, h: torch.tensordot(h, net.w, dims=([1], [1])),
        lambda net, h: F.conv2d(h[:, :, None, None], net.v.t()[:, :, None, None]).flatten(1),
    ],
    ids=['matmul', 'linear', 'einsum', 'tensordot', 'conv2d'],
)
@pytest.mark.parametrize('ratio', [2, 3])
def test_a_transposed_parameter_trains(how, ratio):
    torch.manual_seed(0)
    student = Transposed(how).double()
    x, target = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)
    task = GapPreservingTask(student, ratio=ratio, classifier='fc', verbose=False)
    trained = task.get_dynamic_teacher()
    gradients = gradients_of(student(x), dict(student.named_parameters()))
    pairs = list(gradient_pairs(trained, trained.joint(x).student, gradients))
    assert len(pairs) == len(gradients)
    for name, inside, gradient in pairs:
        torch.testing.assert_close(inside, gradient, rtol=1e-10, atol=1e-14, msg=name)
    task.double()(x, target)['loss'].backward()
    used = [name for name, gradient in gradients.items() if gradient is not None]
    assert all(trained.wide.get_parameter(name).grad.isfinite().all() for name in used)
    assert all(trained.wide.get_parameter(name).grad.any() for name in used)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(task.get_student()(x), trained.forward_student(x))
        torch.testing.assert_close(trained.extract_teacher()(x), trained(x))


def test_a_tasks_own_state_loads():
    x, target = torch.randn(2, 3, 32, 32), torch.arange(2)
    task, other = (GapPreservingTask(small_resnet(), verbose=False) for _ in range(2))
    task.setup_ema()
    other.setup_ema()
    result = other.load_state_dict(task.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    with torch.no_grad():
        assert all(torch.equal(task.eval()(x, target)[key], other.eval()(x, target)[key]) for key in ('loss', 'output'))
    copied = copy.deepcopy(task)
    copied.load_state_dict(other.state_dict())


def test_a_criterion_may_be_a_function():
    student, x, target = small_resnet(), torch.randn(4, 3, 32, 32), torch.arange(4)
    results = [
        GapPreservingTask(student, criterion=criterion, verbose=False).eval()(x, target)['loss']
        for criterion in (F.cross_entropy, nn.CrossEntropyLoss())
    ]
    assert torch.equal(*results)
    with pytest.raises(InputError, match="criterion must be a loss of logits and targets, but is 'ce'"):
        GapPreservingTask(student, criterion='ce')


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits, target):
        return F.cross_entropy(logits * self.scale, target)


def test_what_a_criterion_learns_is_saved():
    task, other = (GapPreservingTask(small_resnet(), criterion=Scaled(), verbose=False) for _ in range(2))
    with torch.no_grad():
        task.criterion.scale.fill_(7.0)
    state = task.get_checkpoint_state()
    other.load_checkpoint_state(state['state_dict'], state['task_state'])
    assert other.criterion.scale == 7.0


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.stem, self.fc, self.what = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), what

    def forward(self, x):
        return self.what(self.fc(self.stem(x).mean((2, 3))))


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: expand('test_resnet'), "the student must be a model, an nn.Module, but is 'test_resnet'"),
        (lambda: GapPreservingTask(None), 'the student must be a model, an nn.Module, but is None'),
        (lambda: expand(expand(small_resnet())), 'this is a dynamic teacher already'),
        (lambda: expand(small_resnet(), noise='0.1'), "noise must be a finite number, but is '0.1'"),
        (lambda: expand(small_resnet(), noise=float('inf')), 'noise must be a finite number, but is inf'),
        (
            lambda: GapPreservingTask(small_resnet(), gpd_weight='foo'),
            "gpd_weight must be a finite number, but is 'foo'",
        ),
        (
            lambda: GapPreservingTask(small_resnet(), distill_loss_weight=float('nan')),
            'distill_loss_weight must be a finite number, but is nan',
        ),
        (lambda: expand(Returns(lambda x: {'logits': x}), classifier='fc'), 'returns a dict: its forward must return'),
        (lambda: expand(Returns(lambda x: None), classifier='fc'), 'returns a NoneType: its forward must return'),
    ],
)
def test_what_is_wrong_is_said_in_one_line(make, message):
    with pytest.raises(InputError, match=message) as raised:
        make()
    assert '\n' not in str(raised.value)


def test_a_student_is_not_its_own_static_teacher():
    student = small_resnet()
    with pytest.raises(InputError, match='the static teacher is the student itself'):
        GapPreservingTask(student, static_teacher=student)
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize('channels', [1, 5, 6])
def test_channels_of_a_network_of_ones_own_are_those_of_its_first_convolution(channels):
    student = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    student.append(nn.Linear(8, 5))
    assert expand(student, classifier='4').plan.input_shape[0] == channels


def test_names_are_still_those_of_the_package():
    assert issubclass(UnsupportedModelError, InputError)
