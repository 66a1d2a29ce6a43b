"""The ratios between student and dynamic teacher: exact, differentiable, and without a trace in running statistics."""

import copy
import random

import pytest
import timm
import torch
import torch.nn as nn

from conftest import TINY_RESNET
from test_axes import random_tensor_map
from timm_gpd import UnsupportedModelError, expand, plan_expansion
from timm_gpd.axes import AxisMap, Segment, TensorMap
from timm_gpd.coverage import create
from timm_gpd.expansion import images
from timm_gpd.expansion.verify import agreement, randomize_, reference_model, relative_error
from timm_gpd.teacher import DynamicTeacher, StudentView, nested
from timm_gpd.teacher.dynamic_teacher import SCALES


@pytest.mark.parametrize('seed', range(60))
def test_first_replicas_are_what_the_narrower_map_makes(seed):
    tensor_map = random_tensor_map(random.Random(seed))
    student = torch.arange(torch.Size(tensor_map.shape).numel()).view(tensor_map.shape)
    wide = tensor_map.replicate(student)
    for ratio in (1, 2, 3, 4):
        try:
            narrower = tensor_map.at_ratio(ratio)
        except UnsupportedModelError as error:
            assert 'holds several' in str(error)
            assert any(len(axis_map) > 1 for axis, axis_map in tensor_map.axes if axis == tensor_map.sum_axis)
            continue
        assert torch.equal(tensor_map.first_replicas(wide, ratio), narrower.replicate(student))
        assert narrower.divisor == min(tensor_map.divisor, ratio)


def test_first_replicas_of_flattened_axes_are_told_apart():
    """Rows of outputs, each of inputs: entries of a student's tensor cannot tell replicas, so count them."""
    outputs, inputs, area = 3, 2, 4
    tensor_map = TensorMap(
        (5, outputs * inputs * area),
        (
            (1, AxisMap.uniform(outputs * inputs * area, 4, inputs * area)),
            (1, AxisMap.uniform(outputs * 4 * inputs * area, 4, area)),
        ),
        sum_axis=1,
    )
    wide = torch.randn(tensor_map.teacher_shape)
    part = wide.view(5, outputs, 4, inputs, 4, area)[:, :, :3, :, :3]
    assert torch.equal(tensor_map.first_replicas(wide, 3), part.flatten(1))
    assert tensor_map.at_ratio(3).teacher_shape == (5, outputs * 3 * inputs * 3 * area)


def test_segments_that_stay_narrow_stay():
    axis_map = AxisMap((Segment(4, 4, 2), Segment(3, 1), Segment(2, 4)))
    assert axis_map.at_ratio(3) == AxisMap((Segment(4, 3, 2), Segment(3, 1), Segment(2, 3)))
    wide = torch.arange(axis_map.teacher_size)
    kept = [*range(6), *range(8, 14), 16, 17, 18, 19, 20, 21, 23, 24, 25]
    assert axis_map.first_replicas(wide, 0, 3).tolist() == kept


# Convolutions: plain, grouped, depthwise, weight-standardised; attention of several kinds; both.
STUDENTS = {
    'test_resnet': {},
    'regnetx_002': {'num_classes': 3},
    'test_efficientnet': {},
    'test_convnext': {},
    'test_nfnet': {},
    'test_vit': {'img_size': 64},
    'test_vit_relpos': {'img_size': 64},
    'swin_tiny_patch4_window7_224': {'num_classes': 3, 'depths': (1, 1), 'num_heads': (3, 6), 'embed_dim': 24},
    'vit_tiny_r_s16_p8_224': {'num_classes': 3, 'depth': 1},
    'test_coatnet': {},
    'test_mambaout': {},
    'efficientvit_m0': {'img_size': 96},
}


@pytest.mark.parametrize('name', [*STUDENTS, 'efficientnet_cc_b0_4e'])
def test_narrower_plans_are_what_the_planner_finds(name):
    """At every ratio: axes, blocks, divisors, attributes, divided inputs."""
    with torch.device('meta'):
        student = create(name, **STUDENTS.get(name, {}))
    plan = plan_expansion(student, 4)
    for ratio in (2, 3, 4):
        assert plan.at_ratio(ratio) == plan_expansion(student, ratio), ratio
    assert not plan.at_ratio(1).tensors and not plan.at_ratio(1).attributes


def unchecked(student, ratio, monkeypatch, **kwargs):
    """A dynamic teacher, and its ratios between, without the checks of a plan, which take time."""
    monkeypatch.setattr(nested, 'verify_plan', lambda student, plan: 0.0)
    return DynamicTeacher(student, plan_expansion(student, ratio), noise=0.0, **kwargs)


@pytest.mark.parametrize('name', STUDENTS)
def test_every_ratio_is_the_student_at_the_start(name, monkeypatch):
    monkeypatch.setattr(images, 'SMALL_IMAGES', (32, *images.SMALL_IMAGES))
    student = create(name, **STUDENTS[name])
    ratio, scale = (3, 'teacher') if len(name) % 2 else (4, 'student')
    kinds = ('kxk', '1x1_kxk', 'dw_pw') if 'resn' in name else ('kxk',)
    reference, x = reference_model(student, plan_expansion(student, ratio))
    teacher = unchecked(reference, ratio, monkeypatch, scale=scale, branches=kinds)
    for mode in (False, True):
        reference.train(mode), teacher.train(mode)
        for k in range(2, ratio):
            assert agreement(teacher.at_ratio(k), reference, x).is_exact, (mode, k)


def trained_teacher(monkeypatch, scale='student', kinds=('kxk',), ratio=3):
    """A dynamic teacher whose replicas differ in every tensor, as do gammas and statistics."""
    student = timm.create_model('test_resnet', **TINY_RESNET)
    student.pretrained_cfg.update(input_size=(1, 32, 32))
    return randomize_(unchecked(student.double(), ratio, monkeypatch, scale=scale, branches=kinds).train())


BRANCHES = ('kxk', 'avg', '1x1_kxk', 'dw_pw')
SCALES_AND_KINDS = pytest.mark.parametrize(
    'scale, kinds',
    [(scale, kinds) for scale in SCALES for kinds in (('kxk',), BRANCHES) if scale != 'balanced' or len(kinds) == 1],
)


@SCALES_AND_KINDS
def test_a_ratio_between_is_made_of_the_first_replicas(scale, kinds, monkeypatch):
    """Merged, then sliced; divided by k where the dynamic teacher's is divided by r. The rest gets no gradient."""
    teacher = trained_teacher(monkeypatch, scale, kinds)
    view = teacher.at_ratio(2)
    tensors, whole = view.computed_parameters(torch.contiguous_format), teacher.teacher_parameters()
    both = view.parameters_of_both(torch.contiguous_format)
    student = teacher.student_parameters()
    for name, tensor in tensors.items():
        expected = whole[name]
        tensor_map = teacher.plan.tensors.get(name, TensorMap(tuple(tensor.shape), ()))
        for axis, axis_map in tensor_map.axes:
            expected = expected.index_select(axis, (axis_map.replica_index() < 2).nonzero().flatten())
        expected = expected * 3 / 2 if tensor_map.divisor == 3 else expected
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both[0][name], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both[1][name], student[name], rtol=1e-12, atol=1e-12)
    sum((tensor**3).sum() for pair in both for tensor in pair.values()).backward()
    assert all(parameter.grad is not None for parameter in teacher.parameters()), 'DDP waits for every gradient'
    kernel = teacher.wide.conv1[0].weight
    if kinds == ('kxk',):
        assert kernel.grad[kernel.grad.flatten(1).any(1)].shape[0] == kernel.shape[0] * 2 // 3


@SCALES_AND_KINDS
@pytest.mark.parametrize('k', [1, 2, 3])
def test_gradients_are_those_of_finite_differences(scale, kinds, k, monkeypatch):
    teacher = trained_teacher(monkeypatch, scale, kinds)
    x = torch.randn(4, 1, 32, 32, dtype=torch.float64)
    parameters = list(teacher.parameters())
    weights = torch.randn(4, 10, dtype=torch.float64)

    def loss():
        return (teacher.at_ratio(k)(x) * weights).sum()

    gradients = torch.autograd.grad(loss(), parameters)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    ends = []
    with torch.no_grad():
        for step in (1e-7, -2e-7):
            for parameter, direction in zip(parameters, directions):
                parameter += step * direction
            ends.append(loss())
    slope = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions))
    assert ((ends[0] - ends[1]) / 2e-7 / slope).item() == pytest.approx(1, abs=1e-5)


def test_a_ratio_between_leaves_no_trace(monkeypatch):
    teacher = trained_teacher(monkeypatch)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    view = teacher.at_ratio(2)
    x = torch.randn(4, 1, 32, 32, dtype=torch.float64)
    first, second = view(x), view(x)
    assert torch.equal(first, second)
    after = teacher.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not torch.equal(view.eval()(x), first), 'running statistics, not the batch'
    assert not teacher.wide.training and teacher.student.training
    teacher(x), teacher.train()(x)
    assert not torch.equal(teacher.state_dict()['wide.bn1.running_mean'], before['wide.bn1.running_mean'])


@pytest.mark.parametrize('k, inside', [(1, 'student'), (2, 'wide')])
def test_a_view_has_the_mode_of_the_model_that_it_runs(k, inside, monkeypatch):
    """Whichever of the two is set, and when."""
    teacher = trained_teacher(monkeypatch)
    view, model = teacher.at_ratio(k), getattr(teacher, inside)
    x = torch.randn(4, 1, 32, 32, dtype=torch.float64)
    for set_mode in (teacher.eval, teacher.train, view.eval, view.train, lambda: teacher.train(False)):
        set_mode()
        assert view.training is model.training is model.bn1.training is teacher.at_ratio(k).training
        alone = torch.allclose(view(x)[:2], view(x[:2]), rtol=1e-9)
        assert alone is not view.training, 'a batch is normalised by itself in training mode only'
    copied = copy.deepcopy(view)
    copied.train()
    assert copied.training and not view.training


def test_gradient_checkpointing_recomputes_the_ratio_that_ran(monkeypatch):
    teacher = trained_teacher(monkeypatch)
    x = torch.randn(4, 1, 32, 32, dtype=torch.float64)
    gradients = []
    for recompute in (False, True):
        teacher.set_grad_checkpointing(recompute)
        loss = teacher.at_ratio(2)(x).square().sum() + teacher(x).sum()
        gradients.append(torch.autograd.grad(loss, list(teacher.parameters())))
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain, rtol=1e-9, atol=1e-9)


def test_with_noise_the_ends_alone_are_exact(tiny_student):
    student = randomize_(tiny_student.double()).eval()
    teacher = expand(student, 3, noise=0.5)
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    errors = [relative_error(teacher.at_ratio(k)(x), student(x)) for k in (1, 2, 3)]
    assert errors[0] <= 1e-12 and errors[2] <= 1e-12 and errors[1] > 1e-3


def test_the_ends_are_the_models_that_are_there(tiny_student, monkeypatch):
    teacher = unchecked(tiny_student, 3, monkeypatch)
    assert teacher.at_ratio(3) is teacher
    assert isinstance(teacher.at_ratio(1), StudentView)
    for ratio in (0, 4, True, 1.5):
        with pytest.raises(ValueError, match='must be one of 1 to 3, but is'):
            teacher.at_ratio(ratio)


def test_a_ratio_between_follows_a_new_classifier_and_copies(tiny_student, monkeypatch):
    teacher = unchecked(tiny_student, 3, monkeypatch)
    x = torch.randn(2, 1, 32, 32)
    assert teacher.at_ratio(2)(x).shape == (2, 10)
    teacher.reset_classifier(4)
    copied = copy.deepcopy(teacher)
    assert teacher.at_ratio(2)(x).shape == (2, 4) and torch.equal(copied.at_ratio(2)(x), teacher.at_ratio(2)(x))


class Stepped(nn.Module):
    """Its width counts in the ratio in a way that no plan says: wrong at ratio 2, right at 1 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x):
        x = self.stem(x)
        return self.fc(x.mean((2, 3)) * (2 if x.shape[1] == 8 else 1))


def test_a_ratio_between_that_is_not_exact_is_refused():
    teacher = expand(Stepped(), 3)
    with pytest.raises(UnsupportedModelError, match='differs from the student'):
        teacher.at_ratio(2)


def test_a_new_classifier_leaves_ratios_between_exact(tiny_student):
    teacher = expand(tiny_student.double(), 3, noise=0.0).eval()
    teacher.reset_classifier(7)
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    expected = teacher.eval().forward_student(x)
    for k in (2, 3):
        assert relative_error(teacher.at_ratio(k)(x), expected) <= 1e-12
