"""Runs of earlier versions go on, and their students load: what is stored keeps its meaning."""

import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import programs
from programs import ROOT, run, summary

RUNS = os.path.join(ROOT, 'tests', 'fixtures', 'flat_layout')


def write_digits_as_then(folder):
    """Where no image was for testing: a folder that is there is used as it is, by a run that goes on, too."""
    digits = load_digits()
    parts = train_test_split(np.arange(len(digits.target)), train_size=50, stratify=digits.target, random_state=42)
    for split, indices in zip(('train', 'validation'), parts):
        for index in indices:
            path = folder / split / str(digits.target[index]) / f'{index:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(digits.images[index] * (255 / 16)).astype(np.uint8)).save(path)


@pytest.mark.parametrize('name', ['gpd', 'full'])
def test_a_run_from_before_the_package_had_rooms_goes_on(tmp_path, monkeypatch, name):
    """Teacher, branches, distillers, averages and optimizer: the next losses are those that were measured then."""
    folder = tmp_path / 'out' / name
    shutil.copytree(os.path.join(RUNS, name), folder)
    shutil.copytree(os.path.join(RUNS, 'plain'), tmp_path / 'out' / 'plain')
    (folder / 'last.pth.tar').write_bytes(lzma.decompress((folder / 'last.pth.tar.xz').read_bytes()))
    expected = summary(folder)
    (folder / 'summary.csv').unlink()
    write_digits_as_then(tmp_path / 'data' / 'digits-50-42')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programs, 'VALIDATION', 2000)  # all of them, as then

    run('train.py', '--config', folder / 'args.yaml', '--epochs', '4', '--resume', folder / 'last.pth.tar')

    rows = summary(folder)
    assert [row['epoch'] for row in rows] == ['2', '3']
    for row, before in zip(rows, expected[2:]):
        assert row.keys() == before.keys()
        for column in row:
            if 'loss' in column or '/' in column:
                assert float(row[column]) == pytest.approx(float(before[column]), rel=1e-4), column


@pytest.mark.parametrize('name', ['gpd', 'full', 'plain'])
def test_a_student_from_before_the_package_had_rooms_loads(tmp_path, name):
    path = os.path.join(RUNS, name, 'student')
    student = timm.create_model(f'local-dir:{path}', pretrained=True).eval()
    weights = load_file(os.path.join(path, 'model.safetensors'))
    assert student.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in student.state_dict().items())
    assert student(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    if name != 'plain':  # of which the fixture holds no checkpoint
        (tmp_path / 'last.pth.tar').write_bytes(lzma.decompress(Path(RUNS, name, 'last.pth.tar.xz').read_bytes()))
        checkpoint = torch.load(tmp_path / 'last.pth.tar', weights_only=False)
        expected = checkpoint.get('state_dict_ema') or checkpoint['state_dict']
        assert all(torch.equal(tensor, expected[key]) for key, tensor in weights.items())
