"""``<arch>_gpd`` in timm's registry."""
import subprocess
import sys

import pytest
import timm
import torch

from timm_gpd import DynamicTeacher
from timm_gpd.models.variants import plain_name


def test_every_architecture_has_a_variant():
    plain = {name for name in timm.list_models() if not name.endswith('_gpd')}
    assert {name + '_gpd' for name in plain} == set(timm.list_models('*_gpd'))


def test_a_variant_is_the_plain_student():
    torch.manual_seed(0)
    plain = timm.create_model('resnet18', num_classes=10, in_chans=1)
    torch.manual_seed(0)
    variant = timm.create_model('resnet18_gpd', num_classes=10, in_chans=1)
    assert type(variant) is type(plain)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), variant.state_dict().values()))
    assert variant.pretrained_cfg['architecture'] == 'resnet18'
    variant.reset_classifier(3)
    assert variant.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 3)


def test_features_only():
    features = timm.create_model('resnet18_gpd', features_only=True, out_indices=(1, 2))
    assert [f.shape[1] for f in features(torch.randn(1, 3, 64, 64))] == [64, 128]


def test_with_a_ratio_a_variant_is_the_dynamic_teacher():
    teacher = timm.create_model('test_resnet_gpd', gpd_ratio=3, gpd_branches=1, num_classes=7)
    assert isinstance(teacher, DynamicTeacher) and teacher.plan.ratio == 3
    assert teacher(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_weights_come_from_a_file(tmp_path):
    plain = timm.create_model('test_resnet')
    torch.save(plain.state_dict(), tmp_path / 'weights.pth')
    variant = timm.create_model(
        'test_resnet_gpd', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth')))
    assert torch.equal(variant.fc.weight, plain.fc.weight)


def test_no_published_weights_is_one_line():
    with pytest.raises(RuntimeError, match='resnet26_gpd has no published weights: name a file or a Hub repo') as error:
        timm.create_model('resnet26_gpd', pretrained=True)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, plain', [
    ('resnet18_gpd', 'resnet18'), ('resnet18_gpd.tag_gpd', 'resnet18.tag_gpd'), ('resnet18', 'resnet18'),
    ('local-dir:runs/student_gpd', 'local-dir:runs/student_gpd'), ('hf-hub:me/net_gpd', 'hf-hub:me/net_gpd'),
])
def test_plain_name(name, plain):
    assert plain_name(name) == plain


def test_importing_stays_cheap_in_what_it_imports():
    """No model is built, and nothing heavy is loaded that timm does not load."""
    code = ('import sys, timm; before = set(sys.modules); import timm_gpd; '
            'print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))')
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & {'matplotlib', 'sklearn', 'pandas', 'scipy', 'tqdm'}, loaded
