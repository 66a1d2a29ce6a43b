"""Shared by the tests: small models, randomised weights, the definition of exactness."""

import gc
import os
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn

import timm_gpd  # noqa: F401  registers the variants
from process import kept_memory, kept_settings, read_settings, restore_settings
from programs import train
from timm_gpd.rules.rule import _RULES

torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'
os.environ['HF_HUB_OFFLINE'] = '1'

TINY_RESNET = dict(channels=(8, 16, 32, 64), stem_width=4, num_classes=10, in_chans=1)


def small_resnet(**kwargs):
    """A ResNet for images of three channels that runs in milliseconds."""
    return timm.create_model('test_resnet', **{**dict(channels=(8, 8, 16, 16), stem_width=4, num_classes=10), **kwargs})


def pytest_configure(config):
    """pytest-randomly shuffles the tests; their random numbers do not depend on its seed."""
    if hasattr(config.option, 'randomly_reset_seed'):
        config.option.randomly_reset_seed = False


def pytest_collection_finish():
    """What has been imported stays: garbage is looked for many times, and need not be looked for there."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope='session', autouse=True)
def settings_at_start():
    return read_settings()


@pytest.fixture(autouse=True)
def process_is_left_as_it_was(settings_at_start):
    """Rules that a test registers go with it; any other change that it leaves behind fails it."""
    rules = dict(_RULES)
    yield
    _RULES.clear()
    _RULES.update(rules)
    changed = restore_settings(settings_at_start)
    if changed:
        pytest.fail('changed and not restored:\n' + '\n'.join(f'{name}: {how}' for name, how in changed.items()))


@pytest.fixture(scope='module')
def memory_is_kept():
    """For files of tests with large models."""
    with kept_memory():
        yield


@pytest.fixture
def may_change_settings():
    """For tests of what sets switches of the process: they are set back."""
    with kept_settings():
        yield


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny_student() -> nn.Module:
    """A ResNet-10 of 142k parameters for images of (1, 32, 32)."""
    student = timm.create_model('test_resnet', **TINY_RESNET)
    student.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    return student


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """One run with everything on; its log."""
    folder = tmp_path_factory.mktemp('runs')
    result = train(folder, '--experiment', 'run', '--gpd-noise', '0.1', '--log-interval', '1')
    return folder / 'run', result
