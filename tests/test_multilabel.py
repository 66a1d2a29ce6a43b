"""Images of several classes, from the data set to the metrics, by the programs."""

import io
import json

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader import Reader

import timm_gpd.training.data.datasets as datasets
from programs import run, summary

METRICS = ('map', 'micro_f1', 'macro_f1', 'sample_f1')
LABELS = [[], [0], [1], [0, 1], [2], [0, 2], [1, 2], [0, 1, 2]]


class _Bars(Reader):
    """Gray images of up to three bright bars; a class is a bar that is there."""

    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        pixels = np.full((32, 32), 60, dtype=np.uint8)
        for label in LABELS[index]:
            pixels[:, 10 * label : 10 * label + 8] = 220
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, 'PNG')
        file.seek(0)
        target = [float(label in LABELS[index]) for label in range(3)] if self.dense else LABELS[index]
        return file, target

    def _filename(self, index, basename=False, absolute=False):
        return f'bars-{index}'


@pytest.fixture
def bars(monkeypatch):
    """Makes every Hugging Face data set one of bars; returns what it was asked for."""
    asked = []

    def create_dataset(name, **settings):
        asked.append(settings)
        reader = _Bars(dense=settings.get('target_format') == 'multihot')
        return ImageDataset(name, reader=reader, input_img_mode=settings['input_img_mode'])

    monkeypatch.setattr(datasets, 'create_dataset', create_dataset)
    return asked


COMMON = (
    '--task multilabel --dataset hfds/bars --target-key labels --model test_resnet --num-classes 3 --in-chans 1 '
    '--img-size 32 --mean 0.5 --std 0.5 --device cpu --workers 0 --batch-size 8'
).split()


@pytest.mark.parametrize(
    'extra',
    [
        [],
        ['--target-format', 'multihot', '--mixup', '0.2', '--smoothing', '0.1', '--model-ema'],
        ['--gpd', '--gpd-loss', 'mse', '--loss', 'asl'],
    ],
    ids=['indices', 'multihot', 'gpd'],
)
def test_images_of_several_classes(tmp_path, bars, extra):
    training = '--no-aug --opt adamw --lr 3e-3 --epochs 20 --warmup-epochs 0 --val-interval 20'.split()
    run('train.py', *COMMON, *training, *extra, '--output', tmp_path, '--experiment', 'run')
    assert bars[0]['target_key'] == 'labels'
    assert ('target_format' in bars[0]) == ('--target-format' in extra)
    (row,) = summary(tmp_path / 'run')
    assert 'eval_top1' not in row and all(0 <= float(row[f'eval_{name}']) <= 100 for name in METRICS)
    if '--mixup' not in extra:
        assert float(row['eval_map']) > 90  # there are 8 images to learn
    if '--gpd' in extra:
        assert float(row['eval_gap']) == pytest.approx(float(row['eval_teacher_map']) - float(row['eval_map']))
    results = tmp_path / 'results.json'
    student = ['--model', f'local-dir:{tmp_path}/run/student', '--pretrained']
    form = ['--target-format', 'multihot'] if '--target-format' in extra else []
    printed = run('validate.py', *COMMON, *form, *student, '--results-file', results, '--results-format', 'json')
    found = json.loads(printed.stdout.split('--result\n')[1])
    assert json.loads(results.read_text())['map'] == found['map']
    assert found['map'] == pytest.approx(float(row['eval_map']), abs=1e-2)
    assert timm.create_model(f'local-dir:{tmp_path}/run/student', pretrained=True).num_classes == 3


def test_a_metric_of_one_class_is_none_of_several(tmp_path, bars):
    result = run('train.py', *COMMON, '--eval-metric', 'top1', '--output', tmp_path, code=2)
    (error,) = [line for line in result.stderr.splitlines() if line.startswith('train.py: error: ')]
    assert '--eval-metric top1' in error and 'map' in error
