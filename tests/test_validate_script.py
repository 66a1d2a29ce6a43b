"""validate.py: plain models, students, training checkpoints, and what it reports of them."""

import csv
import json
import os
import shutil

import pytest
import timm
import torch
from sklearn.metrics import f1_score, precision_score, recall_score

from programs import run, run_on_two, summary, train
from test_datasets import damage, write_folder, write_image
from timm_gpd.training.data import loaders
from timm_gpd.training.validation_metrics import read_valid_labels


@pytest.fixture(scope='module')
def averaged(tmp_path_factory):
    """A run with a dynamic teacher and moving averages of both, which lag behind."""
    folder = tmp_path_factory.mktemp('averaged')
    train(folder, '--experiment', 'run', '--model-ema', '--model-ema-decay', '0.5', '--gpd-branches', '2')
    return folder / 'run'


def validate(*arguments, **kwargs):
    result = run('validate.py', '--device', 'cpu', '--workers', '0', *arguments, **kwargs)
    return json.loads(result.stdout.partition('--result\n')[2]) if not result.stdout == '' else result


def digits(folder, *arguments, **kwargs):
    """Validates on the images that the run in a folder was validated on."""
    data = ['--dataset', 'digits', '--data-dir', folder.parent.parent / 'data', '--digits-train-size', '100']
    return validate(*data, *arguments, **kwargs)


def student_flags(folder):
    """The model of a run, as its configuration has it."""
    config = json.loads((folder / 'student' / 'config.json').read_text())
    cfg = config['pretrained_cfg']
    size = [str(number) for number in cfg['input_size']]
    flags = ['--model', config['architecture'], '--num-classes', '10', '--input-size', *size]
    flags += ['--mean', *map(str, cfg['mean']), '--std', *map(str, cfg['std']), '--crop-pct', str(cfg['crop_pct'])]
    kwargs = [f'{name}={value}'.replace(' ', '') for name, value in config.get('model_args', {}).items()]
    return flags + ['--interpolation', cfg['interpolation'], *(['--model-kwargs', *kwargs] if kwargs else [])]


def test_every_model_of_a_run_has_the_metrics_that_training_wrote(averaged):
    row = summary(averaged)[-1]
    last, flags = averaged / 'last.pth.tar', student_flags(averaged)
    student = digits(averaged, '--checkpoint', last, *flags, '--use-ema')
    teacher = digits(averaged, '--checkpoint', last, *flags, '--use-ema', '--use-teacher')
    for results, prefix in ((student, ''), (teacher, 'teacher_')):
        for name in ('top1', 'top5', 'loss'):
            assert results[name] == pytest.approx(float(row[f'eval_{prefix}{name}']), abs=1e-3), (prefix, name)
    assert teacher['param_count'] > 2 * student['param_count']
    plain = digits(averaged, '--checkpoint', last, *flags)
    assert plain['loss'] != student['loss']  # what is trained, not its average
    folder = digits(averaged, '--model', f'local-dir:{averaged}/student')
    file = digits(averaged, *flags, '--checkpoint', averaged / 'student' / 'model.safetensors')
    assert folder['top1'] == file['top1'] == student['top1'] and folder['loss'] == file['loss'] == student['loss']
    assert list(folder) == [
        *('model', 'loss', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct'),
        'interpolation',
    ]
    assert folder['top1'] + folder['top1_err'] == pytest.approx(100)


def test_without_a_checkpoint_weights_are_the_pretrained_ones(averaged, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    result = digits(averaged, '--model', 'test_resnet', '--num-classes', '10', code=2)
    assert 'these are the pretrained weights of test_resnet' in result.stderr
    assert result.stderr.splitlines()[-1].startswith('validate.py: error: ')
    result = digits(averaged, '--model', 'resnet10t_gpd', '--num-classes', '10', code=2)
    assert 'resnet10t_gpd has no published weights' in result.stderr


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--model test_resnet --checkpoint {run}/none.pth', 'does not exist: check --checkpoint'),
        ('--model test_resnet --checkpoint {run}/summary.csv', 'cannot be read as a checkpoint'),
        ('--model test_resnet --checkpoint {tmp}', 'holds no checkpoints, which are called *.pth.tar'),
        ('--model test_resnet --num-classes 7 --checkpoint {run}/last.pth.tar', 'which is of --model test_resnet'),
        (
            '--model test_vit --num-classes 10 --checkpoint {run}/last.pth.tar',
            'Missing key(s) in state_dict: "cls_token"',
        ),
        ('--model local-dir:{run}/student --test-pool --input-size 1 64 64', 'leave out --test-pool'),
        ('--model resnet19', '--model resnet19 is unknown: models of names like it are'),
        ('--model test_resnet --checkpoint {plain} --use-ema', 'holds no averaged weights'),
        ('--model test_resnet --checkpoint {plain} --use-teacher', 'holds no dynamic teacher'),
        (
            '--model local-dir:{run}/student --split other',
            "no folder of the split 'other': it has test, train",
        ),
        ('--model local-dir:{run}/student --valid-labels {labels}', "line 2 of {labels} is '12', and no index of 10"),
        ('--model local-dir:{run}/student --real-labels {labels}', 'check --real-labels and --data-dir'),
        ('--model local-dir:{run}/student --results-file {tmp}/no/file', 'cannot be written'),
    ],
)
def test_bad_input_is_one_line(averaged, tmp_path, flags, message):
    (tmp_path / 'labels').write_text('1\n12\n')
    plain = tmp_path / 'plain' / 'model.pth'
    plain.parent.mkdir()
    torch.save(timm.create_model('test_resnet').state_dict(), plain)
    empty = tmp_path / 'empty'
    empty.mkdir()
    places = dict(run=averaged, tmp=empty, plain=plain, labels=tmp_path / 'labels')
    result = digits(averaged, *flags.format(**places).split(), code=2)
    error = result.stderr.splitlines()[-1]
    assert error.startswith('validate.py: error: ') and message.format(**places) in error
    assert 'Traceback' not in result.stderr


def test_several_models_and_files_of_results(averaged, tmp_path):
    flags, table = student_flags(averaged), tmp_path / 'results.csv'
    results = digits(averaged, *flags, '--checkpoint', averaged, '--results-file', table)
    assert [os.path.basename(result['checkpoint']) for result in results[:1]] != []
    assert {os.path.basename(result['checkpoint']) for result in results} >= {'last.pth.tar', 'model_best.pth.tar'}
    assert [result['top1'] for result in results] == sorted((result['top1'] for result in results), reverse=True)
    with open(table, newline='') as file:
        rows = list(csv.DictReader(file))
    assert [float(row['top1']) for row in rows] == [result['top1'] for result in results]
    (tmp_path / 'models.txt').write_text(f'local-dir:{averaged}/student\n\nlocal-dir:{tmp_path}/none\n')
    kept = tmp_path / 'results.json'
    flags = ['--model', tmp_path / 'models.txt', '--results-file', kept, '--results-format', 'json']
    assert digits(averaged, *flags) == json.loads(kept.read_text())
    assert [result['model'] for result in json.loads(kept.read_text())] == [f'local-dir:{averaged}/student']
    one = digits(averaged, '--model', f'local-dir:{averaged}/student', *flags[2:])
    assert one == json.loads(kept.read_text()) and one['model'] == f'local-dir:{averaged}/student'


def test_retry_takes_smaller_batches(averaged, monkeypatch):
    tried = []

    def create_eval_loader(args, *rest):
        tried.append(args.batch_size)
        if args.batch_size > 100:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return original(args, *rest)

    original = loaders.create_eval_loader
    monkeypatch.setattr(loaders, 'create_eval_loader', create_eval_loader)
    model = ['--model', f'local-dir:{averaged}/student']
    assert digits(averaged, *model, '--retry')['top1'] > 0
    assert tried == [256, 192, 128, 96]
    result = digits(averaged, *model, code=2)
    assert result.stderr.splitlines()[-1] == (
        'validate.py: error: out of memory with batches of 256: lower --batch-size, which --retry does; or compute in '
        'lower precision, by --amp'
    )


@pytest.fixture(scope='module')
def pets(tmp_path_factory):
    """Images of three classes, and a model of five, as a folder."""
    root = write_folder(tmp_path_factory.mktemp('pets'), val='ant bee cat', count=7)
    for index in range(21):
        os.rename(
            root / 'val' / ('ant', 'bee', 'cat')[index // 7] / f'{index % 7}.png',
            root / 'val' / ('ant', 'bee', 'cat')[index // 7] / f'ILSVRC2012_val_{index + 1:08d}.JPEG',
        )
    torch.manual_seed(3)
    model = timm.create_model('test_vit', num_classes=5, img_size=32)
    torch.save(model.state_dict(), root / 'model.pth')
    return root, model.eval()


MODEL = ['--model', 'test_vit', '--num-classes', '5', '--img-size', '32', '--model-kwargs', 'img_size=32']


def outputs_of(pets, batch_size=64):
    """Logits and labels, computed without any of the program."""
    root, model = pets
    config = timm.data.resolve_data_config({'img_size': 32}, model=model)
    dataset = timm.data.ImageDataset(str(root / 'val'))
    loader = timm.data.create_loader(
        dataset, config['input_size'], batch_size, interpolation=config['interpolation'], mean=config['mean'],
        std=config['std'], crop_pct=config['crop_pct'], num_workers=0, device=torch.device('cpu'),
    )  # fmt: skip
    with torch.no_grad():
        batches = [(model(images), target) for images, target in loader]
    return [torch.cat(part) for part in zip(*batches)]


def test_some_classes_reassessed_labels_and_averages(pets, tmp_path):
    root, _ = pets
    output, target = outputs_of(pets)
    common = [*MODEL, '--data-dir', root, '--checkpoint', root / 'model.pth', '-b', '8']

    plain = validate(*common, '--metrics-avg', 'macro')
    predicted = output.argmax(-1)
    assert plain['top1'] == pytest.approx(100 * (predicted == target).float().mean().item(), abs=1e-3)
    assert plain['loss'] == pytest.approx(torch.nn.functional.cross_entropy(output, target).item(), abs=1e-4)
    for name, score in (('precision', precision_score), ('recall', recall_score), ('f1_score', f1_score)):
        expected = 100 * score(target, predicted, average='macro', zero_division=0)
        assert plain[f'macro_{name}'] == pytest.approx(expected, abs=1e-3)

    (tmp_path / 'valid.txt').write_text('4\n0\n2\n')
    some = validate(*common, '--valid-labels', tmp_path / 'valid.txt')
    expected = 100 * (output[:, [4, 0, 2]].argmax(-1) == target).float().mean().item()
    assert some['top1'] == pytest.approx(expected, abs=1e-3) and some['top5'] == 100
    assert read_valid_labels(str(tmp_path / 'valid.txt'), 5) == [4, 0, 2]

    labels = [[index % 5] if index % 4 else [] for index in range(21)]  # some images show nothing
    (tmp_path / 'real.json').write_text(json.dumps(labels))
    real = validate(*common, '--real-labels', tmp_path / 'real.json')
    right = [int(predicted[index]) in shown for index, shown in enumerate(labels) if shown]
    assert real['top1'] == pytest.approx(100 * sum(right) / len(right), abs=1e-3)
    assert real['loss'] == plain['loss']
    flat = tmp_path / 'flat' / 'validation'
    flat.mkdir(parents=True)
    for path in (root / 'val').rglob('*.JPEG'):
        (flat / path.name).write_bytes(path.read_bytes())
    common[common.index(root)] = tmp_path / 'flat'
    assert validate(*common, '--real-labels', tmp_path / 'real.json')['top1'] == real['top1']


def test_checkpoints_in_the_format_of_old_torch(pets):
    root, model = pets
    torch.save({'state_dict': model.state_dict()}, root / 'old.pth', _use_new_zipfile_serialization=False)
    common = [*MODEL, '--data-dir', root, '--checkpoint']
    assert validate(*common, root / 'old.pth')['loss'] == validate(*common, root / 'model.pth')['loss']


def test_unreadable_images_are_said(tmp_path):
    root = write_folder(tmp_path, val='ant bee', count=4)
    torch.save(timm.create_model('test_vit', num_classes=5, img_size=32).state_dict(), root / 'model.pth')
    damage(root / 'val' / 'ant' / '2.png', 'cut')
    common = [*MODEL, '--data-dir', root, '--checkpoint', root / 'model.pth']
    result = run('validate.py', '--device', 'cpu', '--workers', '0', *common, '--max-bad-images', '0.5')
    assert '1 of 8 images of the validation split could not be read' in result.stderr
    assert '1 of 8 images of the validation split cannot be read' in validate(*common, code=2).stderr


def test_two_processes_have_the_metrics_of_one(pets, tmp_path):
    root = shutil.copytree(pets[0], tmp_path / 'pets')
    write_image(root / 'val' / 'bee' / 'ILSVRC2012_val_00000022.JPEG', seed=30)
    write_image(root / 'val' / 'cat' / 'ILSVRC2012_val_00000023.JPEG', seed=31)  # 23 images: one is read twice
    labels = [[index % 5] if index % 4 else [] for index in range(23)]
    (tmp_path / 'real.json').write_text(json.dumps(labels))
    common = [*MODEL, '--data-dir', root, '--checkpoint', root / 'model.pth', '-b', '4', '--metrics-avg', 'micro']
    common += ['--real-labels', tmp_path / 'real.json', '--device', 'cpu', '--workers', '0']
    one = validate(*common)
    result = run_on_two(tmp_path, 'validate.py', *common, '--results-file', tmp_path / 'two.csv')
    two = json.loads(result.stdout.partition('--result\n')[2])
    assert two == pytest.approx(one, abs=1e-3)
    assert result.stdout.count('--result') == 1 and result.stderr.count('Model test_vit created') == 1
