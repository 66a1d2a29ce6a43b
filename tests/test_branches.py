"""Branches: what they merge into, where they stand, that they learn, and that nothing of them is left in a student."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

from conftest import TINY_RESNET
from timm_gpd import expand
from timm_gpd.axes import AxisMap, TensorMap
from timm_gpd.expansion.verify import randomize_, relative_error
from timm_gpd.teacher import merge
from timm_gpd.teacher.branches import BRANCH_KINDS, BranchedKernel, branch_kinds, cosine_prior

CONVOLUTIONS = {
    'plain': dict(inputs=6, outputs=8, size=3, groups=1, stride=1, dilation=1),
    'strided': dict(inputs=3, outputs=5, size=7, groups=1, stride=2, dilation=1),
    'dilated': dict(inputs=4, outputs=4, size=3, groups=1, stride=1, dilation=2),
    'grouped': dict(inputs=6, outputs=9, size=3, groups=3, stride=2, dilation=1),
    'depthwise': dict(inputs=6, outputs=6, size=5, groups=6, stride=1, dilation=1),
    'depthwise x2': dict(inputs=4, outputs=8, size=3, groups=4, stride=1, dilation=1),
}


def branched_kernel(inputs, outputs, size, groups, kinds=BRANCH_KINDS, **_):
    kernel = torch.randn(outputs, inputs // groups, size, size, dtype=torch.float64)
    branched = BranchedKernel(kernel, groups, kinds, cosine_prior(outputs, size))
    for parameter in branched.parameters():
        nn.init.normal_(parameter)
    return branched


def run_branch(kind, branched, x, inputs, outputs, size, groups, stride, dilation):
    """The branch's output as the layers that it stands for, without padding, before its gamma."""
    large = dict(stride=stride, dilation=dilation)

    def four_dimensional(kernel_OKI):
        return kernel_OKI.transpose(1, 2).unflatten(2, (size, size))

    if kind == 'kxk':
        return F.conv2d(x, four_dimensional(branched.kernel), groups=groups, **large)
    if kind == '1x1_kxk':
        mix = branched.mix + torch.eye(inputs // groups, dtype=x.dtype)
        mixed = F.conv2d(x, mix.transpose(1, 2).reshape(inputs, -1, 1, 1), groups=groups)
        return F.conv2d(mixed, four_dimensional(branched.mixed_kernel), groups=groups, **large)
    if kind == 'dw_pw':  # stored with inputs last
        dw = branched.dw.unflatten(0, (groups, 8)).permute(0, 3, 1, 2)
        spread = F.conv2d(x, dw.reshape(inputs * 8, 1, size, size), groups=inputs, **large)
        return F.conv2d(spread, branched.pw.transpose(1, 2).reshape(outputs, -1, 1, 1), groups=groups)
    pointwise = F.conv2d(x, branched.pointwise[:, branched.patterned.index(kind), :, None, None], groups=groups)
    pattern = {
        'avg': torch.full((outputs, size, size), 1 / size**2, dtype=x.dtype),
        'freq': cosine_prior(outputs, size),
        '1x1': F.pad(torch.ones(outputs, 1, 1, dtype=x.dtype), [size // 2] * 4),
    }[kind]
    return F.conv2d(pointwise, pattern.unsqueeze(1), groups=outputs, **large)


@pytest.mark.parametrize('convolution', CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_the_merged_kernel_is_the_sum_of_the_branches_as_layers(convolution):
    branched = branched_kernel(**convolution)
    x = torch.randn(2, convolution['inputs'], 15, 15, dtype=torch.float64)
    conv = {key: convolution[key] for key in ('stride', 'dilation', 'groups')}
    expected = sum(
        branched.gamma[j].view(-1, 1, 1) * run_branch(kind, branched, x, **convolution)
        for j, kind in enumerate(BRANCH_KINDS)
    )
    torch.testing.assert_close(F.conv2d(x, branched()[0], **conv), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('kinds', [BRANCH_KINDS, *[('kxk', kind) for kind in BRANCH_KINDS[1:]]], ids='+'.join)
def test_gradients_of_the_merge(kinds):
    branched = branched_kernel(inputs=4, outputs=4, size=3, groups=2, kinds=kinds)
    names = [name for name, _ in branched.named_parameters()]

    def merge(*parameters):
        return torch.func.functional_call(branched, dict(zip(names, parameters)), ())[0]

    assert torch.autograd.gradcheck(merge, tuple(branched.parameters()))


# From 6 x 2 to 12 x 4 channels.
TENSOR_MAP = TensorMap((6, 2, 3, 3), ((0, AxisMap.uniform(6, 2)), (1, AxisMap.uniform(2, 2))), sum_axis=1)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_order_in_memory_does_not_show(memory_format, monkeypatch):
    """Kernels and gradients are those of one tile, whatever order they are in and in however many tiles."""
    results = []
    for tile in (merge._TILE, 5 * 8 * 4 * 9, 3 * 4 * 9):  # all at once; dw's sums of 5 of 12; rows 2 of 12
        monkeypatch.setattr(merge, '_TILE', tile)
        torch.manual_seed(0)
        branched = branched_kernel(inputs=4, outputs=12, size=3, groups=1)
        other = {} if not results else dict(memory_format=memory_format)
        merged = branched(0.5, TENSOR_MAP, **other)
        assert all(tensor.is_contiguous(**other) for tensor in merged)
        loss = sum((tensor * torch.randn(tensor.shape)).sum() for tensor in merged)
        results.append([*merged, *torch.autograd.grad(loss, list(branched.parameters()))])
    assert len(merge._row_tiles(branched.kernel, branched.dw[None])) == 6
    for other in results[1:]:
        for one, many in zip(results[0], other):
            torch.testing.assert_close(many, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('used', [(True, False), (False, True), (True, True)], ids=str)
def test_gradients_of_teacher_and_student_meet_in_the_merge(used):
    """They are those of slicing what is merged, whichever of the two models has a loss."""
    branched = branched_kernel(inputs=4, outputs=12, size=3, groups=1)
    inputs = list(branched.parameters())
    weights = [torch.randn(shape) * factor for shape, factor in zip([(12, 4, 3, 3), (6, 2, 3, 3)], used)]

    def gradients(teacher, student):
        losses = [(tensor * weight).sum() for tensor, weight, use in zip((teacher, student), weights, used) if use]
        return torch.autograd.grad(sum(losses), inputs)

    merged = branched(0.5)[0]
    expected = gradients(merged, TENSOR_MAP.first_replica(merged) * TENSOR_MAP.divisor)
    for gradient, reference in zip(gradients(*branched(0.5, TENSOR_MAP)), expected):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


def test_the_multiplier_multiplies_what_is_merged():
    branched = branched_kernel(**CONVOLUTIONS['grouped'])
    torch.testing.assert_close(branched(0.25)[0], 0.25 * branched()[0], rtol=1e-12, atol=1e-12)


def test_mixed_precision():
    """In bfloat16 only products of large matrices are computed; gradients are those of full precision within that."""
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        branched = branched_kernel(inputs=8, outputs=16, size=3, groups=1).float()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            merged, _ = branched()
        assert merged.dtype == torch.float32
        gradients.append(torch.autograd.grad((merged * torch.randn_like(merged)).sum(), list(branched.parameters())))
    for full, mixed in zip(*gradients):
        assert relative_error(mixed, full) <= 0.02


def test_the_number_takes_the_first_kinds():
    assert branch_kinds(1) == ('kxk',)
    assert branch_kinds(3) == ('kxk', 'avg', 'freq')
    assert branch_kinds(6) == BRANCH_KINDS
    assert branch_kinds(1, ['kxk', 'dw_pw']) == branch_kinds(2, ['kxk', 'dw_pw']) == ('kxk', 'dw_pw')


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(num_branches=7), 'num_branches must be a positive integer of at most 6'),
        (dict(num_branches=True), 'num_branches must be'),
        (dict(branches=('avg', 'kxk')), 'branches must be kxk followed by'),
        (dict(branches=('kxk', 'kxk')), 'branches must be kxk followed by'),
        (dict(branches=('kxk', '3x3')), 'branches must be kxk followed by'),
        (dict(branches='avg'), 'branches must be kxk followed by'),
        (dict(num_branches=3, branches=('kxk', 'avg')), 'num_branches is 3 and branches names 2'),
    ],
)
def test_bad_arguments(tiny_student, kwargs, message):
    with pytest.raises(ValueError, match=message):
        expand(tiny_student, **kwargs)


class ConvolutionZoo(nn.Module):
    """One convolution of every sort, followed by what a classifier needs."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 8, 7, stride=2, padding=3)
        self.dilated = nn.Conv2d(8, 8, 3, dilation=2, padding=2)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, groups=8, padding=2)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.even = nn.Conv2d(8, 8, 2)
        self.oblong = nn.Conv2d(8, 8, (1, 3))
        self.frozen = nn.Conv2d(8, 8, 3).requires_grad_(False)
        self.fc = nn.Linear(8, 5)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x):
        for conv in list(self.children())[:-1]:
            x = F.silu(conv(x))
        return self.fc(x.mean((2, 3)))


def test_every_square_odd_kernel_has_branches():
    teacher = expand(ConvolutionZoo(), num_branches=6)
    assert {name for name, _ in teacher.branches.named_children()} == {'strided', 'dilated', 'grouped', 'depthwise'}
    assert [name for name, _ in expand(ConvolutionZoo()).branches.named_parameters()] == []


MODELS = {
    'zoo': ConvolutionZoo,
    'resnet': lambda: timm.create_model('test_resnet', num_classes=7),
    'dilated resnet': lambda: timm.create_model('test_resnet', num_classes=7, output_stride=8),
    'efficientnet': lambda: timm.create_model('test_efficientnet', num_classes=7),
    'mobilenetv1_100': lambda: timm.create_model('mobilenetv1_100', num_classes=7),
    'vit': lambda: timm.create_model('test_vit', num_classes=7, img_size=64),
}


@pytest.mark.parametrize('scale', ['student', 'teacher'])
@pytest.mark.parametrize('name', MODELS)
def test_starts_exact(name, scale):
    student = randomize_(MODELS[name]())
    teacher = expand(student, ratio=2, num_branches=6, scale=scale).double().eval()
    student = student.double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = student(x)
        student_logits, teacher_logits = teacher.joint(x)
    assert relative_error(teacher_logits, expected) <= 1e-12
    assert relative_error(student_logits, expected) <= 1e-12


def train(teacher, steps, **sgd):
    optimizer = torch.optim.SGD(teacher.parameters(), **sgd)
    generator = torch.Generator().manual_seed(1)
    weight = next(iter(teacher.teacher_parameters().values()))
    for _ in range(steps):
        x = torch.randn(8, weight.shape[1], 64, 64, generator=generator).to(weight)
        target = torch.randint(10, (8,), generator=generator)
        student_logits, teacher_logits = teacher.joint(x)
        optimizer.zero_grad()
        (F.cross_entropy(student_logits, target) + F.cross_entropy(teacher_logits, target)).backward()
        optimizer.step()


@pytest.mark.parametrize(
    'make',
    [
        lambda: timm.create_model('test_resnet', zero_init_last=False, **TINY_RESNET),
        lambda: timm.create_model('test_efficientnet', num_classes=10),
    ],
    ids=['resnet', 'efficientnet'],
)
def test_no_branch_is_dead_after_ten_steps(make):
    teacher = expand(make(), num_branches=6).double().train()  # the smallest steps vanish in float32
    before = copy.deepcopy(teacher.branches.state_dict())
    train(teacher, 10, lr=0.05)
    buffers = {name for name, _ in teacher.branches.named_buffers()}
    for name, tensor in teacher.branches.state_dict().items():
        if name in buffers:
            assert tensor.equal(before[name]), f'{name} is fixed'
            continue
        rows = (tensor - before[name]).flatten(1).abs().sum(1)
        if name.endswith('.gamma'):
            assert (rows > 0).all(), f'{name}: a branch stayed at its gamma'
        else:  # OREPA's cosine vanishes for one channel in 2 k
            assert (rows > 0).float().mean() > (0.7 if name.endswith('.freq') else 0.99), f'{name} did not learn'


@pytest.mark.parametrize('scale', ['student', 'teacher'])
def test_the_extracted_student_is_plain_and_the_one_that_trained(tiny_student, scale):
    teacher = expand(tiny_student, num_branches=6, scale=scale).train()
    train(teacher, 5, lr=0.02, momentum=0.9, weight_decay=1e-4)
    extracted = teacher.eval().extract_student()
    assert list(extracted.state_dict()) == list(tiny_student.state_dict())
    x = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        assert relative_error(extracted(x), teacher.joint(x)[0]) <= 1e-5
        assert relative_error(extracted(x), teacher(x)) > 1e-3, 'the teacher has not become more than its student'


def test_merge_then_slice(tiny_student):
    """The student's kernel is a slice of the kernel that the teacher runs on."""
    teacher = expand(tiny_student, num_branches=6).double()
    for parameter in teacher.branches.parameters():
        nn.init.normal_(parameter)
    wide, narrow = teacher.teacher_parameters(), teacher.student_parameters()
    name = 'layer2.0.conv2.weight'
    torch.testing.assert_close(narrow[name], 2 * wide[name][::2, ::2], rtol=1e-12, atol=1e-12)


def test_loading_a_student_starts_again(tiny_student):
    teacher = expand(tiny_student, num_branches=6).train()
    train(teacher, 3, lr=0.05)
    other = randomize_(copy.deepcopy(tiny_student), seed=3)
    teacher.load_student(other.state_dict())
    x = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        for logits in teacher.eval().joint(x):
            assert relative_error(logits, other.eval()(x)) <= 1e-5


def test_weight_decay_follows_orepa(tiny_student):
    """All that branches learn decays, gammas included; priors and the identity are no parameters."""
    teacher = expand(tiny_student, num_branches=6)
    no_decay, decay = param_groups_weight_decay(teacher, weight_decay=0.1)
    assert no_decay['weight_decay'] == 0
    decayed = {id(parameter) for parameter in decay['params']}
    assert all(id(parameter) in decayed for parameter in teacher.branches.parameters())
    assert {name.rpartition('.')[2] for name, _ in teacher.branches.named_buffers()} == {'patterns', 'identity'}


def test_channels_of_the_student_keep_their_own_frequencies(tiny_student):
    branched = expand(tiny_student, num_branches=6).branches.get_submodule('layer3.0.conv2')
    freq = branched.patterned.index('freq')
    torch.testing.assert_close(
        branched.patterns[::2, :, freq], cosine_prior(32, 3).flatten(1).float(), rtol=1e-6, atol=1e-6
    )


def test_branches_tell_replicas_apart(tiny_student):
    """Without noise, replicas of a plain teacher receive equal gradients for ever; with branches they do not."""
    unequal = {}
    for branches in (1, 6):
        teacher = expand(tiny_student, num_branches=branches).double().train()
        train(teacher, 3, lr=0.05)
        weight = teacher.teacher_parameters()['layer3.0.conv2.weight'].detach()
        replicas = weight.unflatten(0, (-1, 2)).unflatten(2, (-1, 2))[:, 1]  # output replica 1, both input replicas
        unequal[branches] = relative_error(replicas[:, :, 0], replicas[:, :, 1])
    assert unequal[1] <= 1e-10 and unequal[6] > 1e-7, unequal


@pytest.mark.parametrize('size', [3, 5, 7])
def test_a_frequency_without_a_pattern_is_exactly_0(size):
    """Patterns of 1e-16 would make denormal gradients."""
    prior = cosine_prior(64, size)
    assert (prior[prior.abs() < 1e-3] == 0).all()
    assert (prior[size - 1] == 0).all() and (prior[32 + size - 1] == 0).all()


def test_channels_last_reorders_no_branch():
    """A memory format is for images and kernels: a branch in it would have its inputs apart in memory."""
    branched = branched_kernel(inputs=8, outputs=16, size=3, groups=2)
    assert all(tensor.is_contiguous() for tensor in branched.to(memory_format=torch.channels_last).parameters())
