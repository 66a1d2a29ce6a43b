"""Expansion is exact, and extraction gives the student back."""

import copy
import pickle
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import StdConv2d

from exactness import expansion_errors
from timm_gpd import Rule, UnsupportedModelError, expand, plan_expansion, register_rule
from timm_gpd.axes import AxisMap
from timm_gpd.errors import NoClassifierError
from timm_gpd.expansion import images, planner, verify
from timm_gpd.expansion.images import accepted_input_shape
from timm_gpd.expansion.verify import relative_error, verify_plan

pytestmark = pytest.mark.usefixtures('memory_is_kept')

# Architecture, image size in pixels, further arguments.
MODELS = [
    ('resnet18', 64, {}),
    ('resnet34', 64, {}),
    ('resnet50', 64, {}),
    ('mobilenetv1_100', 64, {}),
    ('mobilenetv3_small_100', 64, {}),
    ('efficientnet_b0', 64, {}),
    ('convnext_atto', 64, {}),
    ('densenet121', 64, {}),
    ('vit_tiny_patch16_224', 32, {'img_size': 32}),
    ('deit_tiny_patch16_224', 48, {'img_size': 48}),
    ('swin_tiny_patch4_window7_224', 56, {'img_size': 56}),
]


# The others are slow at larger ratios: a ResNet-50 four times as wide has 400 million parameters.
SMALL_MODELS = ('mobilenetv3_small_100', 'convnext_atto', 'deit_tiny_patch16_224')


@pytest.mark.parametrize(
    'name, size, kwargs, ratio',
    [
        pytest.param(*model, ratio, id=f'{model[0]}-{ratio}')
        for model in MODELS
        for ratio in (1, 2, 3, 4)
        if ratio == 2 or model[0] in SMALL_MODELS
    ],
)
def test_expansion_is_exact(name, size, kwargs, ratio):
    student = timm.create_model(name, num_classes=10, **kwargs)
    errors = expansion_errors(student, plan_expansion(student, ratio), torch.randn(3, 3, size, size))
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize(
    'name, kwargs, size',
    [
        ('resnet18', {'in_chans': 1, 'num_classes': 5}, (40, 56)),
        ('resnet18', {'in_chans': 8, 'num_classes': 2, 'global_pool': 'max'}, (33, 64)),
        ('efficientnet_b0', {'in_chans': 4, 'num_classes': 3, 'drop_path_rate': 0.2}, (64, 48)),
        (
            'vit_tiny_patch16_224',
            {'in_chans': 2, 'num_classes': 4, 'img_size': (32, 64), 'global_pool': 'avg'},
            (32, 64),
        ),
        (
            'vit_tiny_patch16_224',
            {'num_classes': 4, 'dynamic_img_size': True, 'qk_norm': True, 'init_values': 1e-6},
            (48, 48),
        ),
        ('swin_tiny_patch4_window7_224', {'num_classes': 4, 'img_size': (64, 32), 'window_size': 4}, (64, 32)),
        # These keep no record of img_size and accept no square.
        ('levit_128s', {'num_classes': 4, 'img_size': (64, 128), 'depth': (1, 1, 1)}, (64, 128)),
        ('hiera_tiny_224', {'num_classes': 4, 'img_size': (64, 96)}, (64, 96)),
    ],
)
def test_any_input_and_classes(name, kwargs, size):
    student = timm.create_model(name, **kwargs)
    x = torch.randn(3, kwargs.get('in_chans', 3), *size)
    errors = expansion_errors(student, plan_expansion(student), x)
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize('scale', ('student', 'teacher', 'balanced'))
@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('resnet18', {}),
        ('mobilenetv3_small_100', {}),
        ('convnext_atto', {}),
        ('vit_tiny_patch16_224', {'img_size': 64}),
    ],
)
def test_float32(name, kwargs, scale):
    student = timm.create_model(name, num_classes=10, **kwargs).eval()
    teacher = expand(student, ratio=2, noise=0.3, scale=scale)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = student(x)
        student_logits, teacher_logits = teacher.joint(x)
        assert relative_error(teacher_logits, expected) <= 1e-5
        assert relative_error(student_logits, expected) <= 1e-5
        assert torch.equal(teacher(x), teacher_logits)
        extracted = teacher.extract_student()
        assert type(extracted) is type(student)
        assert relative_error(extracted(x), expected) <= 1e-5
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(extracted.state_dict()[name], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize('name', ('test_vit', 'test_nfnet', 'edgenext_xx_small'))
def test_the_student_given_is_not_modified(name):
    """Neither its tensors nor its modules' attributes, among them head counts, sizes, classes and hooks."""

    def attributes(model):
        return {
            name: {
                'class': type(module),
                **{
                    key: copy.deepcopy(value)
                    for key, value in vars(module).items()
                    if key not in ('_parameters', '_buffers', '_modules') and not isinstance(value, nn.Module)
                },
            }
            for name, module in model.named_modules()
        }

    student = timm.create_model(name, num_classes=5)
    tensors, before = copy.deepcopy(student.state_dict()), attributes(student)
    identities = {name: id(tensor) for name, tensor in student.named_parameters()}
    teacher = expand(student, ratio=3, noise=0.1)
    assert teacher.plan.attributes  # there was something to change
    after = attributes(student)
    for module, values in before.items():
        changed = {key for key in values.keys() | after[module].keys() if repr(values[key]) != repr(after[module][key])}
        assert not changed, (module, changed)
    assert student.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in student.state_dict().items())
    assert {name: id(tensor) for name, tensor in student.named_parameters()} == identities


def test_planning_leaves_the_random_state_alone(tiny_student):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    expand(tiny_student)
    assert torch.equal(torch.rand(3), expected)


def test_a_plan_is_readable_data(tiny_student):
    plan = plan_expansion(tiny_student, 2)
    text = str(plan)
    assert 'conv1.0.weight' in text and '(4, 1, 3, 3) -> (8, 1, 3, 3)' in text and 'divided by 2' in text
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_wrong_shape_is_told_by_name(tiny_student):
    plan = plan_expansion(tiny_student)
    with pytest.raises(ValueError, match='fc.weight has shape'):
        plan.expand({'fc.weight': torch.zeros(3, 3)})


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({'ratio': 0}, 'ratio must be a positive integer'),
        ({'ratio': 1.5}, 'ratio must be a positive integer'),
        ({'ratio': True}, 'ratio must be a positive integer'),
        ({'num_branches': 0}, 'num_branches must be a positive integer'),
        ({'noise': -1.0}, 'noise must be'),
        ({'scale': 'both'}, 'scale must be one of student, teacher'),
    ],
)
def test_bad_arguments(tiny_student, kwargs, message):
    with pytest.raises(ValueError, match=message):
        expand(tiny_student, **kwargs)


def test_no_classifier():
    student = timm.create_model('test_resnet', num_classes=0)
    for make in (plan_expansion, expand):
        with pytest.raises(NoClassifierError, match='^ResNet has no classifier: create it with num_classes > 0'):
            make(student)
    assert issubclass(NoClassifierError, UnsupportedModelError)


def test_a_module_that_stops_the_plan_is_no_missing_classifier(monkeypatch):
    """Whatever the message says."""

    def forward(self, x):
        raise ValueError('this has no classifier')

    monkeypatch.setattr(ReversingNet, 'forward', forward)
    with pytest.raises(UnsupportedModelError, match='this has no classifier') as raised:
        plan_expansion(ReversingNet())
    assert not isinstance(raised.value, NoClassifierError)


@pytest.mark.parametrize(
    'name, kwargs, shape',
    [
        ('test_resnet', {'in_chans': 5}, (5, 160, 160)),  # its own record
        ('vit_tiny_patch16_224', {'img_size': (32, 64)}, (3, 32, 64)),
        ('levit_128s', {'img_size': (64, 128), 'depth': (1, 1, 1)}, (3, 64, 128)),  # no record: searched
    ],
)
def test_the_plan_says_what_images_the_student_accepts(name, kwargs, shape, monkeypatch):
    searched = []

    def search(model):
        searched.append(model)
        return accepted_input_shape(model)

    for module in (planner, images):
        monkeypatch.setattr(module, 'accepted_input_shape', search)
    student = timm.create_model(name, num_classes=4, **kwargs)
    plan = plan_expansion(student)
    assert plan.input_shape == shape
    assert f'input_shape={shape}' in str(plan)
    with torch.no_grad():
        assert student.eval()(torch.randn(1, *shape)).shape == (1, 4)
    assert verify_plan(student, plan) <= 1e-12
    assert len(searched) == (name == 'levit_128s')  # once for both
    by_hand = replace(plan, input_shape=None)
    assert verify_plan(student, by_hand) <= 1e-12


class ChannelReverse(nn.Module):
    """Reverses channels by an index of its own: right at student width, silently wrong at twice the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return torch.cat([x[:, : self.channels].flip(1), x[:, self.channels :]], 1)


class ReversingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.reverse = ChannelReverse(8)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)
        self.num_classes, self.in_chans = 5, 3

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(self.conv2(self.reverse(self.conv(x))).mean((2, 3)))


def test_a_silent_error_is_refused_and_a_rule_mends_it():
    student = ReversingNet()
    with pytest.raises(UnsupportedModelError, match='differs from the student'):
        expand(student)
    register_rule(ChannelReverse, Rule(multiply=('channels',)))
    teacher = expand(student)
    x = torch.randn(2, 3, 16, 16)
    assert relative_error(teacher(x), student(x)) < 1e-5


class ThirdsNet(ReversingNet):
    def __init__(self) -> None:
        super().__init__()
        self.reverse = nn.Identity()

    def forward(self, x):
        a, b = self.conv(x).split([3, 5], 1)
        return self.fc(self.conv2(torch.cat([b, a], 1)).mean((2, 3)))


def test_the_module_that_stops_the_plan_is_named():
    with pytest.raises(UnsupportedModelError, match=r"module '\(root\)' of class .*ThirdsNet: .*split"):
        expand(ThirdsNet())


@pytest.mark.parametrize(
    'function, message',
    [
        (lambda x, weight: F.bilinear(x, x, weight.expand(8, 8, 8)), 'reverse.weight is repeated|summed over 2 axes'),
        (lambda x, weight: torch.cdist(x, weight) @ weight, 'cdist'),
        (lambda x, weight: torch.einsum('bi,ii->bi', x, weight), 'a diagonal of reverse.weight is multiplied'),
        (lambda x, weight: x @ (weight @ weight), 'sums over an axis that is computed from reverse.weight'),
    ],
    ids=('bilinear', 'cdist', 'diagonal', 'product of parameters'),
)
def test_a_function_that_is_not_known_is_refused_where_a_parameter_meets_something_wider(function, message):
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return function(x.mean((2, 3)), self.weight)[..., None, None]

    student = ReversingNet()
    student.reverse, student.conv2 = Product(), nn.Conv2d(8, 8, 1)
    with pytest.raises(UnsupportedModelError, match=rf"module 'reverse' of class .*Product.*({message})"):
        expand(student)
    assert plan_expansion(student, ratio=1).ratio == 1  # nothing is wider, so nothing is refused


@pytest.mark.parametrize('channels', (1, 2, 3, 4))
def test_channels_of_images_are_found_where_a_student_does_not_say_them(channels):
    student = ReversingNet()
    del student.in_chans
    student.conv, student.reverse = nn.Conv2d(channels, 8, 3), nn.Identity()
    teacher = expand(student)
    assert teacher.plan.input_shape == (channels, 224, 224)
    x = torch.randn(2, channels, 16, 16)
    assert relative_error(teacher(x), student(x)) < 1e-5


class SevenChannels(nn.Module):
    """A convolution that is no nn.Conv2d, of which channels could be read."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 7, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.kernel)


def test_a_student_that_runs_on_no_images_says_what_to_set():
    student = ReversingNet()
    del student.in_chans
    student.conv, student.reverse = SevenChannels(), nn.Identity()
    for make in (plan_expansion, expand):
        with pytest.raises(UnsupportedModelError, match='runs on no images that were tried.*in_chans') as raised:
            make(student)
        assert len(str(raised.value).splitlines()) == 1
    student.in_chans = 7
    assert expand(student).plan.input_shape == (7, 224, 224)


@pytest.mark.parametrize(
    'parametrize, remove',
    [
        (
            lambda module: nn.utils.parametrizations.weight_norm(module),
            lambda module: nn.utils.parametrize.remove_parametrizations(module, 'weight'),
        ),
        (
            lambda module: nn.utils.parametrizations.spectral_norm(module),
            lambda module: nn.utils.parametrize.remove_parametrizations(module, 'weight'),
        ),
        (lambda module: nn.utils.weight_norm(module), nn.utils.remove_weight_norm),
        (lambda module: nn.utils.spectral_norm(module), nn.utils.remove_spectral_norm),
    ],
    ids=('weight norm', 'spectral norm', 'old weight norm', 'old spectral norm'),
)
@pytest.mark.filterwarnings('ignore')
def test_a_parametrized_weight_is_refused_with_what_to_remove(parametrize, remove):
    student = ReversingNet()
    student.reverse = nn.Identity()
    parametrize(student.conv2)
    with pytest.raises(UnsupportedModelError, match="of module 'conv2'.*torch.nn.utils.*remove_.*module, 'weight'"):
        expand(student)
    remove(student.conv2)
    assert expand(student).plan.ratio == 2


def test_layers_may_be_called_by_keyword():
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.standardised = StdConv2d(8, 8, 1)
            self.instance, self.fc = nn.InstanceNorm2d(8, affine=True), nn.Linear(8, 8)

        def forward(self, images):
            x = self.instance(input=self.standardised(x=self.norm(input=self.conv(input=images))))
            return self.fc(input=x.movedim(1, -1)).movedim(-1, 1)

    class Net(ReversingNet):
        def forward(self, x):
            return self.fc(input=self.conv2(input=self.reverse(images=self.conv(input=x))).mean((2, 3)))

    student = Net()
    student.reverse = Keywords()
    errors = expansion_errors(student, plan_expansion(student), torch.randn(3, 3, 16, 16))
    assert max(errors.values()) <= 1e-12, errors


def test_maps_that_are_flattened_are_read_channel_by_channel():
    class Net(ReversingNet):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Sequential(nn.Linear(8 * 9, 12), nn.ReLU(), nn.Linear(12, 5))

        def forward(self, x):
            x = F.adaptive_avg_pool2d(self.conv2(self.conv(x)).relu(), 3)
            return self.fc(F.dropout(torch.flatten(x, 1), training=self.training, p=0.0))

        def get_classifier(self):
            return self.fc[2]

    student = Net()
    for ratio in (2, 3):
        plan = plan_expansion(student, ratio)
        assert dict(plan.tensors['fc.0.weight'].axes)[1] == AxisMap.uniform(72, ratio, 9)
        errors = expansion_errors(student, plan, torch.randn(3, 3, 16, 16))
        assert max(errors.values()) <= 1e-12, errors


def test_statistics_of_the_check_leave_deep_models_well_conditioned():
    """Random running statistics alone amplify rounding in these to 1e-7 or more, as much as an error of the plan."""
    for name in ('efficientnet_b4', 'ghostnetv3_050'):
        student = timm.create_model(name)
        assert verify_plan(student, plan_expansion(student)) <= 1e-12


@pytest.mark.parametrize('responses, is_exact', [([1e-13, 1e-12], True), ([1e-13] * 100, False)])
def test_rounding_is_told_by_more_than_one_response_to_it(monkeypatch, responses, is_exact):
    """EfficientViM in training mode answered one move of its parameters by a thirteenth of the teacher's error."""
    responses = iter(responses)
    monkeypatch.setattr(verify, '_sensitivity', lambda *args: next(responses))
    reference = nn.Linear(3, 2).double()
    agreed = verify.agreement(lambda x: reference(x) * (1 + 5e-12), reference, torch.randn(4, 3).double())
    assert agreed.is_exact == is_exact
