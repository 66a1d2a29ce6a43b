"""The scripts, run as a user runs them."""

import contextlib
import csv
import io
import os
import runpy
import sys
from types import SimpleNamespace

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
