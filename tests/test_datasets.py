"""Splits, classes, labels and images that are not what they should be do not pass without a word."""

import dataclasses
import io
import logging
import pickle
import random
import re
import tarfile
import traceback

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from timm.data.dataset import IterableImageDataset

from programs import run
from timm_gpd.errors import DataError, UsageError
from timm_gpd.training.args import parse_train_args, parse_validate_args
from timm_gpd.training.data.datasets import create_split, resolve_data
from timm_gpd.training.data.images import CheckedImages, LabelRange, LabelSet, report_bad_images
from timm_gpd.training.processes import Processes
from timm_gpd.training.student import InputConfig

ALONE = Processes(torch.device('cpu'))
INPUT = InputConfig((3, 8, 8), (0.5,) * 3, (0.5,) * 3, 'bilinear', 1.0)


def write_image(path, seed=0, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (size, size, 3), dtype=np.uint8)).save(path)


def write_folder(root, count=2, **splits):
    """An image folder: for each split the names of its classes, each with ``count`` images."""
    for split, classes in splits.items():
        for name in classes.split():
            for index in range(count):
                write_image(root / split / name / f'{index}.png', index)
    return root


def args_of(root, *flags, parse=parse_train_args):
    return parse(['--data-dir', str(root), '--num-classes', '10', *map(str, flags)])


def datasets_of(args, num_classes=10):
    source = resolve_data(args)
    return [
        create_split(args, source, INPUT, num_classes, split, is_training=False)
        for split in (args.train_split, args.val_split)
    ]


def labels_of(dataset):
    return {dataset.filename(i).split('/')[0]: dataset[i][1] for i in range(len(dataset))}


def error_of(loader, then=lambda: None):
    """What is wrong with data, as it is loaded or afterwards.

    The frames of the error, which hold it and the loader, are cleared: the garbage collector would wait for processes.
    """
    try:
        list(loader)
        then()
    except DataError as error:
        traceback.clear_frames(error.__traceback__)
        return str(error)
    pytest.fail('nothing is wrong')


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--train-split', 'trian'], "no folder of the split 'trian': it has test, train, val"),
        (['--val-split', 'tset'], "no folder of the split 'tset': it has test, train, val"),
        (['--train-split', 'train[:10%]'], 'is a part of a split'),
        (['--dataset', 'digit'], '--dataset digit is not one of digits, glyphs, torch/<name>, hfds/<name>'),
        (['--dataset', 'torhc/cifar10'], 'is not one of digits, glyphs, torch/<name>'),
        (['--dataset', 'torch/cifar11'], 'choose of cifar10, cifar100'),
        (['--dataset', 'torch/cifar10', '--train-split', 'trian'], "torch/cifar10 has no split 'trian'"),
        (['--dataset', 'torch/image_folder', '--val-split', 'tset'], "no folder of the split 'tset'"),
        (['--target-key', 'label'], '--target-key is for datasets of samples with fields'),
        (['--task', 'multilabel'], '--task multilabel needs a dataset of several labels'),
        (['--class-map', 'none.txt'], 'Cannot locate specified class map file'),
        (['--class-map', 'map.csv'], 'Unsupported class map file extension'),
        (['--class-map', 'map.pkl'], 'check --class-map'),
        (['--class-map', 'short.txt'], 'has classes that the class map lacks: cow'),
        (['--class-map', 'blank.txt'], 'has an empty line'),
        (['--class-map', 'words.pkl'], 'has no index for cat'),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(tmp_path, flags, message):
    root = write_folder(tmp_path, train='cat cow', val='cat cow', test='cat')
    (root / 'train' / 'map.csv').write_text('cat,0')
    (root / 'train' / 'map.pkl').write_bytes(b'no pickle')
    (root / 'train' / 'short.txt').write_text('cat\n')
    (root / 'train' / 'blank.txt').write_text('cat\n\ncow\n')
    (root / 'train' / 'words.pkl').write_bytes(pickle.dumps({'cat': 'zero', 'cow': 1}))
    with pytest.raises(UsageError) as error:
        resolve_data(args_of(root, *flags))
    assert message in str(error.value) and '\n' not in str(error.value)


def test_splits_are_found_by_the_names_that_timm_takes_for_one_another(tmp_path):
    root = write_folder(tmp_path, training='cat', eval='cat')
    assert [len(dataset) for dataset in datasets_of(args_of(root))] == [2, 2]
    assert resolve_data(args_of(root)).split_folders == {
        'train': str(root / 'training'),
        'validation': str(root / 'eval'),
    }


def test_a_folder_of_classes_is_a_split_by_itself(tmp_path):
    root = write_folder(tmp_path, val='cat cow')
    args = args_of(root / 'val', parse=parse_validate_args)
    assert resolve_data(args).split_folders == {'validation': str(root / 'val')}
    with pytest.raises(UsageError, match="no folder of the split 'train': it has cat, cow"):
        resolve_data(args_of(root / 'val'))  # it would train on what it validates on
    with pytest.raises(UsageError, match="no folder of the split 'validation': it has train"):
        resolve_data(args_of(write_folder(tmp_path / 'other', train='cat'), parse=parse_validate_args))


@pytest.mark.parametrize(
    'train, val, message',
    [
        ('a b c', 'a b x', 'val has classes that .*train lacks: x'),  # renamed
        ('a c', 'a b c', 'val has classes that .*train lacks: b'),  # missing in the middle
    ],
)
def test_classes_that_training_lacks_are_refused(tmp_path, train, val, message):
    with pytest.raises(UsageError, match=message):
        resolve_data(args_of(write_folder(tmp_path, train=train, val=val)))


def test_validation_on_some_classes_keeps_their_numbers(tmp_path, caplog):
    root = write_folder(tmp_path, train='c10 c2 c1', val='c10 c1')
    with caplog.at_level(logging.WARNING):
        train, val = datasets_of(args_of(root))
    assert labels_of(train) == {'c1': 0, 'c2': 1, 'c10': 2}  # timm's order of numbers in names
    assert labels_of(val) == {'c1': 0, 'c10': 2}
    assert 'val has no images of 1 of 3 classes: c2' in caplog.text
    plain = ImageDataset(str(root / 'train'))
    assert labels_of(plain) == labels_of(train)


@pytest.mark.parametrize('folder', ['', 'val'])
def test_validate_numbers_classes_as_training_does(tmp_path, caplog, folder):
    root = write_folder(tmp_path, train='c10 c2 c1', val='c10 c1')
    args = args_of(root / folder, parse=parse_validate_args)

    def numbers(num_classes):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            split = create_split(args, resolve_data(args), INPUT, num_classes, args.val_split, is_training=False)
        return labels_of(split)

    assert numbers(3) == {'c1': 0, 'c10': 2}
    assert 'val has no images of 1 of 3 classes: c2' in caplog.text
    (root / 'train').rename(root / 'elsewhere')
    assert numbers(3) == {'c1': 0, 'c10': 1}
    assert 'the validation split has 2 classes and the model 3: they are its first ones' in caplog.text
    assert numbers(2) == {'c1': 0, 'c10': 1} and not caplog.text
    write_folder(root, train='c1 c2')
    with pytest.raises(UsageError, match='val has classes that .*train lacks: c10'):
        resolve_data(args)


def test_a_class_map_numbers_both_splits(tmp_path):
    root = write_folder(tmp_path, train='cat cow', val='cow')
    (tmp_path / 'map.txt').write_text('dog\ncow\ncat\n')
    train, val = datasets_of(args_of(root, '--class-map', tmp_path / 'map.txt'))
    assert labels_of(train) == {'cow': 1, 'cat': 2} and labels_of(val) == {'cow': 1}
    with pytest.raises(UsageError, match='label 2 and the model 2 classes|3 classes and the model 2'):
        datasets_of(args_of(root, '--class-map', tmp_path / 'map.txt'), num_classes=2)
    (tmp_path / 'far.pkl').write_bytes(pickle.dumps({'cat': 0, 'cow': 12}))
    with pytest.raises(UsageError, match='the label 12 and the model 10 classes'):
        datasets_of(args_of(root, '--class-map', tmp_path / 'far.pkl'))


def test_empty_class_folders_and_images_outside_of_any_are_refused(tmp_path):
    root = write_folder(tmp_path, train='cat cow', val='cat cow')
    (root / 'val' / '.ipynb_checkpoints').mkdir()
    assert len(datasets_of(args_of(root))) == 2
    (root / 'train' / 'dog').mkdir()
    (root / 'train' / 'dog' / '1.gif').write_bytes(b'')
    with pytest.raises(UsageError, match='train has folders without images that timm reads: dog'):
        resolve_data(args_of(root))
    write_image(root / 'train' / 'dog' / '1.png')
    write_image(root / 'val' / 'lost.png')
    with pytest.raises(UsageError, match='val has images outside of class folders'):
        resolve_data(args_of(root))


def test_more_classes_than_the_model_has_are_refused(tmp_path):
    root = write_folder(tmp_path, train='a b c', val='a')
    with pytest.raises(UsageError, match='the train split has 3 classes and the model 2: set --num-classes'):
        datasets_of(args_of(root), num_classes=2)


class Stream:
    """A reader whose labels nobody can list."""

    def __init__(self, labels):
        self.labels = labels

    def __iter__(self):
        for label in self.labels:
            yield Image.new('RGB', (8, 8)), label

    def __len__(self):
        return len(self.labels)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('label', [10, -1])
def test_labels_of_a_stream_are_checked_as_they_come(workers, label):
    dataset = IterableImageDataset('', reader=Stream([0, 9, label, 3]))
    dataset.target_transform = LabelRange(10, 'train')
    loader = create_loader(dataset, (3, 8, 8), 2, num_workers=workers, device=torch.device('cpu'))
    assert error_of(loader) == (
        f'the train split has the label {label} and the model 10 classes, from 0 on: set --num-classes, or --class-map'
    )


@pytest.mark.parametrize(
    'labels, dense, message',
    [
        ([[0], [1, 10]], False, r'a target of the train split is wrong: .*\[0, 10\)'),
        ([[0.5] * 10, [0.5] * 9], True, 'must have 10 entries, got 9'),
        ([[0.0] * 10, [2.0] * 10], True, r'must be in \[0, 1\]'),
        ([3, 4], False, 'must be a 1-D sequence'),
    ],
)
def test_targets_of_several_labels_are_checked_as_they_come(labels, dense, message):
    dataset = IterableImageDataset('', reader=Stream(labels))
    dataset.target_transform = LabelSet(10, 'train', dense)
    loader = create_loader(dataset, (3, 8, 8), 2, num_workers=1, device=torch.device('cpu'))
    error = error_of(loader)
    assert re.search(message, error) and '\n' not in error


def test_several_labels_become_a_number_per_class():
    encode = LabelSet(4, 'train', dense=False)
    assert encode([0, 2]).tolist() == [1, 0, 1, 0] and encode([]).tolist() == [0, 0, 0, 0]
    assert LabelSet(3, 'train', dense=True)([0.25, 0, 1]).tolist() == [0.25, 0, 1]


def test_image_folders_of_torchvision(tmp_path):
    root = write_folder(tmp_path, train='c10 c2', val='c10 c2')
    flags = ['--dataset', 'torch/image_folder']
    train, val = datasets_of(args_of(root, *flags))
    assert train.class_to_idx == val.class_to_idx == {'c10': 0, 'c2': 1} and val[0][1] == 0
    with pytest.raises(UsageError, match='the train split has 2 classes and the model 1'):
        datasets_of(args_of(root, *flags), num_classes=1)
    write_image(root / 'train' / 'c3' / '1.png')
    with pytest.raises(UsageError, match='have different classes, which torch/image_folder numbers in each'):
        resolve_data(args_of(root, *flags))


def test_one_file_is_one_split(tmp_path):
    root = write_folder(tmp_path, train='cat cow')
    with tarfile.open(tmp_path / 'images.tar', 'w') as tar:
        tar.add(root / 'train', 'images')
    with pytest.raises(UsageError, match='is one file, which has no splits'):
        resolve_data(args_of(tmp_path / 'images.tar'))
    args = args_of(tmp_path / 'images.tar', parse=parse_validate_args)
    dataset = create_split(args, resolve_data(args), INPUT, 2, 'validation', is_training=False)
    assert [dataset[index][1] for index in range(4)] == [0, 0, 1, 1]
    with pytest.raises(UsageError, match='has 2 classes and the model 1'):
        create_split(args, resolve_data(args), INPUT, 1, 'validation', is_training=False)


def test_images_have_the_channels_of_the_model(tmp_path):
    root = write_folder(tmp_path, train='cat', val='cat')
    with pytest.raises(UsageError, match='--input-img-mode CMYK has 4 channels, and the model 3'):
        datasets_of(args_of(root, '--input-img-mode', 'CMYK'))
    args = args_of(root)
    with pytest.raises(UsageError, match='the model takes 4 channels: set --input-img-mode RGBA or CMYK'):
        create_split(
            args, resolve_data(args), dataclasses.replace(INPUT, input_size=(4, 8, 8)), 10, 'train', is_training=False
        )


def damage(path, kind):
    data = path.read_bytes()
    path.write_bytes({'empty': b'', 'cut': data[: len(data) // 2], 'text': b'no image' * 9}[kind])


def loader_of(dataset, workers):
    return create_loader(dataset, (3, 8, 8), 4, num_workers=workers, device=torch.device('cpu'), is_training=False)


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_are_counted_once_an_epoch(tmp_path, caplog, workers):
    root = write_folder(tmp_path, train='cat cow', val='cat', count=10)
    bad = {'cat/3.png': 'cut', 'cow/0.png': 'empty', 'cow/1.png': 'text'}
    for name, kind in bad.items():
        damage(root / 'train' / name, kind)
    train, val = datasets_of(args_of(root, '--max-bad-images', '0.2'))
    loaders = [loader_of(dataset, workers) for dataset in (train, val)]
    seen = []
    for epoch in range(2):  # the second one with the processes of the first
        seen.append([labels.tolist() for _, labels in loaders[0]])
        list(loaders[1])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            report_bad_images(ALONE, epoch, *loaders)
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f'Epoch {epoch}: 3 of 20 images of the train split could not be read')
        assert 'the first is cat/3.png (image file is truncated' in line
    caplog.clear()
    report_bad_images(ALONE, 2, *loaders)
    assert not caplog.records
    plain = loader_of(ImageDataset(str(root / 'train')), 0)
    assert seen == [[labels.tolist() for _, labels in plain]] * 2  # what takes their places is timm's choice


@pytest.mark.parametrize('workers', [0, 2])
def test_too_many_unreadable_images_end_the_run(tmp_path, workers):
    root = write_folder(tmp_path, train='cat', val='cat', count=20)
    damage(root / 'train' / 'cat' / '4.png', 'cut')
    damage(root / 'train' / 'cat' / '9.png', 'cut')
    args = args_of(root, '--max-bad-images', '0.05')
    train, _ = datasets_of(args)
    loader = loader_of(train, workers)
    error = error_of(loader, lambda: report_bad_images(ALONE, 0, loader))
    assert '2 of 20 images of the train split cannot be read' in error
    assert '--max-bad-images 0.05' in error and '\n' not in error
    for index in range(20):
        damage(root / 'train' / 'cat' / f'{index}.png', 'empty')
    dataset = CheckedImages(ImageDataset(str(root / 'train')), 'train', max_bad=1.0)
    with pytest.raises(DataError, match='10 images in a row cannot be read'):
        dataset[0]


@pytest.mark.filterwarnings('ignore')  # PIL's, of files that are wrong
@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'WEBP', 'TIFF', 'PPM'])
def test_whatever_is_wrong_with_a_file_is_counted(tmp_path, format):
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (16, 16, 3), dtype=np.uint8)).save(file, format)
    whole, bad = file.getvalue(), 0
    suffix = {'JPEG': 'jpg'}.get(format, format.lower())
    write_folder(tmp_path, train='cat', count=1)
    path = tmp_path / 'train' / 'dog' / f'0.{suffix}'
    path.parent.mkdir()
    path.write_bytes(whole)
    dataset = CheckedImages(
        ImageDataset(str(tmp_path / 'train'), reader=None, input_key=f'.png;.{suffix}'), 'train', max_bad=1.0
    )
    for seed in range(150):
        random.seed(seed)
        data = bytearray(whole)
        for _ in range(random.randint(1, 8)):
            data[random.randrange(min(len(data), 400))] = random.randrange(256)
        path.write_bytes(data[: random.randint(1, len(data))] if seed % 3 == 0 else data)
        image, label = dataset[1]
        if dataset.marks[1]:
            bad += 1
            assert label == 0  # the other image's
        assert image.mode == 'RGB'
        dataset.marks.zero_()
    assert bad > 10


def test_a_run_says_which_images_it_could_not_read(tmp_path):
    root = write_folder(tmp_path / 'pets', train='cat dog', validation='cat dog', count=8)
    damage(root / 'train' / 'dog' / '5.png', 'cut')
    flags = ['--model', 'test_resnet', '--num-classes', '2', '--epochs', '2', '--batch-size', '8', '--device', 'cpu']
    flags += ['--workers', '0', '--img-size', '32', '--output', tmp_path / 'out']
    result = run('train.py', root, *flags, '--experiment', 'a', '--max-bad-images', '0.1')
    lines = [line for line in result.stderr.splitlines() if 'could not be read' in line]
    assert len(lines) == 2 and all('1 of 16 images of the train split' in line for line in lines), result.stderr
    result = run('train.py', root, *flags, '--experiment', 'b', code=2)
    assert result.stderr.splitlines()[-1].startswith('train.py: error: 1 of 16 images of the train split cannot be')
