"""Shared by the tests: small models, randomised weights, the definition of exactness."""
import os

import pytest
import timm
import torch
import torch.nn as nn

import timm_gpd  # noqa: F401  registers the variants

torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'
os.environ['HF_HUB_OFFLINE'] = '1'

TINY_RESNET = dict(channels=(8, 16, 32, 64), stem_width=4, num_classes=10, in_chans=1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_student() -> nn.Module:
    """A ResNet-10 of 142k parameters for images of (1, 32, 32)."""
    student = timm.create_model('test_resnet', **TINY_RESNET)
    student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    return student
