"""Layers of torch.nn and timm that models use rarely, one small model for each."""
import pickle

import pytest
import torch
import torch.nn as nn
from timm.layers import ScaledStdConv2d, StdConv2d

from exactness import expansion_errors
from timm_gpd import UnsupportedModelError, expand, plan_expansion
from timm_gpd.expansion.verify import relative_error


class Student(nn.Module):
    """Images (B, 3, 8, 8) to logits (B, 5), through a body that maps to (B, ..., width)."""
    pretrained_cfg = {'input_size': (3, 8, 8)}

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 5)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return self.head(x.flatten(1, -2).mean(1) if x.dim() > 2 else x)


class Reshape(nn.Module):
    def __init__(self, reshape) -> None:
        super().__init__()
        self.reshape = reshape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reshape(x)


class First(nn.Module):
    """The first output of a layer that has several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


class CrossAttention(nn.Module):
    """Tokens (B, N, 3) attend to keys and values of other widths than their own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(3, 8), nn.Linear(3, 6), nn.Linear(3, 10)
        self.attn = nn.MultiheadAttention(8, 4, kdim=6, vdim=10, add_bias_kv=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(self.query(x), key=self.key(x), value=self.value(x))[0]


class Codes(nn.Module):
    """A code for every pixel (B, 3, H, W), embedded: (B, 3 * H * W, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width, padding_idx=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embedding((x.flatten(1) * 4).long().clamp(-8, 7) + 8)


def tokens() -> nn.Module:
    return Reshape(lambda x: x.flatten(2).transpose(1, 2))


def rows() -> nn.Module:
    return Reshape(lambda x: x.mean(3).transpose(1, 2))


def channels_last() -> nn.Module:
    return Reshape(lambda x: x.movedim(1, -1))


BODIES = {
    'conv1d': lambda: nn.Sequential(
        Reshape(lambda x: x.flatten(2)), nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.GELU(),
        nn.Conv1d(8, 12, 3, groups=4),
        nn.Conv1d(12, 12, 3, groups=12), nn.InstanceNorm1d(12, affine=True), nn.Conv1d(12, 8, 1), channels_last()),
    'conv3d': lambda: nn.Sequential(
        Reshape(lambda x: x.unsqueeze(2).expand(-1, -1, 4, -1, -1)), nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), nn.PReLU(6),
        nn.Conv3d(6, 6, (1, 3, 3), groups=6), nn.Conv3d(6, 8, 1, groups=2), channels_last()),
    'conv depthwise with a multiplier': lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 12, 3, groups=4), nn.GELU(), nn.Conv2d(12, 8, 1), channels_last()),
    'conv of one channel': lambda: nn.Sequential(
        nn.Conv2d(3, 1, 1), nn.GELU(), nn.Conv2d(1, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 1), channels_last()),
    'conv_transpose1d': lambda: nn.Sequential(
        Reshape(lambda x: x.flatten(2)), nn.ConvTranspose1d(3, 8, 3), nn.GELU(), nn.ConvTranspose1d(8, 8, 2),
        channels_last()),
    'conv_transpose2d': lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 6, 2, stride=2), nn.GELU(), nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False), nn.GELU(), nn.ConvTranspose2d(4, 8, 1), channels_last()),
    'conv_transpose3d': lambda: nn.Sequential(
        Reshape(lambda x: x.unsqueeze(2)), nn.ConvTranspose3d(3, 4, 2), nn.GELU(), nn.ConvTranspose3d(4, 8, (1, 2, 2)),
        channels_last()),
    'embedding': lambda: nn.Sequential(Codes(6), nn.GELU(), nn.Linear(6, 8)),
    'group_norm': lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1), channels_last()),
    'lstm': lambda: nn.Sequential(rows(), First(nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True))),
    'lstm of hidden size 1': lambda: nn.Sequential(
        rows(), nn.Linear(3, 4), First(nn.LSTM(4, 1, bidirectional=True, batch_first=True)), nn.Linear(2, 8)),
    'lstm with projections': lambda: nn.Sequential(
        rows(), nn.Linear(3, 6), First(nn.LSTM(6, 9, num_layers=2, proj_size=8, batch_first=True))),
    'gru': lambda: nn.Sequential(rows(), nn.Linear(3, 6), First(nn.GRU(6, 8, bias=False, batch_first=True))),
    'rnn': lambda: nn.Sequential(rows(), nn.Linear(3, 6), First(nn.RNN(6, 8, nonlinearity='relu', batch_first=True))),
    'cross attention': lambda: nn.Sequential(tokens(), CrossAttention()),
    'transformer': lambda: nn.Sequential(
        tokens(), nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True)),
    'weight standardisation': lambda: nn.Sequential(
        StdConv2d(3, 6, 3), nn.GELU(), StdConv2d(6, 6, 3, groups=6, bias=True), StdConv2d(6, 8, 3, groups=2),
        nn.GELU(), StdConv2d(8, 8, 1), channels_last()),
    'scaled weight standardisation': lambda: nn.Sequential(
        ScaledStdConv2d(3, 6, 3), nn.GELU(), ScaledStdConv2d(6, 6, 3, groups=6), ScaledStdConv2d(6, 8, 3, groups=2),
        nn.GELU(), ScaledStdConv2d(8, 8, 1, gamma=1.7), channels_last()),
}


@pytest.mark.parametrize('ratio', (1, 2, 3, 4))
@pytest.mark.parametrize('name', BODIES)
def test_layer_is_exact(name, ratio):
    student = Student(BODIES[name](), 8)
    errors = expansion_errors(student, plan_expansion(student, ratio), torch.randn(4, 3, 8, 8))
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize('name', BODIES)
def test_layer_is_widened(name):
    """Parameters of hidden layers hold about ratio² times as many numbers: nothing was left narrow by mistake."""
    student = Student(BODIES[name](), 8)
    plan = plan_expansion(student, 4)
    kept = {n for n, p in student.body.named_parameters(prefix='body') if n not in plan.tensors and p.numel() > 1}
    # A single output channel is a mask. Rows of its bias are not listed either: it has one entry.
    assert kept <= ({'body.0.weight'} if name == 'conv of one channel' else set())


@pytest.mark.parametrize('scale', ('student', 'teacher'))
@pytest.mark.parametrize('name', ('lstm', 'transformer', 'cross attention', 'weight standardisation'))
def test_layer_trains(name, scale):
    """One optimizer step moves teacher and student, and the step is the student's own function of what is stored."""
    teacher = expand(Student(BODIES[name](), 8).double(), ratio=2, scale=scale)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    before, wide = teacher.joint(x)
    assert relative_error(wide, before) <= 1e-12
    (before.square().sum() + wide.square().sum()).backward()
    torch.optim.SGD(teacher.parameters(), 1e-3).step()
    after = teacher.forward_student(x)
    assert relative_error(after, before) > 1e-6
    assert relative_error(teacher.extract_student()(x), after) <= 1e-12


def test_divided_inputs_are_data():
    """A plan that divides inputs can be printed and pickled, and so can the teacher that it makes."""
    student = Student(BODIES['weight standardisation'](), 8)
    plan = plan_expansion(student)
    assert plan.divided_inputs == {'body.3': 2, 'body.5': 2}
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert 'body.5: input divided by 2' in str(plan)
    student.body = nn.Sequential(*list(student.body)[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())  # no lambdas
    teacher = expand(student.eval())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(teacher))(x), teacher(x))


@pytest.mark.parametrize('dtype', (torch.float64, torch.bfloat16))
def test_plan_does_not_depend_on_the_dtype(dtype):
    student = Student(BODIES['weight standardisation'](), 8)
    assert plan_expansion(student) == plan_expansion(student.to(dtype))


def test_computed_weight_of_another_module_is_refused():
    class Borrower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.lender = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(self.stem(x), self.lender.weight.abs()).movedim(1, -1)

    with pytest.raises(UnsupportedModelError, match=r"'body' of class .*Borrower.*body.lender.weight"):
        plan_expansion(Student(Borrower(), 8))
