"""The scripts, run as a user runs them."""

import argparse
import contextlib
import csv
import io
import json
import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from process import kept_settings
from timm_gpd.training.data import datasets
from timm_gpd.training.data.digits import write_digits

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

QUICK = ['--epochs', '2', '--digits-train-size', '100', '--warmup-epochs', '0']
VALIDATION = 20  # digits of each class: with all that are left, validation takes half of a short run's time


def write_few_digits(data_dir, train_size, seed):
    """Writes the digits once, and keeps few of those for validation."""
    folder = write_digits(data_dir, train_size, seed)
    for digit in Path(folder, 'validation').iterdir():
        for image in sorted(digit.iterdir())[VALIDATION:]:
            image.unlink()
    return folder


def run(script, *arguments, code=0):
    """Runs a script in this process, as ``python script arguments``: starting Python and torch anew takes seconds."""
    stdout, stderr = io.StringIO(), io.StringIO()
    exit_code = 0
    with (
        kept_settings(),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(datasets, 'write_digits', write_few_digits)
        sys.argv = [script, *map(str, arguments)]
        try:
            runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
        except SystemExit as exit:
            exit_code = exit.code
    assert exit_code == code, stderr.getvalue()[-3000:]
    return SimpleNamespace(stdout=stdout.getvalue(), stderr=stderr.getvalue())


def run_on_two(folder, script, *arguments):
    """Runs a script on two processes, in the environment that torchrun makes; what both wrote, also into a folder.

    They are forked, as starting Python and torch anew takes seconds for each.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1]), 'WORLD_SIZE': '2'}

    def work(rank):
        os.environ.update(address, RANK=rank, LOCAL_RANK=rank)
        result = run(script, *arguments)
        (folder / f'written-{rank}.json').write_text(json.dumps(vars(result)))

    processes = [multiprocessing.get_context('fork').Process(target=work, args=(rank,)) for rank in '01']
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()  # if it waits for one that has failed
    assert [process.exitcode for process in processes] == [0, 0]
    written = [json.loads((folder / f'written-{rank}.json').read_text()) for rank in '01']
    return SimpleNamespace(**{name: ''.join(each[name] for each in written) for name in ('stdout', 'stderr')})


def summary(folder):
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def train(tmp_path, *arguments, config='digits_gpd', **kwargs):
    return run('train.py', *quick_arguments(tmp_path, config), *arguments, **kwargs)


def quick_arguments(tmp_path, config='digits_gpd'):
    config = os.path.join(ROOT, 'configs', f'{config}.yaml')
    return ['-c', config, '--data-dir', tmp_path.parent / 'data', '--output', tmp_path, *QUICK]


def checkpoint_values(state, path=''):
    """All that a checkpoint holds but the command, by where it stands."""
    if isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from checkpoint_values(value, f'{path}/{key}')
    elif not isinstance(state, argparse.Namespace):
        yield path, state


def differences(actual, expected):
    """What differs between the folders of two runs: files, and numbers and tensors of every checkpoint, bit for bit."""
    names = sorted(set(os.listdir(actual)) ^ set(os.listdir(expected)))
    if (actual / 'summary.csv').read_text() != (expected / 'summary.csv').read_text():
        names.append('summary.csv')
    for file in sorted(expected.glob('*.pth.tar')):
        if not (actual / file.name).exists():
            continue  # which is one of the files
        found, wanted = (
            dict(checkpoint_values(torch.load(folder / file.name, weights_only=False))) for folder in (actual, expected)
        )
        for key in sorted(found.keys() | wanted.keys()):
            first, second = found.get(key), wanted.get(key)
            both_tensors = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
            if not (torch.equal(first, second) if both_tensors else first == second):
                names.append(f'{key} of {file.name}')
    return names
