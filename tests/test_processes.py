"""train.py on two processes: the run of one process with batches of twice the size."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from programs import ROOT, quick_arguments, run_on_two, summary, train
from timm_gpd.training.sync_batch_norm import SynchronizedBatchNorm

STEPS = 5
# One update an epoch, and a checkpoint of each. Images are augmented, and not mixed: each process has half of them.
COMMON = [
    '--digits-train-size',
    '64',
    '--epochs',
    STEPS,
    '--sched',
    'none',
    '--lr',
    '0.005',
    '--hflip',
    '0.5',
    '--workers',
    '1',
]
COMMON += ['--model-ema', '--model-ema-decay', '0.5', '--checkpoint-hist', STEPS, '--gpd-branches', '2']
RUNS = {
    # Neither batch norm nor dropout; two batches an update, of which one is not shared.
    'without batch norm': (['--model', 'test_convnext', '--model-kwargs', '--grad-accum-steps', '2'], 32, 16),
    'synchronized batch norm': (['--sync-bn'], 64, 32),
}


def torchrun(script, *arguments):
    """Starts two processes as a user does."""
    return subprocess.run(
        [
            *(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'),
            *map(str, (script, *arguments)),
        ],
        env={**os.environ, 'PYTHONPATH': ROOT},
        capture_output=True,
        text=True,
        timeout=120,
    )


def distance(actual, expected):
    """Relative, of all floating point tensors of a state together."""
    names = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    assert actual.keys() == expected.keys()
    both = [torch.cat([state[name].double().flatten() for name in names]) for state in (actual, expected)]
    return ((both[0] - both[1]).norm() / both[1].norm()).item()


@pytest.mark.parametrize('name', RUNS)
def test_two_processes_are_one_with_twice_the_batch(tmp_path, name):
    arguments, whole, half = RUNS[name]
    train(tmp_path, *COMMON, *arguments, '-b', whole, '--experiment', 'one')
    arguments = [*quick_arguments(tmp_path), *COMMON, *arguments, '-b', half, '--experiment', 'two']
    if name == 'synchronized batch norm':
        result = torchrun(os.path.join(ROOT, 'train.py'), *arguments)
    else:
        result = run_on_two(tmp_path, 'train.py', *arguments)
    assert result.stderr.count('Model ') == 1 and result.stdout.count('--result') == 1  # one process reports
    for step in range(STEPS):
        one, two = (
            torch.load(tmp_path / run / f'checkpoint-{step}.pth.tar', weights_only=False) for run in ('one', 'two')
        )
        for key in ('state_dict', 'state_dict_ema'):
            assert distance(two[key], one[key]) < 1e-5
        for key in ('task_state', 'task_state_ema'):
            assert distance(two[key]['dynamic_teacher'], one[key]['dynamic_teacher']) < 1e-5
        assert len(two['run']['parts']) == 2
    for one, two in zip(summary(tmp_path / 'one'), summary(tmp_path / 'two')):
        assert one.keys() == two.keys()
        for column in one:
            # Of 200 validation images one more or less may be right.
            tolerance = {'abs': 0.51} if 'top' in column or column == 'eval_gap' else {'rel': 1e-4}
            assert float(two[column]) == pytest.approx(float(one[column]), **tolerance), column
    assert sorted(os.listdir(tmp_path / 'one')) == sorted(os.listdir(tmp_path / 'two'))


FAILING = """
import os, sys, runpy
sys.path.insert(0, {root!r})
from timm_gpd.task import GapPreservingTask

forward, steps = GapPreservingTask.forward, []

def fail(self, *args):
    steps.append(0)
    if os.environ['RANK'] == '1' and len(steps) == 3:
        raise RuntimeError('the second process is out of paper')
    return forward(self, *args)

GapPreservingTask.forward = fail
runpy.run_path({script!r}, run_name='__main__')
"""


def test_a_process_that_fails_ends_the_run(tmp_path):
    script = tmp_path / 'failing.py'
    script.write_text(FAILING.format(root=ROOT, script=os.path.join(ROOT, 'train.py')))
    arguments = [*quick_arguments(tmp_path), *COMMON, '-b', '32', '--experiment', 'failed']
    result = torchrun(script, *arguments)
    assert result.returncode and 'the second process is out of paper' in result.stderr
    assert not [name for name in os.listdir(tmp_path / 'failed') if name.startswith('.')]
    checkpoint = torch.load(tmp_path / 'failed' / 'last.pth.tar', weights_only=False)
    assert checkpoint['epoch'] == 1 and len(summary(tmp_path / 'failed')) == 2


def synchronized(rank, folder):
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    norm, x = norm_and_images()
    part = (x[:3] if rank == 0 else x[3:]).clone().requires_grad_()
    with SynchronizedBatchNorm():
        y = norm(part)
        (y * y.exp()).sum().backward()
    torch.save([y.detach(), part.grad, norm.weight.grad, norm.running_mean, norm.running_var], f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


def norm_and_images():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return norm, torch.randn(5, 5, 3, 2, dtype=torch.float64)


def test_synchronized_batch_norm_is_batch_norm_of_all_images(tmp_path):
    """Also of processes with different numbers of images: outputs, gradients and running statistics."""
    torch.multiprocessing.start_processes(synchronized, args=(str(tmp_path),), nprocs=2, start_method='fork')
    norm, x = norm_and_images()
    x.requires_grad_()
    y = norm(x)
    (y * y.exp()).sum().backward()
    parts = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    close = dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), x.grad, **close)
    torch.testing.assert_close(parts[0][2] + parts[1][2], norm.weight.grad, **close)
    for part in parts:
        torch.testing.assert_close(part[3:], [norm.running_mean, norm.running_var], **close)
