"""Layers of torch.nn and timm that models use rarely, one small model for each."""

import pickle

import pytest
import torch
import torch.nn as nn
from timm.layers import ScaledStdConv2d, StdConv2d

from exactness import expansion_errors
from timm_gpd import UnsupportedModelError, expand, plan_expansion
from timm_gpd.expansion.copies import wide_copy
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

    def __init__(self, r: int = 1) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(3, 8 * r), nn.Linear(3, 6 * r), nn.Linear(3, 10 * r)
        self.attn = nn.MultiheadAttention(8 * r, 4 * r, kdim=6 * r, vdim=10 * r, add_bias_kv=True, batch_first=True)

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


# Each maps images to 8 channels at the end, or to `r` times as many: built r times as wide everywhere.
BODIES = {
    'conv1d': lambda r=1: nn.Sequential(
        Reshape(lambda x: x.flatten(2)),
        nn.Conv1d(3, 8 * r, 3),
        nn.BatchNorm1d(8 * r),
        nn.GELU(),
        nn.Conv1d(8 * r, 12 * r, 3, groups=4),
        nn.Conv1d(12 * r, 12 * r, 3, groups=12 * r),
        nn.InstanceNorm1d(12 * r, affine=True),
        nn.Conv1d(12 * r, 8 * r, 1),
        channels_last(),
    ),
    'conv3d': lambda r=1: nn.Sequential(
        Reshape(lambda x: x.unsqueeze(2).expand(-1, -1, 4, -1, -1)),
        nn.Conv3d(3, 6 * r, 3),
        nn.BatchNorm3d(6 * r),
        nn.PReLU(6 * r),
        nn.Conv3d(6 * r, 6 * r, (1, 3, 3), groups=6 * r),
        nn.Conv3d(6 * r, 8 * r, 1, groups=2),
        channels_last(),
    ),
    'conv depthwise with a multiplier': lambda r=1: nn.Sequential(
        nn.Conv2d(3, 4 * r, 3),
        nn.Conv2d(4 * r, 12 * r, 3, groups=4),
        nn.GELU(),
        nn.Conv2d(12 * r, 8 * r, 1),
        channels_last(),
    ),
    # A single output is a mask, and stays.
    'conv of one channel': lambda r=1: nn.Sequential(
        nn.Conv2d(3, 1, 1), nn.GELU(), nn.Conv2d(1, 8 * r, 3), nn.GELU(), nn.Conv2d(8 * r, 8 * r, 1), channels_last()
    ),
    'conv_transpose1d': lambda r=1: nn.Sequential(
        Reshape(lambda x: x.flatten(2)),
        nn.ConvTranspose1d(3, 8 * r, 3),
        nn.GELU(),
        nn.ConvTranspose1d(8 * r, 8 * r, 2),
        channels_last(),
    ),
    'conv_transpose2d': lambda r=1: nn.Sequential(
        nn.ConvTranspose2d(3, 6 * r, 2, stride=2),
        nn.GELU(),
        nn.ConvTranspose2d(6 * r, 4 * r, 3, groups=2),
        nn.ConvTranspose2d(4 * r, 4 * r, 3, groups=4 * r, bias=False),
        nn.GELU(),
        nn.ConvTranspose2d(4 * r, 8 * r, 1),
        channels_last(),
    ),
    'conv_transpose3d': lambda r=1: nn.Sequential(
        Reshape(lambda x: x.unsqueeze(2)),
        nn.ConvTranspose3d(3, 4 * r, 2),
        nn.GELU(),
        nn.ConvTranspose3d(4 * r, 8 * r, (1, 2, 2)),
        channels_last(),
    ),
    'embedding': lambda r=1: nn.Sequential(Codes(6 * r), nn.GELU(), nn.Linear(6 * r, 8 * r)),
    'group_norm': lambda r=1: nn.Sequential(
        nn.Conv2d(3, 8 * r, 3), nn.GroupNorm(4, 8 * r), nn.Conv2d(8 * r, 8 * r, 1), channels_last()
    ),
    'lstm': lambda r=1: nn.Sequential(
        rows(), First(nn.LSTM(3, 4 * r, num_layers=2, bidirectional=True, batch_first=True))
    ),
    'lstm of hidden size 1': lambda r=1: nn.Sequential(
        rows(),
        nn.Linear(3, 4 * r),
        First(nn.LSTM(4 * r, r, bidirectional=True, batch_first=True)),
        nn.Linear(2 * r, 8 * r),
    ),
    'lstm with projections': lambda r=1: nn.Sequential(
        rows(), nn.Linear(3, 6 * r), First(nn.LSTM(6 * r, 9 * r, num_layers=2, proj_size=8 * r, batch_first=True))
    ),
    'gru': lambda r=1: nn.Sequential(
        rows(), nn.Linear(3, 6 * r), First(nn.GRU(6 * r, 8 * r, bias=False, batch_first=True))
    ),
    'rnn': lambda r=1: nn.Sequential(
        rows(), nn.Linear(3, 6 * r), First(nn.RNN(6 * r, 8 * r, nonlinearity='relu', batch_first=True))
    ),
    'cross attention': lambda r=1: nn.Sequential(tokens(), CrossAttention(r)),
    'transformer': lambda r=1: nn.Sequential(
        tokens(), nn.Linear(3, 8 * r), nn.TransformerEncoderLayer(8 * r, 2 * r, 16 * r, dropout=0.0, batch_first=True)
    ),
    'weight standardisation': lambda r=1: nn.Sequential(
        StdConv2d(3, 6 * r, 3),
        nn.GELU(),
        StdConv2d(6 * r, 6 * r, 3, groups=6 * r, bias=True),
        StdConv2d(6 * r, 8 * r, 3, groups=2),
        nn.GELU(),
        StdConv2d(8 * r, 8 * r, 1),
        channels_last(),
    ),
    'scaled weight standardisation': lambda r=1: nn.Sequential(
        ScaledStdConv2d(3, 6 * r, 3),
        nn.GELU(),
        ScaledStdConv2d(6 * r, 6 * r, 3, groups=6 * r),
        ScaledStdConv2d(6 * r, 8 * r, 3, groups=2),
        nn.GELU(),
        ScaledStdConv2d(8 * r, 8 * r, 1, gamma=1.7),
        channels_last(),
    ),
}


@pytest.mark.parametrize('ratio', (1, 2, 3, 4))
@pytest.mark.parametrize('name', BODIES)
def test_layer_is_exact(name, ratio):
    student = Student(BODIES[name](), 8)
    errors = expansion_errors(student, plan_expansion(student, ratio), torch.randn(4, 3, 8, 8))
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize('ratio', (2, 4))
@pytest.mark.parametrize('name', BODIES)
def test_the_teacher_is_what_would_be_built_wider(name, ratio):
    """Same shapes, and same numbers of channels, features, groups and heads: nothing was left narrow by mistake."""
    student, built = Student(BODIES[name](), 8), Student(BODIES[name](ratio), 8 * ratio)
    plan = plan_expansion(student, ratio)
    wide = wide_copy(student, plan, plan.expand_tensor)
    assert {n: t.shape for n, t in wide.state_dict().items()} == {n: t.shape for n, t in built.state_dict().items()}
    for module_name, module in built.named_modules():
        sizes = {key: value for key, value in vars(module).items() if isinstance(value, (int, tuple))}
        found = {key: vars(wide.get_submodule(module_name))[key] for key in sizes}
        assert found == sizes, module_name


@pytest.mark.parametrize('scale', ('student', 'teacher', 'balanced'))
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
