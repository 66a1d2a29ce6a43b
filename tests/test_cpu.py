"""Switches of the process that training on the CPU is faster with, and that they can be set back."""

import json
import platform
import subprocess
import sys

import pytest
import torch

from timm_gpd.private_torch import keeps_compiled_layouts, set_keep_compiled_layouts
from timm_gpd.training.cpu import tune_process_for

CPU = torch.device('cpu')


def makes_denormals():
    return bool((torch.full((1000,), 1e-20) * 1e-20).count_nonzero())


@pytest.mark.parametrize('flushed, kept', [(False, False), (True, True)])
def test_switches_and_back(flushed, kept):
    before = not makes_denormals(), keeps_compiled_layouts()
    try:
        torch.set_flush_denormal(flushed)
        set_keep_compiled_layouts(kept)
        undo = tune_process_for(CPU)
        assert not makes_denormals() and keeps_compiled_layouts()
        undo()
        assert (not makes_denormals(), keeps_compiled_layouts()) == (flushed, kept)
    finally:
        torch.set_flush_denormal(before[0])
        set_keep_compiled_layouts(before[1])


def test_other_devices_need_none_of_them():
    before = makes_denormals(), keeps_compiled_layouts()
    undo = tune_process_for(torch.device('meta'))
    assert (makes_denormals(), keeps_compiled_layouts()) == before
    undo()
    assert (makes_denormals(), keeps_compiled_layouts()) == before


# glibc's own account, in MiB: what it maps for a tensor alone, and by how much the heap has grown after it was freed.
MALLOC = """
import ctypes, json, torch
from timm_gpd.training.cpu import tune_process_for

class Account(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        'arena', 'ordblks', 'smblks', 'hblks', 'hblkhd', 'usmblks', 'fsmblks', 'uordblks', 'fordblks', 'keepcost')]

read = ctypes.CDLL(None).mallinfo2
read.restype = Account

def measure(size):
    before = read()
    tensor = torch.ones(size * 2 ** 18)
    mapped = read().hblkhd - before.hblkhd
    del tensor
    return [size / 2 ** 20 for size in (mapped, read().arena - before.arena)]

plain = measure(64)
undo = tune_process_for(torch.device('cpu'))
tuned = measure(64)
undo()
print(json.dumps([plain, tuned, measure(256)]))  # more than what the heap has kept
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='what is tuned is glibc')
def test_freed_memory_is_kept_until_that_is_undone():
    result = subprocess.run([sys.executable, '-c', MALLOC], check=True, stdout=subprocess.PIPE)
    plain, tuned, undone = json.loads(result.stdout)
    assert plain[0] == pytest.approx(64, abs=1) and plain[1] < 1
    assert tuned[0] == 0 and tuned[1] > 60
    assert undone[0] == pytest.approx(256, abs=1) and undone[1] < 1
