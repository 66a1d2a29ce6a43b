"""Errors keep their reason, on one line, and say which file or flag it is about."""

import os

import pytest
import timm
import torch

from programs import ROOT, train
from timm_gpd.errors import DataError, UsageError, one_line
from timm_gpd.training.args import parse_train_args, parse_validate_args
from timm_gpd.training.memory import is_out_of_memory, memory_errors


def test_lists_of_names_are_shortened_and_shapes_stay():
    model = timm.create_model('test_resnet', num_classes=10)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(timm.create_model('test_efficientnet', num_classes=10).state_dict())
    line = one_line(error.value)
    assert 'Missing key(s) in state_dict: "conv1.0.weight", "conv1.1.weight", "conv1.1.bias" and ' in line
    assert 'Unexpected key(s) in state_dict: "conv_stem.weight"' in line and len(line) <= 700 and '\n' not in line
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(timm.create_model('test_resnet', num_classes=7).state_dict())
    assert 'size mismatch for fc.weight' in one_line(error.value) and '[7, 96]' in one_line(error.value)
    assert one_line(ValueError()) == 'ValueError'
    long = one_line(ValueError('begin ' + 'x ' * 2000 + 'end'), length=300)
    assert len(long) < 320 and long.startswith('begin') and long.endswith('end')


def test_an_error_of_a_worker_process_is_its_message():
    error = DataError('label 12 is too large')
    trace = 'Caught DataError in DataLoader worker process 0.\nOriginal Traceback:\n  file, line 3'
    assert str(DataError(f'{trace}\ntimm_gpd.errors.DataError: {error}\n')) == 'label 12 is too large'


@pytest.mark.parametrize(
    'flags, parts',
    [
        (['--initial-checkpoint', 'OTHER'], ['OTHER', 'Missing key(s)', 'Unexpected key(s) in state_dict: "conv_stem']),
        (['--initial-checkpoint', 'CLASSES'], ['CLASSES', 'size mismatch for fc.weight', 'torch.Size([7, 64])']),
        (['--initial-checkpoint', 'BROKEN'], ['BROKEN']),
        (['--initial-checkpoint', 'MISSING'], ['--initial-checkpoint MISSING does not exist']),
        (['--kd-model-name', 'test_resnet', '--kd-model-path', 'OTHER'], ['OTHER', 'Missing key(s)', 'test_resnet']),
        (['--resume', 'RUN', '--gpd-ratio', '3'], ['RUN', "'ratio': 2", "'ratio': 3"]),
        (['--resume', 'RUN', '--gpd-branches', '2'], ['RUN', "'branches': ['kxk']"]),
        (['--resume', 'RUN', '--model', 'test_resnet', '--model-kwargs', 'stem_width=8'], ['RUN', 'size mismatch']),
        (
            ['--resume', 'RUN', '--model', 'test_efficientnet', '--model-kwargs'],
            ['RUN', 'test_efficientnet', 'Missing'],
        ),
        (['--resume', 'OTHER'], ['OTHER', '--initial-checkpoint']),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told_apart(trained, tmp_path, flags, parts):
    folder, _ = trained
    places = {name: str(tmp_path / f'{name.lower()}.pth.tar') for name in ('OTHER', 'CLASSES', 'BROKEN', 'MISSING')}
    places['RUN'] = str(folder / 'last.pth.tar')
    torch.save({'state_dict': timm.create_model('test_efficientnet').state_dict()}, places['OTHER'])
    args = parse_train_args(['-c', os.path.join(ROOT, 'configs', 'digits_gpd.yaml')])
    classes = timm.create_model('test_resnet', num_classes=7, in_chans=1, **args.model_kwargs)
    torch.save(classes.state_dict(), places['CLASSES'])
    with open(places['BROKEN'], 'wb') as file:
        file.write(b'nothing')
    result = train(folder.parent, '--experiment', 'other', *(places.get(flag, flag) for flag in flags), code=2)
    error = result.stderr.splitlines()[-1]
    assert error.startswith('train.py: error: ') and 'Traceback' not in result.stderr
    for part in parts:
        for name, place in places.items():
            part = part.replace(name, place)
        assert part in error, error


@pytest.mark.parametrize(
    'error',
    [
        torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB'),
        RuntimeError(
            '[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes'
        ),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError('MPS backend out of memory (MPS allocated: 9 GB)'),
        RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower(error):
    args = parse_train_args('--data-dir x --gpd --gpd-ratio 4 --gpd-branches 6 --grad-accum-steps 2'.split())
    with pytest.raises(UsageError) as raised, memory_errors(args, 64):
        raise error
    assert str(raised.value) == (
        'out of memory with batches of 64: lower --batch-size, and raise --grad-accum-steps (2) as many times; or '
        'compute activations twice, by --grad-checkpointing; or compute in lower precision, by --amp; or lower '
        '--gpd-ratio (4) or --gpd-branches (6)'
    )
    with pytest.raises(UsageError, match='which --retry does$'), memory_errors(parse_validate_args(['--amp']), 64):
        raise error


def test_a_worker_process_that_was_killed_says_what_to_lower():
    args = parse_train_args(['--data-dir', 'x', '-j', '7'])
    with pytest.raises(UsageError, match='is killed by signal: Killed. .*lower --workers, 7'), memory_errors(args, 64):
        raise RuntimeError('DataLoader worker (pid 123) is killed by signal: Killed. ')


def test_memory_that_torch_really_lacks():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    with pytest.raises(RuntimeError, match='shapes'), memory_errors(parse_train_args(['--data-dir', 'x']), 1):
        raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')


def test_a_run_that_lacks_memory_says_so(tmp_path, monkeypatch):
    def step(self, input, target):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')

    monkeypatch.setattr('timm_gpd.task.gap_preserving.GapPreservingTask.forward', step)
    result = train(tmp_path, '--experiment', 'run', code=2)
    assert result.stderr.splitlines()[-1].startswith('train.py: error: out of memory with batches of ')
