"""Every module of timm: its smallest architecture expands exactly, in both modes, is read back, goes a user's path."""

import copy
import gc
import io
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_gpd import GapPreservingTask, Rule, UnsupportedModelError, expand, plan_expansion, register_rule
from timm_gpd.coverage import architectures, create, read_back_error, timm_modules
from timm_gpd.coverage.architectures import FEWER, small_arguments
from timm_gpd.expansion import images
from timm_gpd.expansion.images import run_on_small_images
from timm_gpd.expansion.verify import compare, disable_randomness_, randomize_, verify_plan
from timm_gpd.teacher import inverse_reparameterization, rehearsal

pytestmark = pytest.mark.usefixtures('memory_is_kept')

# The smallest architecture of every module of timm 1.0.31, by parameters. Other releases' other modules are searched.
SMALLEST = {
    'beit': 'beit_base_patch16_224',
    'byoanet': 'halonet_h1',
    'byobnet': 'test_byobnet',
    'cait': 'cait_xxs24_224',
    'coat': 'coat_tiny',
    'convit': 'convit_tiny',
    'convmixer': 'convmixer_768_32',
    'convnext': 'test_convnext',
    'cpubone': 'cpubone_nano',
    'crossvit': 'crossvit_tiny_240',
    'csatv2': 'csatv2',
    'cspnet': 'cs3darknet_focus_s',
    'cspnext': 'cspnext_tiny',
    'davit': 'davit_tiny',
    'deepseek_vit': 'deepseek_vit_412m',
    'deit': 'deit_tiny_patch16_224',
    'densenet': 'densenet121',
    'dla': 'dla46x_c',
    'dpn': 'dpn48b',
    'edgenext': 'edgenext_xx_small',
    'efficientformer': 'efficientformer_l1',
    'efficientformer_v2': 'efficientformerv2_s0',
    'efficientnet': 'test_efficientnet',
    'efficientvim': 'efficientvim_m1',
    'efficientvit_mit': 'efficientvit_b0',
    'efficientvit_msra': 'efficientvit_m0',
    'eva': 'vit_tiny_patch16_dinov3_qkvb',
    'fasternet': 'fasternet_t0',
    'fastvit': 'fastvit_t8',
    'focalnet': 'focalnet_tiny_srf',
    'gcvit': 'gcvit_xxtiny',
    'gemma4_vit': 'gemma4_vit_167m',
    'ghostnet': 'ghostnet_050',
    'hardcorenas': 'hardcorenas_b',
    'hgnet': 'hgnetv2_b0',
    'hiera': 'hiera_tiny_224',
    'hieradet_sam2': 'sam2_hiera_tiny',
    'hrnet': 'hrnet_w18_small',
    'iformer': 'iformer_t',
    'inception_next': 'inception_next_atto',
    'inception_resnet_v2': 'inception_resnet_v2',
    'inception_v3': 'inception_v3',
    'inception_v4': 'inception_v4',
    'lcnetv2': 'lcnetv2_small',
    'levit': 'levit_128s',
    'lowformer': 'lowformer_b0',
    'mambaout': 'test_mambaout',
    'maxxvit': 'test_coatnet',
    'metaformer': 'poolformerv2_s12',
    'mlp_mixer': 'gmlp_ti16_224',
    'mobilenetv3': 'mobilenetv3_small_050',
    'mobilenetv5': 'mobilenetv5_base',
    'mobilevit': 'mobilevit_xxs',
    'mvitv2': 'mvitv2_tiny',
    'naflexvit': 'naflexvit_base_patch16_parfac_gap',
    'nasnet': 'nasnetalarge',
    'nest': 'nest_tiny',
    'nextvit': 'nextvit_small',
    'nfnet': 'test_nfnet',
    'pit': 'pit_ti_224',
    'pnasnet': 'pnasnet5large',
    'pvt_v2': 'pvt_v2_b0',
    'qwen3_vit': 'qwen3_vit_88m',
    'rdnet': 'rdnet_tiny',
    'regnet': 'regnetx_002',
    'repghost': 'repghostnet_050',
    'repvit': 'repvit_m1',
    'res2net': 'res2next50',
    'resnest': 'resnest14d',
    'resnet': 'test_resnet',
    'resnetv2': 'resnetv2_18',
    'rexnet': 'rexnet_100',
    'selecsls': 'selecsls42',
    'senet': 'legacy_seresnet18',
    'sequencer': 'sequencer2d_s',
    'shvit': 'shvit_s1',
    'sknet': 'skresnet18',
    'starnet': 'starnet_s050',
    'swiftformer': 'swiftformer_xs',
    'swin_transformer': 'swin_tiny_patch4_window7_224',
    'swin_transformer_v2': 'swinv2_tiny_window16_256',
    'swin_transformer_v2_cr': 'swinv2_cr_tiny_224',
    'tiny_vit': 'tiny_vit_5m_224',
    'tnt': 'tnt_s_legacy_patch16_224',
    'tresnet': 'tresnet_m',
    'twins': 'twins_svt_small',
    'vgg': 'vgg11',
    'visformer': 'visformer_tiny',
    'vision_transformer': 'test_vit',
    'vision_transformer_hybrid': 'vit_tiny_r_s16_p8_224',
    'vision_transformer_relpos': 'test_vit_relpos',
    'vision_transformer_sam': 'samvit_base_patch16_224',
    'vitamin': 'vitamin_small_224',
    'volo': 'volo_d1_224',
    'vovnet': 'ese_vovnet19b_slim_dw',
    'xception': 'legacy_xception',
    'xception_aligned': 'xception41p',
    'xcit': 'xcit_nano_12_p8_224',
}
CLASSES = 10  # a classifier of ImageNet's is most of a small model
SMALLER = {
    **FEWER,
    # HaloNet's blocks of 8 x 8 want maps of 8 x 8.
    'byoanet': {**FEWER['byoanet'], 'output_stride': 8},
    # Fewer and narrower blocks, but every kind of block is there.
    'cpubone': {'head_widths': (96, 100)},
    'crossvit': {**FEWER['crossvit'], 'embed_dim': (48, 96)},
    'csatv2': {'depths': (1, 1, 2, 2), 'transformer_depths': (0, 0, 1, 1)},
    'deit': {'depth': 2},
    'efficientformer': {**FEWER['efficientformer'], 'embed_dims': (24, 48, 112, 224)},
    'efficientformer_v2': {'depths': (1, 1, 2, 2), 'num_vit': 1},
    'efficientvim': {'depths': (1, 1, 1)},
    'eva': {'depth': 2},
    'fastvit': {'layers': (1, 1, 1, 1)},
    'focalnet': {'mlp_ratio': 1},
    'gcvit': {'embed_dim': 32},
    'iformer': {'depths': (1, 1, 3, 3), 'attn_groups': (0, 0, 1, 1)},
    'lcnetv2': {'depths': (2, 1, 2, 1)},
    'levit': {'depth': (1, 1, 1)},
    'lowformer': {'depth_list': (0, 1, 1, 1, 1), 'head_widths': (96, 100)},
    'nest': {'mlp_ratio': 1},
    'nextvit': {'depths': (1, 2, 5, 2)},
    'pvt_v2': {'depths': (1, 1, 1, 1)},
    'rdnet': {'num_blocks_list': (2,) * 7, 'growth_rates': (16,) * 7},
    'resnest': {'base_width': 16},
    'rexnet': {'width_mult': 0.5, 'depth_mult': 0.5},
    'shvit': {'depth': (1, 2, 2)},
    'swiftformer': {'layers': (2, 2, 2, 2)},
    'vgg': {'mlp_ratio': 1 / 64},
    'vision_transformer_hybrid': {'depth': 2},
    'vitamin': {'depth': 2},
    'volo': {'mlp_ratio': 1},
    'xception_aligned': {
        'block_cfg': (
            {'in_chs': 64, 'out_chs': 128, 'stride': 2},
            {'in_chs': 128, 'out_chs': 256, 'stride': 2},
            {'in_chs': 256, 'out_chs': 256, 'stride': 1},
            {'in_chs': 256, 'out_chs': (256, 320, 320), 'stride': 2},
            {'in_chs': 320, 'out_chs': (384, 384, 512), 'no_skip': True, 'stride': 1},
        )
    },
}
# Sequences with many blocks that are alike, whose number no argument says.
REPEATED = {
    'convmixer': ('blocks',),
    'inception_resnet_v2': ('repeat', 'repeat_1', 'repeat_2'),
    'inception_v4': ('features',),
}


def shorten_(model, sequences):
    """Keeps the first two of neighbouring blocks that are alike, classes and shapes, in sequences of a model."""

    def kind(block):
        return repr(block), {name: tensor.shape for name, tensor in block.state_dict().items()}

    for name in sequences:
        blocks = model.get_submodule(name)
        kinds = [kind(block) for block in blocks]
        for index in reversed(range(2, len(kinds))):
            if kinds[index] == kinds[index - 1] == kinds[index - 2]:
                del blocks[index]
    return model


def smallest(module):
    """Name of the module's smallest architecture."""

    def size(name):
        with torch.device('meta'):
            return sum(parameter.numel() for parameter in create(name).parameters())

    known = SMALLEST.get(module)
    return known if known and timm.is_model(known) else min(timm.list_models(module=module), key=size)


@pytest.mark.parametrize('module', timm_modules())
def test_smallest_architecture_is_exact_and_goes_the_path(module, monkeypatch):
    """In float32, gradients and logits bit for bit; ``python -m timm_gpd.coverage`` does it in float64."""
    gc.collect()  # models of another module
    for home in (images, architectures):  # as small as a model takes
        monkeypatch.setattr(home, 'SMALL_IMAGES', (32, 64, 56, 80, 96, 128))
    name = smallest(module)
    arguments = small_arguments(name, num_classes=CLASSES, **SMALLER.get(module, {}))

    def create_student():
        return shorten_(create(name, **arguments), REPEATED.get(module, ()))

    with monkeypatch.context() as patch:
        patch.setattr(rehearsal, 'ROUNDING', 0)
        student = randomize_(create_student())
        task = GapPreservingTask(student, verbose=False)  # which compares both modes in float64
        plan = task.get_dynamic_teacher().plan
        assert read_back_error(student, plan) <= 1e-15
        patch.setattr(inverse_reparameterization, 'plan_expansion', lambda *args: plan)  # what has been done
        patch.setattr(inverse_reparameterization, 'verify_plan', lambda *args: 0.0)
        patch.setattr(inverse_reparameterization, 'rehearse', lambda *args: None)
        new_student = create_student().eval()
        new_task = GapPreservingTask(new_student, verbose=False)
    go_the_path(task, new_task, new_student)


def go_the_path(task, new_task, new_student):
    """Steps, extraction into a new model of timm, a checkpoint into a new task, copies."""
    teacher = task.get_dynamic_teacher()
    stored = list(task.get_trainable_module().parameters())
    before = [parameter.detach().clone() for parameter in stored]
    optimizer = torch.optim.SGD(stored, lr=0.1)

    def step(x):
        optimizer.zero_grad()
        task(x, torch.tensor([0, 1]))['loss'].backward()
        nn.utils.clip_grad_norm_(stored, 1.0)
        optimizer.step()

    disable_randomness_(task).train()
    x, _ = run_on_small_images(step, new_student, teacher.plan.input_shape, 2)
    step(x), step(x)
    trained = [not torch.equal(*pair) for pair in zip(stored, before)]
    assert sum(trained) > len(trained) / 2, f'{sum(trained)} of {len(trained)} tensors are trained'

    expected = [logits.detach() for logits in task.eval().get_dynamic_teacher().joint(x)]
    assert all(logits.isfinite().all() for logits in expected)
    student = task.get_student()
    new_student.load_state_dict(student.state_dict(), strict=True)
    for what in (student, new_student):
        assert torch.equal(what(x), expected[0])
    assert torch.equal(teacher.extract_teacher()(x), expected[1])
    state = task.get_checkpoint_state()
    new_task.load_checkpoint_state(state['state_dict'], state['task_state'])
    with io.BytesIO() as file:
        pickle.dump(copy.deepcopy(new_task), file)
        file.seek(0)
        copied = pickle.load(file).get_dynamic_teacher()  # one forward pass for all three
    assert all(map(torch.equal, copied.joint(x), expected))
    assert not any(tensor.data_ptr() == mine.data_ptr() for tensor, mine in zip(copied.parameters(), stored))


def test_the_smallest_architecture_of_a_new_module_is_found(monkeypatch):
    monkeypatch.delitem(SMALLEST, 'starnet')
    monkeypatch.setitem(SMALLEST, 'shvit', 'no_longer_in_timm')
    assert (smallest('starnet'), smallest('shvit')) == ('starnet_s050', 'shvit_s1')


@pytest.mark.parametrize('ratio', (1, 3, 4))
@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('test_vit', {'in_chans': 1, 'num_classes': 5, 'global_pool': 'avg', 'img_size': 64}),
        ('test_efficientnet', {'in_chans': 4, 'global_pool': 'max', 'drop_path_rate': 0.2, 'drop_rate': 0.1}),
        ('edgenext_xx_small', {'num_classes': 3}),
        ('convnext_zepto_rms', {'global_pool': 'avgmax'}),
        ('efficientvit_m0', {'img_size': 96}),
        ('focalnet_tiny_srf', {'num_classes': 4, 'mlp_ratio': 1}),
        ('lambda_resnet26rpt_256', {'img_size': 64, 'width_factor': 0.5}),
        ('efficientnet_cc_b0_4e', {'num_classes': 2}),
    ],
)
def test_other_ratios_and_variants(name, kwargs, ratio):
    student = create(name, **kwargs)
    plan = plan_expansion(student, ratio)
    agreements = compare(student, plan)
    assert all(agreement.is_exact for agreement in agreements.values()), agreements
    assert read_back_error(student, plan) <= 1e-6  # one rounding in float32: a divisor of 3 is no power of 2


def test_a_forward_that_needs_values_is_planned_on_the_cpu():
    class Dimmer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

        def get_classifier(self):
            return self.fc

        def forward(self, x):
            x = self.norm(self.conv(x))
            return self.fc((x / 2 if x.mean() > 0 else x).relu().mean((2, 3)))

    student = Dimmer()
    plan = plan_expansion(student)
    assert plan.notes == ('planned on the CPU: the forward of Dimmer does not run on the meta device',)
    assert plan.input_shape == (3, 224, 224)
    assert verify_plan(student, plan) <= 1e-12


def test_a_model_in_another_dtype_is_planned():
    student = create('test_resnet').double()
    assert verify_plan(student, plan_expansion(student)) <= 1e-12


class HeadPool(nn.Module):
    """A user's own module: every head weighs the image's places by a score of its own, from (B, C, H, W) to (B, C)."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scores = nn.Conv2d(channels, num_heads, 1)
        self.values = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.scores(x).flatten(2).softmax(-1)
        values = self.values(x).flatten(2).unflatten(1, (self.num_heads, -1))
        return torch.einsum('bhn,bhdn->bhd', weights, values).flatten(1)


class HeadPoolNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 5)
        self.pool = HeadPool(12, num_heads=3)
        self.fc = nn.Linear(12, 7)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(F.gelu(self.stem(x))))


def test_a_rule_for_a_users_own_module():
    student = HeadPoolNet()
    with pytest.raises(UnsupportedModelError, match="'pool' of class .*HeadPool.*register_rule"):
        plan_expansion(student)

    def head_dim(pool):
        return pool.values.out_channels // pool.num_heads

    register_rule(HeadPool, Rule(multiply=('num_heads',), blocks={'values.out': head_dim}))
    with pytest.raises(UnsupportedModelError, match='differs from the student'):
        expand(student)  # whole heads leave the pool, and the classifier takes them for single channels
    register_rule(HeadPoolNet, Rule(blocks={'fc.in': lambda net: head_dim(net.pool)}))
    for ratio in (1, 2, 3, 4):
        plan = plan_expansion(student, ratio)
        assert verify_plan(student, plan) <= 1e-12
        assert read_back_error(student, plan) <= 1e-6
