"""RVT: what timm's own tests ask of a model, the expansion, and the authors' parameter names."""

import math

import pytest
import timm
import torch
from timm.models import FeatureInfo

from exactness import expansion_errors
from timm_gpd import DynamicTeacher, plan_expansion
from timm_gpd.models.rvt import checkpoint_filter_fn

MODELS = ['rvt_tiny', 'rvt_small', 'rvt_base']
SHALLOW = {'rvt_tiny': (2, 1), 'rvt_small': (2,), 'rvt_base': (2,)}


def shallow(name, **kwargs):
    return timm.create_model(name, depths=SHALLOW[name], **kwargs)


@pytest.mark.parametrize('name, millions', zip(MODELS, (8.6, 22.1, 86.2)))
def test_sizes_are_the_papers(name, millions):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize('name', MODELS)
def test_forward_and_grad_checkpointing(name):
    model = shallow(name).eval()
    x = torch.randn(1, 3, 96, 96)
    outputs = model(x)
    assert outputs.shape == (1, 1000) and not outputs.isnan().any()
    model.set_grad_checkpointing()
    assert torch.allclose(model(x), outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('checkpointing', [False, True])
def test_backward_reaches_every_parameter(name, checkpointing):
    model = shallow(name, num_classes=42).train()
    model.set_grad_checkpointing(checkpointing)
    outputs = model(torch.randn(2, 3, 64, 64))
    assert outputs.shape == (2, 42)
    outputs.mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('name', MODELS)
def test_cfg(name):
    model = shallow(name).eval()
    cfg, state_dict = model.default_cfg, model.state_dict()
    assert f'{cfg["first_conv"]}.weight' in state_dict and f'{cfg["classifier"]}.weight' in state_dict
    x = torch.randn(1, *cfg['input_size'])
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *cfg['pool_size'])
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(model(x), pre_logits)
    model.reset_classifier(0, '')
    assert model(x).shape == features.shape
    bare = shallow(name, num_classes=0, global_pool='').eval()
    assert bare(x).shape == features.shape
    assert model.get_classifier() is model.head.fc


@pytest.mark.parametrize('name', MODELS)
def test_features_only(name):
    model = timm.create_model(name, features_only=True).eval()
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 3
    outputs = model(torch.randn(1, 3, 64, 96))
    assert [o.shape[1] for o in outputs] == channels
    for reduction, output in zip(reductions, outputs):
        assert output.shape[-2:] == (math.ceil(64 / reduction), math.ceil(96 / reduction))


@pytest.mark.parametrize('name', MODELS)
def test_forward_intermediates(name):
    model = shallow(name).eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    x = torch.randn(1, 3, 64, 64)
    output, intermediates = model.forward_intermediates(x)
    assert [i.shape[1] for i in intermediates] == info.channels()
    assert torch.allclose(output, model.forward_features(x))
    assert torch.equal(output, intermediates[-1])  # there is no norm before pooling
    model.set_grad_checkpointing()
    again, _ = model.forward_intermediates(x)
    assert torch.allclose(output, again, rtol=1e-4, atol=1e-5)


def test_the_named_modules_give_the_intermediates():
    model = shallow('rvt_tiny').eval()
    seen = {}
    for info in model.feature_info:
        model.get_submodule(info['module']).register_forward_hook(
            lambda module, inputs, output, name=info['module']: seen.update({name: output.permute(0, 3, 1, 2)})
        )
    _, intermediates = model.forward_intermediates(torch.randn(1, 3, 64, 64))
    for info, intermediate in zip(model.feature_info, intermediates):
        assert torch.equal(seen[info['module']], intermediate)


@pytest.mark.parametrize('indices', [[0], [1], [0, 2], 1])
def test_pruning_keeps_the_intermediates(indices):
    model = shallow('rvt_tiny').eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    early = model.forward_intermediates(x, indices=indices, intermediates_only=True, stop_early=True)
    kept = model.prune_intermediate_layers(indices, prune_norm=True)
    pruned = model.forward_intermediates(x, indices=kept, intermediates_only=True)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, early, pruned))
    assert model(x).shape == expected[-1].shape == (1, model.num_features, *expected[-1].shape[-2:])
    assert sum(len(stage.blocks) for stage in model.stages) == max(kept) + 1


@pytest.mark.parametrize('size', [(15, 15), (33, 80), (224, 160), (255, 257)])
def test_any_image_size(size):
    model = shallow('rvt_tiny', img_size=size, num_classes=3, in_chans=1).eval()
    grid = tuple((side + 1) // 16 for side in size)
    assert model.patch_embed(torch.randn(1, 1, *size)).shape[-2:] == grid
    assert model(torch.randn(1, 1, *size)).shape == (1, 3)


def test_an_image_without_a_grid_is_refused():
    with pytest.raises(ValueError, match='at least 15 x 15 pixels, but img_size is 14'):
        timm.create_model('rvt_tiny', img_size=14)
    with pytest.raises(RuntimeError):
        shallow('rvt_tiny').eval()(torch.randn(1, 3, 14, 14))


def test_drop_rates_and_parameter_groups():
    model = timm.create_model(
        'rvt_tiny', drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4, drop_path_rate=0.5
    )
    assert model.head.drop.p == 0.1 and model.pos_drop.p == 0.2
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert {block.attn.proj_drop.p for block in blocks} == {block.mlp.drop1.p for block in blocks} == {0.3}
    rates = [getattr(block.drop_path1, 'drop_prob', 0.0) for block in blocks]
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == pytest.approx(0.5)
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert {name for names in groups.values() for name in names} == {name for name, _ in model.named_parameters()}
    assert len(groups) == 1 + len(blocks) + 1  # the stem, one for each block, the classifier
    together = {'stages.1.downsample.weight', 'stages.1.blocks.0.norm1.weight'}
    assert any(together <= set(names) for names in groups.values())


# The largest has nothing but more channels: three times as many take longer than all others.
@pytest.mark.parametrize('name, ratio', [(name, ratio) for name in MODELS for ratio in (2, 3)][:-1])
def test_expansion_is_exact(name, ratio):
    model = shallow(name, num_classes=7, drop_path_rate=0.1, proj_drop_rate=0.1)
    errors = expansion_errors(model, plan_expansion(model, ratio), torch.randn(2, 3, 48, 64))
    assert max(errors.values()) < 1e-12, errors


def test_a_variant_of_rvt_is_its_dynamic_teacher():
    teacher = timm.create_model('rvt_tiny_gpd', gpd_ratio=2, depths=(1, 1), num_classes=5)
    assert isinstance(teacher, DynamicTeacher)
    x = torch.randn(2, 3, 64, 64)
    teacher.eval()
    assert torch.allclose(teacher(x), teacher.forward_student(x), atol=1e-5)


def test_the_authors_names_become_timms():
    """Names as in the authors' released state dicts, one of every kind."""
    model = shallow('rvt_tiny')
    theirs = {
        'patch_embed.proj.0.weight': 'patch_embed.conv.weight',
        'patch_embed.proj.1.running_var': 'patch_embed.norm.running_var',
        'patch_embed.proj.3.bias': 'patch_embed.proj.bias',
        'transformers.0.blocks.1.attn.qkv.weight': 'stages.0.blocks.1.attn.qkv.weight',
        'transformers.1.blocks.0.mlp.dwconv.bias': 'stages.1.blocks.0.mlp.dwconv.bias',
        'pools.0.conv.weight': 'stages.1.downsample.weight',
        'norm.weight': 'head.norm.weight',
        'head.weight': 'head.fc.weight',
    }
    state_dict = model.state_dict()
    renamed = checkpoint_filter_fn({'model': {name: state_dict[ours] for name, ours in theirs.items()}}, model)
    assert all(renamed[ours] is state_dict[ours] for ours in theirs.values())
    assert checkpoint_filter_fn(state_dict, model).keys() == state_dict.keys()
