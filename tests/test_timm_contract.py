"""timm's model contract, for ``*_gpd`` names with and without a dynamic teacher: what timm's own model tests ask."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm.data import resolve_model_data_config
from timm.models import group_parameters, load_checkpoint
from timm.optim import create_optimizer_v2

from timm_gpd import DynamicTeacher, expand
from timm_gpd.expansion.verify import randomize_

# Convolutions, heads of several layers, class tokens, two classifiers, shared modules, layer groups by a function.
SIZES = {
    'test_resnet': 64,
    'test_efficientnet': 64,
    'test_vit': 160,
    'test_convnext': 64,
    'mobilenetv3_small_050': 64,
    'coat_lite_tiny': 64,
    'levit_128s': 64,
    'cait_xxs24_224': 64,
}
SMALL = {
    'coat_lite_tiny': dict(img_size=64),
    'cait_xxs24_224': dict(img_size=64, depth=2),
    'levit_128s': dict(img_size=64),
}
VARIANTS = [(name, ratio) for name in SIZES for ratio in (None, 2)]


def create(name, ratio=None, **kwargs):
    settings = {**SMALL.get(name, {}), **kwargs}
    if ratio is not None:
        settings['gpd_ratio'] = ratio
    return timm.create_model(f'{name}_gpd', num_classes=7, **settings)


def images(name, batch=2):
    return torch.randn(batch, 3, SIZES[name], SIZES[name])


@pytest.fixture(scope='module', params=VARIANTS, ids=lambda variant: f'{variant[0]}-{variant[1] or "plain"}')
def variant(request):
    """A model with random weights, its name and its ratio. Not to be changed."""
    torch.manual_seed(0)
    name, ratio = request.param
    return randomize_(create(name, ratio)), name, ratio or 1


@torch.no_grad()
def test_forward_features_and_head(variant):
    model, name, _ = variant
    x = images(name)
    logits = model.eval()(x)
    assert logits.shape == (2, 7) == (2, model.num_classes) and logits.isfinite().all()
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), logits)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size)
    features = features if isinstance(features, (list, tuple)) else [features]
    assert model.num_features in [size for tensor in features for size in tensor.shape]


def test_every_parameter_gets_a_gradient(variant):
    model, name, _ = variant
    model = copy.deepcopy(model).train()
    outputs = model(images(name))
    (outputs if isinstance(outputs, torch.Tensor) else sum(outputs)).mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    moved = [name for name, parameter in model.named_parameters() if parameter.grad.any()]
    assert len(moved) > 0.9 * len(list(model.parameters()))


@torch.no_grad()
def test_intermediates_are_what_feature_info_says(variant):
    model, name, _ = variant
    if not hasattr(model, 'forward_intermediates') or name == 'coat_lite_tiny':
        pytest.skip('timm has none of this class, or in a layout of its own')
    x = images(name)
    final, intermediates = model.eval().forward_intermediates(x)
    assert len(intermediates) == len(model.feature_info)
    for tensor, info in zip(intermediates, model.feature_info):
        assert tensor.shape[1] == info['num_chs'] and tensor.isfinite().all()
    torch.testing.assert_close(model.forward_head(final), model(x))


def test_config_names_what_is_there(variant):
    model, name, ratio = variant
    config = model.pretrained_cfg
    assert config is model.default_cfg and config['architecture'] == name
    names = set(model.state_dict())
    for key in ('classifier', 'first_conv'):
        modules = config[key] if isinstance(config[key], (tuple, list)) else [config[key]]
        assert all(f'{module}.weight' in names for module in modules), key
    classifiers = model.get_classifier()
    for classifier in classifiers if isinstance(classifiers, (tuple, list)) else [classifiers]:
        assert isinstance(classifier, nn.Module)
    plain = create(name)
    assert model.in_chans == plain.in_chans == 3 and model.num_features == ratio * plain.num_features
    assert resolve_model_data_config(model) == resolve_model_data_config(plain)


@torch.no_grad()
def test_without_a_classifier_the_logits_are_features(variant):
    model, name, _ = variant
    x = images(name)
    model = copy.deepcopy(model).eval()
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    features = model(x)
    assert features.shape == (2, model.head_hidden_size)
    if name != 'levit_128s':  # whose classifier begins with a norm
        torch.testing.assert_close(features, expected)


@torch.no_grad()
def test_unpooled(variant):
    model, name, _ = variant
    if name not in ('test_resnet', 'test_efficientnet', 'test_convnext'):
        pytest.skip('its head always pools')
    model = copy.deepcopy(model).eval()
    model.reset_classifier(0, '')
    output = model(images(name))
    assert output.dim() == 4 and output.shape[1] == model.num_features


def classifier_parameters(model):
    classifiers = model.get_classifier()
    return {
        parameter
        for classifier in (classifiers if isinstance(classifiers, (tuple, list)) else [classifiers])
        for parameter in classifier.parameters()
    }


@pytest.mark.parametrize(
    'name', ['test_resnet', 'test_vit', 'test_convnext', 'mobilenetv3_small_050', 'coat_lite_tiny', 'levit_128s']
)
def test_a_new_classifier_is_shared_and_all_else_stays(name):
    teacher = expand(create(name), noise=0.1, num_branches=2 if name == 'test_resnet' else 1).train()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.01)
    before, modules = dict(teacher.named_parameters()), (teacher.wide, teacher.student)
    teacher.reset_classifier(5)
    assert teacher.num_classes == 5 and (teacher.wide, teacher.student) == modules
    changed = [name for name, parameter in teacher.named_parameters() if before.get(name) is not parameter]
    assert changed and classifier_parameters(teacher) == {dict(teacher.named_parameters())[name] for name in changed}

    x = images(name, 4)
    student_logits, teacher_logits = teacher.joint(x)
    for logits in (student_logits, teacher_logits):
        logits = logits if isinstance(logits, torch.Tensor) else sum(logits)
        assert logits.shape == (4, 5)
    optimizer.add_param_group({'params': [p for name, p in teacher.named_parameters() if name in changed]})
    stored = {name: parameter.detach().clone() for name, parameter in teacher.named_parameters()}
    for logits in (student_logits, teacher_logits):
        (logits if isinstance(logits, torch.Tensor) else sum(logits)).square().mean().backward(retain_graph=True)
    optimizer.step()
    moved = [name for name, parameter in teacher.named_parameters() if not torch.equal(parameter, stored[name])]
    assert set(changed) <= set(moved) and len(moved) > len(changed)

    plain = create(name)
    plain.reset_classifier(5)
    extracted = teacher.eval().extract_student()
    plain.load_state_dict(extracted.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), teacher.joint(x).student)
        torch.testing.assert_close(teacher.extract_teacher()(x), teacher(x))


def test_a_new_classifier_leaves_the_function_of_the_features():
    teacher = expand(create('test_resnet'), noise=0.2, num_branches=6).eval()
    x = images('test_resnet')
    with torch.no_grad():
        student, features = teacher.extract_student().forward_features(x), teacher.forward_features(x)
        teacher.reset_classifier(7)
        assert torch.equal(teacher.forward_features(x), features)
        assert torch.equal(teacher.extract_student().forward_features(x), student)


@pytest.mark.parametrize('name', ['test_vit', 'levit_128s', 'cait_xxs24_224', 'test_efficientnet'])
def test_layer_groups_are_the_students(name):
    """Whether the class gives patterns or a function: layer decay sees the layers of plain training."""
    student, teacher = create(name), create(name, 2)
    expected = group_parameters(student, student.group_matcher(), reverse=True)
    layers = group_parameters(teacher, teacher.group_matcher(), reverse=True)
    assert {name.removeprefix('wide.'): layer for name, layer in layers.items()} == expected

    def scales(model):
        groups = create_optimizer_v2(model, opt='adamw', weight_decay=0.1, layer_decay=0.7).param_groups
        return sorted((group['lr_scale'], group['weight_decay'], len(group['params'])) for group in groups)

    assert scales(teacher) == scales(student)


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet'])
def test_gradient_checkpointing_changes_nothing(name):
    model = create(name, 2).train()
    x = images(name)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


def test_weights_of_a_student_load_into_its_dynamic_teacher(tmp_path):
    student = randomize_(create('test_vit'))
    torch.save({'state_dict': student.state_dict()}, tmp_path / 'student.pth')
    teacher = create('test_vit', 2, checkpoint_path=str(tmp_path / 'student.pth')).eval()
    x = images('test_vit')
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), student.eval()(x), rtol=1e-4, atol=1e-4)
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    other = create('test_vit', 2).eval()
    load_checkpoint(other, str(tmp_path / 'teacher.pth'))
    assert torch.equal(other(x), teacher(x))
    with pytest.raises(RuntimeError, match='Missing key'):
        other.load_state_dict({'head.bias': torch.zeros(7)})


def test_what_is_refused_is_one_line():
    with pytest.raises(ValueError, match='features_only.*forward_intermediates') as error:
        timm.create_model('test_resnet_gpd', gpd_ratio=2, features_only=True)
    assert '\n' not in str(error.value)
    assert len(timm.create_model('test_resnet_gpd', features_only=True)(images('test_resnet'))) > 1
    with pytest.raises(NotImplementedError, match='prune the student'):
        create('test_vit', 2).prune_intermediate_layers(1)


def test_a_model_of_ones_own_lacks_what_it_lacked():
    own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    teacher = expand(own, classifier='4')
    assert isinstance(teacher, DynamicTeacher)
    assert not any(hasattr(teacher, name) for name in ('num_classes', 'pretrained_cfg', 'feature_info', 'in_chans'))
    with pytest.raises(AttributeError, match='forward_features'):
        teacher.forward_features(torch.zeros(1, 3, 8, 8))
