"""Checkpoints in the layout of the authors' releases, with random values, and their student written out step by step.

Nothing here merges kernels or renames: branches run as the operations that they stand for, on slices of the teacher's
tensors, as the authors do when they run the student.
"""

import argparse
from typing import Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

RATIO = 2
RESNET_WIDTHS = (8, 12, 16, 24)
RVT_DEPTHS = (2, 1)


class Teacher:
    """Collects the tensors of a dynamic teacher. Channel counts are the student's."""

    def __init__(self, seed: int = 0) -> None:
        self.tensors: Dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return shift + scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def conv(self, name: str, i: int, o: int, k: int, depthwise: bool = False, bias: bool = False, stem: bool = False):
        inputs = 1 if depthwise else i if stem else RATIO * i
        scale = (inputs * k * k) ** -0.5
        self.tensors[f'{name}.weight'] = self.random(RATIO * o, inputs, k, k, scale=scale)
        if bias:
            self.tensors[f'{name}.bias'] = self.random(RATIO * o, scale=0.2)

    def linear(self, name: str, i: int, o: int, classifier: bool = False):
        o = o if classifier else RATIO * o
        self.tensors[f'{name}.weight'] = self.random(o, RATIO * i, scale=i**-0.5)
        self.tensors[f'{name}.bias'] = self.random(o, scale=0.2)

    def layer_norm(self, name: str, c: int):
        self.tensors[f'{name}.weight'] = self.random(RATIO * c, shift=1.0, scale=0.3)
        self.tensors[f'{name}.bias'] = self.random(RATIO * c, scale=0.3)

    def norm(self, name: str, c: int):
        self.layer_norm(name, c)
        for prefix in ('', 'tiny_'):
            self.tensors[f'{name}.{prefix}running_mean'] = self.random(RATIO * c, scale=0.3)
            self.tensors[f'{name}.{prefix}running_var'] = self.random(RATIO * c).abs() + 0.5
        self.tensors[f'{name}.num_batches_tracked'] = torch.tensor(7)

    def branches(self, name: str, i: int, o: int, depthwise: bool = False):
        """A 3x3 convolution of six branches."""
        i, o = RATIO * i, RATIO * o
        inputs = 1 if depthwise else i
        scale = (9 * inputs) ** -0.5
        identity = torch.zeros(i, inputs, 1, 1, dtype=torch.float64)
        for channel in range(i):
            identity[channel, channel % inputs] = 1 if depthwise else 1 / RATIO
        self.tensors.update(
            {
                f'{name}.{key}': tensor
                for key, tensor in {
                    'weight_orepa_origin': self.random(o, inputs, 3, 3, scale=scale),
                    'bias_orepa_origin': self.random(o, scale=0.2),
                    'weight_orepa_avg_conv': self.random(o, inputs, 1, 1, scale=scale),
                    'weight_orepa_avg_avg': torch.full((3, 3), 1 / 9, dtype=torch.float64),
                    'weight_orepa_pfir_conv': self.random(o, inputs, 1, 1, scale=scale),
                    'weight_orepa_prior': self.random(o, 3, 3),
                    'weight_orepa_1x1': self.random(o, inputs, 3, 3, scale=scale),
                    'weight_orepa_1x1_kxk_idconv1': self.random(i, inputs, 1, 1, scale=0.1),
                    'id_tensor': identity
                    + self.random(i, inputs, 1, 1, scale=0.01),  # the authors add noise to it as well
                    'weight_orepa_1x1_kxk_conv2': self.random(o, inputs, 3, 3, scale=scale),
                    'weight_orepa_gconv_dw': self.random(8 * i, 1, 3, 3, scale=0.3),
                    'weight_orepa_gconv_pw': self.random(o, 8 * inputs, 1, 1, scale=scale),
                    'vector': self.random(6, o, scale=0.5),
                }.items()
            }
        )


class Student:
    """Runs layers of the student on a teacher's tensors."""

    def __init__(self, tensors: Dict[str, Tensor]) -> None:
        self.tensors = tensors

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        if f'{name}.weight' not in self.tensors:
            return self.branches(x, name)
        weight, bias = self.tensors[f'{name}.weight'], self.tensors.get(f'{name}.bias')
        o, k = weight.shape[0] // RATIO, weight.shape[-1]
        padding = (k - 1) // 2 if name != 'patch_embed.proj.0' else 2
        padding = 0 if k == 4 else padding
        if weight.shape[1] == 1:
            return F.conv2d(x, weight[:o], None if bias is None else bias[:o], stride, padding, groups=x.shape[1])
        bias = None if bias is None else RATIO * bias[:o]
        return F.conv2d(x, RATIO * weight[:o, : x.shape[1]], bias, stride, padding)

    def branches(self, x: Tensor, name: str) -> Tensor:
        t = {key.removeprefix(f'{name}.'): tensor for key, tensor in self.tensors.items() if key.startswith(f'{name}.')}
        o, i = t['weight_orepa_origin'].shape[0] // RATIO, x.shape[1]
        depthwise = t['weight_orepa_origin'].shape[1] == 1
        groups, r = (i, 1) if depthwise else (1, RATIO)
        a = slice(None) if depthwise else slice(i)  # input channels of a tensor's second axis

        def run(x: Tensor, weight: Tensor, groups: int = groups) -> Tensor:
            return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)

        identity = r * t['id_tensor'][:i, a] + r * t['weight_orepa_1x1_kxk_idconv1'][:i, a]
        mixing = t['weight_orepa_gconv_pw'][:o, slice(None) if depthwise else slice(8 * i)]
        outputs = (
            run(x, r * t['weight_orepa_origin'][:o, a]),
            F.avg_pool2d(run(x, r * t['weight_orepa_avg_conv'][:o, a]), 3, stride=1, padding=1),
            run(run(x, r * t['weight_orepa_pfir_conv'][:o, a]), t['weight_orepa_prior'][:o, None], groups=o),
            run(run(x, identity), r * t['weight_orepa_1x1_kxk_conv2'][:o, a]),
            run(x, r * t['weight_orepa_1x1'][:o, a]),
            run(run(x, t['weight_orepa_gconv_dw'][: 8 * i], groups=i), r * mixing),
        )
        scales = t['vector'][:, :o, None, None]
        return sum(s * y for s, y in zip(scales, outputs)) + r * t['bias_orepa_origin'][:o, None, None]

    def norm(self, x: Tensor, name: str) -> Tensor:
        keys = ('tiny_running_mean', 'tiny_running_var', 'weight', 'bias')
        mean, var, weight, bias = (self.tensors[f'{name}.{key}'][: x.shape[1], None, None] for key in keys)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        c = x.shape[-1]
        return F.layer_norm(x, (c,), self.tensors[f'{name}.weight'][:c], self.tensors[f'{name}.bias'][:c], 1e-6)

    def linear(self, x: Tensor, name: str, classifier: bool = False) -> Tensor:
        weight, bias = self.tensors[f'{name}.weight'], self.tensors[f'{name}.bias']
        r, o = (1, len(bias)) if classifier else (RATIO, len(bias) // RATIO)
        return F.linear(x, r * weight[:o, : x.shape[-1]], r * bias[:o])


def resnet18_teacher(classes: int = 5) -> Dict[str, Tensor]:
    """Of narrow stages, so that a test's tensors are small; the stem has its 64 channels."""
    t = Teacher()
    t.conv('conv1', 3, 64, 7, stem=True), t.norm('bn1', 64)
    inputs = 64
    for stage, width in enumerate(RESNET_WIDTHS, 1):
        for block in range(2):
            name = f'layer{stage}.{block}'
            if stage > 1 and block == 0:
                t.conv(f'{name}.conv1', inputs, width, 3)  # of stride 2, so not of branches
            else:
                t.branches(f'{name}.conv1', inputs, width)
            t.norm(f'{name}.bn1', width), t.branches(f'{name}.conv2', width, width), t.norm(f'{name}.bn2', width)
            if inputs != width:
                t.conv(f'{name}.downsample.0', inputs, width, 1), t.norm(f'{name}.downsample.1', width)
            inputs = width
    t.linear('fc', inputs, classes, classifier=True)
    return t.tensors


def resnet18_student(tensors: Dict[str, Tensor], x: Tensor) -> Tensor:
    s = Student(tensors)
    x = F.max_pool2d(s.norm(s.conv(x, 'conv1', 2), 'bn1').relu(), 3, 2, 1)
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f'layer{stage}.{block}', 2 if stage > 1 and block == 0 else 1
            y = s.norm(s.conv(x, f'{name}.conv1', stride), f'{name}.bn1').relu()
            y = s.norm(s.conv(y, f'{name}.conv2'), f'{name}.bn2')
            if f'{name}.downsample.0.weight' in tensors:
                x = s.norm(s.conv(x, f'{name}.downsample.0', stride), f'{name}.downsample.1')
            x = (x + y).relu()
    return s.linear(x.mean((2, 3)), 'fc', classifier=True)


_MOBILENET = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)  # width, stride


def mobilenet_teacher(classes: int = 5) -> Dict[str, Tensor]:
    t = Teacher()
    t.conv('model.0.0', 3, 32, 3, stem=True), t.norm('model.0.1', 32)
    inputs = 32
    for i, (width, stride) in enumerate(_MOBILENET, 1):
        if stride == 1:
            t.branches(f'model.{i}.0', inputs, inputs, depthwise=True)
        else:
            t.conv(f'model.{i}.0', inputs, inputs, 3, depthwise=True)
        t.norm(f'model.{i}.1', inputs), t.conv(f'model.{i}.3', inputs, width, 1), t.norm(f'model.{i}.4', width)
        inputs = width
    t.linear('fc', inputs, classes, classifier=True)
    return t.tensors


def mobilenet_student(tensors: Dict[str, Tensor], x: Tensor) -> Tensor:
    s = Student(tensors)
    x = s.norm(s.conv(x, 'model.0.0', 2), 'model.0.1').relu()
    for i, (_, stride) in enumerate(_MOBILENET, 1):
        x = s.norm(s.conv(x, f'model.{i}.0', stride), f'model.{i}.1').relu()
        x = s.norm(s.conv(x, f'model.{i}.3'), f'model.{i}.4').relu()
    return s.linear(x.mean((2, 3)), 'fc', classifier=True)


def rvt_tiny_teacher(classes: int = 5) -> Dict[str, Tensor]:
    """Of few blocks."""
    t = Teacher()
    t.conv('patch_embed.proj.0', 3, 32, 7, bias=True, stem=True), t.norm('patch_embed.proj.1', 32)
    t.conv('patch_embed.proj.3', 32, 192, 4, bias=True)
    for stage, (width, depth) in enumerate(zip((192, 384), RVT_DEPTHS)):
        for block in range(depth):
            name = f'transformers.{stage}.blocks.{block}'
            t.layer_norm(f'{name}.norm1', width), t.layer_norm(f'{name}.norm2', width)
            t.linear(f'{name}.attn.qkv', width, 3 * width), t.linear(f'{name}.attn.proj', width, width)
            t.conv(f'{name}.mlp.fc1', width, 4 * width, 1, bias=True), t.norm(f'{name}.mlp.bn1', 4 * width)
            t.conv(f'{name}.mlp.dwconv', 4 * width, 4 * width, 3, bias=True, depthwise=True)
            t.norm(f'{name}.mlp.bn2', 4 * width)
            t.conv(f'{name}.mlp.fc2', 4 * width, width, 1, bias=True), t.norm(f'{name}.mlp.bn3', width)
    t.conv('pools.0.conv', 192, 384, 3, bias=True, depthwise=True)
    t.layer_norm('norm', 384), t.linear('head', 384, classes, classifier=True)
    return t.tensors


def rvt_tiny_student(tensors: Dict[str, Tensor], x: Tensor) -> Tensor:
    s = Student(tensors)
    x = s.norm(s.conv(x, 'patch_embed.proj.0', 2), 'patch_embed.proj.1')
    x = s.conv(F.max_pool2d(x, 3, 2, 1), 'patch_embed.proj.3', 4)
    for stage, depth in enumerate(RVT_DEPTHS):
        b, c, h, w = x.shape
        heads = c // 32
        for block in range(depth):
            name = f'transformers.{stage}.blocks.{block}'
            tokens = s.layer_norm(x.flatten(2).transpose(1, 2), f'{name}.norm1')
            q, k, v = s.linear(tokens, f'{name}.attn.qkv').view(b, h * w, 3, heads, 32).permute(2, 0, 3, 1, 4)
            tokens = ((q @ k.transpose(-2, -1) / 32**0.5).softmax(-1) @ v).transpose(1, 2).reshape(b, h * w, c)
            x = x + s.linear(tokens, f'{name}.attn.proj').transpose(1, 2).view(b, c, h, w)
            y = s.layer_norm(x.permute(0, 2, 3, 1), f'{name}.norm2').permute(0, 3, 1, 2)
            y = F.gelu(s.norm(s.conv(y, f'{name}.mlp.fc1'), f'{name}.mlp.bn1'))
            y = F.gelu(s.norm(s.conv(y, f'{name}.mlp.dwconv'), f'{name}.mlp.bn2'))
            x = x + s.norm(s.conv(y, f'{name}.mlp.fc2'), f'{name}.mlp.bn3')
        if stage == 0:
            x = s.conv(x, 'pools.0.conv', 2)
    return s.linear(s.layer_norm(x.mean((2, 3)), 'norm'), 'head', classifier=True)


def checkpoint(tensors: Dict[str, Tensor], **extra) -> dict:
    """What the authors' scripts save."""
    return {
        'epoch': 99,
        'arch': 'resnet',
        'state_dict': tensors,
        'optimizer': {'state': {}, 'param_groups': []},
        'version': 2,
        'args': argparse.Namespace(gpd_ratio=2, num_branches_orepa=6),
        'metric': 72.7,
        **extra,
    }


SMALL: Dict[str, Tuple] = {
    'resnet18': (resnet18_teacher, resnet18_student, dict(channels=RESNET_WIDTHS)),
    'mobilenetv1_100': (mobilenet_teacher, mobilenet_student, dict(act_layer='relu')),
    'rvt_tiny': (rvt_tiny_teacher, rvt_tiny_student, dict(depths=RVT_DEPTHS)),
}
