"""The scripts, run as a user runs them."""

import argparse
import contextlib
import csv
import io
import os
import runpy
import sys
from types import SimpleNamespace

import torch

from process import kept_settings

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

QUICK = ['--epochs', '2', '--digits-train-size', '100', '--warmup-epochs', '0']


def run(script, *arguments, code=0):
    """Runs a script in this process, as ``python script arguments``: starting Python and torch anew takes seconds."""
    stdout, stderr = io.StringIO(), io.StringIO()
    exit_code = 0
    with kept_settings(), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        sys.argv = [script, *map(str, arguments)]
        try:
            runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
        except SystemExit as exit:
            exit_code = exit.code
    assert exit_code == code, stderr.getvalue()[-3000:]
    return SimpleNamespace(stdout=stdout.getvalue(), stderr=stderr.getvalue())


def summary(folder):
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def train(tmp_path, *arguments, config='digits_gpd', **kwargs):
    return run(
        'train.py',
        '-c',
        os.path.join(ROOT, 'configs', f'{config}.yaml'),
        '--data-dir',
        tmp_path.parent / 'data',
        '--output',
        tmp_path,
        *QUICK,
        *arguments,
        **kwargs,
    )


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
