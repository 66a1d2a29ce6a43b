"""What training on the CPU asks of the process: no page faults for memory it had, no denormal numbers."""
import platform
import subprocess
import sys

import pytest

PROGRAM = '''
import resource
import torch
from timm_gpd.training.cpu import tune_cpu
if {tuned}:
    tune_cpu()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** 24)  # 64 MiB, more than glibc's largest dynamic threshold
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
products = torch.full((2 ** 20,), 1e-20) * 1e-20  # in every thread
print(faults[-1], products.count_nonzero().item())
'''


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='what is tuned is glibc')
def test_freed_memory_is_kept_and_denormal_numbers_are_not():
    (faults, denormal), (faults_tuned, denormal_tuned) = (
        map(int, subprocess.run(
            [sys.executable, '-c', PROGRAM.format(tuned=tuned)], check=True, stdout=subprocess.PIPE).stdout.split())
        for tuned in (False, True))
    assert faults_tuned < 10 < faults
    assert denormal_tuned == 0 < denormal
