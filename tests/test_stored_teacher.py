"""Stored outputs of static teachers: the same numbers, without the teacher."""

import copy
import logging
import multiprocessing
import pickle
import resource
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from programs import differences, quick_arguments, run_on_two, summary, train
from steps import batch
from teachers import TASKS, make_task, make_teacher
from timm_gpd import StaticTeacherConfig
from timm_gpd.distillers import ModelOutput
from timm_gpd.errors import InputError, UsageError
from timm_gpd.task import output_store
from timm_gpd.task.output_store import OutputStore
from timm_gpd.task.static_teacher import StaticTeacher
from timm_gpd.task.stored_teacher import _pack, _unpack, stored_teachers
from timm_gpd.training import teacher_stores
from timm_gpd.training.args import parse_train_args


@pytest.fixture
def calls(monkeypatch):
    """How often static teachers were run or checked, and on how many images."""
    counted = []
    for name in ('forward', 'verify'):
        method = getattr(StaticTeacher, name)

        def counting(self, x, *args, method=method, **kwargs):
            counted.append(len(x))
            return method(self, x, *args, **kwargs)

        monkeypatch.setattr(StaticTeacher, name, counting)
    return counted


@contextmanager
def disk_that_takes(size):
    """Within it no file grows beyond so many bytes: writes are cut off there, as by a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stored(folder, teacher=None, settings='kd', student=None, **kwargs):
    """A static teacher with a store, out of a task."""
    config = StaticTeacherConfig(teacher or make_teacher(), cache=str(folder), **kwargs)
    return make_task(TASKS[0], config, settings, student).static_teacher


def assert_same(actual, expected):
    assert len(actual.stages) == len(expected.stages) and (actual.embedding is None) == (expected.embedding is None)
    for one, other in zip(tensors_of(actual), tensors_of(expected)):
        assert one.dtype == other.dtype and torch.equal(one, other)
        assert one.dim() != 4 or one.stride() == other.stride()


def tensors_of(output):
    return [output.logits, *output.stages, *([] if output.embedding is None else [output.embedding])]


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def static(tmp_path_factory):
    """Flags of a static teacher that an earlier run has trained."""
    folder = tmp_path_factory.mktemp('teacher')
    train(folder, '--experiment', 'run', '--epochs', '1', config='digits')
    return ['--kd-model-name', f'local-dir:{folder / "run" / "student"}']


@pytest.fixture(scope='module')
def first(static, tmp_path_factory):
    """A run on images as they are that has filled a store: flags of that, the run's folder, and what it said."""
    folder = tmp_path_factory.mktemp('first')
    flags = [*static, '--no-aug', '--kd-cache', folder / 'cache']
    return flags, folder / 'run', train(folder, '--experiment', 'run', *flags, config='digits').stderr


def test_a_run_is_the_same_bit_for_bit_and_a_second_one_needs_no_teacher(first, tmp_path, calls):
    flags, folder, said = first
    assert 'for 300 images, 64 bytes each' in said and 'Every epoch shows other images' not in said
    assert 'outputs: 100 read from the store' in said and ', 301 computed' in said
    train(tmp_path, '--experiment', 'without', *flags[:-2], config='digits')
    assert calls and not differences(folder, tmp_path / 'without')
    calls.clear()
    second = train(tmp_path, '--experiment', 'second', *flags, config='digits')
    assert not calls and ', 0 computed' in second.stderr
    assert not differences(tmp_path / 'second', tmp_path / 'without')
    assert str(folder.parent) not in (tmp_path / 'second' / 'student' / 'README.md').read_text()


def test_so_it_is_of_augmented_and_mixed_images_and_with_a_dynamic_teacher(static, tmp_path, calls):
    flags = '--gpd --epochs 1 --mixup 0.5 --grad-accum-steps 2 --kd-distill-type dkd,nd,reviewkd'.split()
    store = ['--kd-cache', tmp_path / 'cache']
    train(tmp_path, '--experiment', 'without', *static, *flags, config='digits')
    first = train(tmp_path, '--experiment', 'first', *static, *flags, *store, config='digits')
    assert 'Every epoch shows other images' in first.stderr
    calls.clear()
    train(tmp_path, '--experiment', 'second', *static, *flags, *store, config='digits')
    assert not calls
    for name in ('first', 'second'):
        assert not differences(tmp_path / name, tmp_path / 'without')


def test_images_as_they_are_serve_every_other_run(first, tmp_path, calls):
    """Of another loss, batch size and learning rate, and with a dynamic teacher in some epochs."""
    other = '--gpd --gpd-epochs 1-2 --kd-distill-type dkd --lr 0.03 --batch-size 25'.split()
    second = train(tmp_path, '--experiment', 'second', *first[0], *other, config='digits')
    assert not calls and ': 19.2 kB. It holds 301.' in second.stderr
    assert summary(tmp_path / 'second')[0]['eval_static_top1'] == summary(first[1])[0]['eval_static_top1']


def test_a_run_that_goes_on_goes_on_with_its_store(first, tmp_path, calls):
    flags = ['--experiment', 'run', *first[0][:-1], tmp_path / 'cache']
    train(tmp_path, *flags, '--stop-epoch', '1', config='digits')
    calls.clear()
    train(tmp_path, *flags, '--resume', 'auto', config='digits')
    assert not calls and not differences(tmp_path / 'run', first[1])


def test_two_processes_fill_one_store(static, tmp_path):
    """In the second epoch each reads what the other has computed, and later one process what both have."""
    flags, store = [*static, '--no-aug', '--batch-size', '25'], ['--kd-cache', tmp_path / 'cache']
    of_two = [*quick_arguments(tmp_path, 'digits'), *flags, '--experiment']
    run_on_two(tmp_path, 'train.py', *of_two, 'without')
    result = run_on_two(tmp_path, 'train.py', *of_two, 'with', *store)
    assert not differences(tmp_path / 'with', tmp_path / 'without')
    # Computed are 100 images of training, 200 of validation, and the example, which the other process reads
    assert 'outputs: 101 read from the store' in result.stderr and ', 301 computed' in result.stderr
    segments = [path for path in (tmp_path / 'cache').glob('*/*.json') if path.stem != 'about']
    assert len(segments) == 2
    one = train(tmp_path, *flags, *store, '--experiment', 'one', config='digits')
    assert ', 0 computed' in one.stderr


@pytest.mark.parametrize('dataset', ['wds/x', 'tfds/x', 'hfids/x'])
@pytest.mark.parametrize('flags', [[], ['--no-aug', '--mixup', '0.2']])
def test_streams_of_augmented_images_are_refused(dataset, flags):
    command = ['--dataset', dataset, '--kd-model-name', 'resnet18', *flags]
    with pytest.raises(UsageError, match=f'--kd-cache .* of the stream {dataset} .* add --no-aug'):
        parse_train_args([*command, '--kd-cache', 'cache'])
    parse_train_args(command)
    parse_train_args(['--dataset', dataset, '--kd-model-name', 'resnet18', '--no-aug', '--kd-cache', 'cache'])


def test_a_disk_without_room_is_refused_before_anything_is_trained(static, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=300 * 64 - 65)  # the example image is there
    monkeypatch.setattr(teacher_stores.shutil, 'disk_usage', lambda path: full)
    flags = [*static, '--no-aug', '--kd-cache', tmp_path / 'cache', '--experiment', 'run']
    result = train(tmp_path, *flags, config='digits', code=2)
    assert 'would grow by 19.1 kB, outputs for 300 images, and its disk has 19.1 kB' in result.stderr.splitlines()[-1]
    assert not (tmp_path / 'run').exists()


def test_a_folder_that_is_none_is_one_line(static, tmp_path, caplog):
    (tmp_path / 'file').write_text('')
    flags = ['--kd-cache', tmp_path / 'file', '--experiment', 'run']
    result = train(tmp_path, *static, *flags, config='digits', code=2)
    assert 'cannot be used: Not a directory; choose another folder' in result.stderr.splitlines()[-1]
    parse_train_args(['--kd-cache', 'cache'])
    assert '--kd-cache does nothing without --kd-model-name' in caplog.text


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_a_batch_with_one_image_more_is_computed_whole_and_adds_that_one(tmp_path, calls):
    teacher, (x, _) = stored(tmp_path), batch()
    teacher(x[:-1])
    size = len(teacher.store)
    calls.clear()
    assert_same(teacher(x), teacher.static(x))
    assert calls == [8, 8] and len(teacher.store) == size + 1
    teacher(torch.cat([x[3:], x[3:]]))  # an image twice in a batch, as samplers fill up
    assert calls == [8, 8] and len(teacher.store) == size + 1
    other = torch.randn(2, 1, 32, 32)
    teacher(torch.cat([other, other]))
    assert calls == [8, 8, 4] and len(teacher.store) == size + 3


OTHERS = {
    'weights': lambda: dict(teacher=make_teacher(seed=6)),
    'one weight': lambda: dict(teacher=changed(lambda model: model.fc.bias.data[0].add_(1e-6))),
    'statistics of batch norm': lambda: dict(teacher=changed(lambda model: model.bn1.running_mean[0].add_(1e-3))),
    'a number that no weight tells': lambda: dict(teacher=changed(lambda model: setattr(model.bn1, 'eps', 1e-3))),
    'class': lambda: dict(teacher=changed(lambda model: setattr(model, '__class__', Negative))),
    'normalisation': lambda: dict(teacher=make_teacher(mean=0.25)),
    'image size': lambda: dict(img_size=48),
    'class map': lambda: dict(class_map=[1, 0, *range(2, 10)]),
    'dtype': lambda: dict(dtype=torch.bfloat16),
    'what losses need': lambda: dict(settings='nd'),
}


class Negative(type(make_teacher())):
    def forward(self, x):
        return -super().forward(x)


def changed(change):
    teacher = make_teacher()
    change(teacher)
    return teacher


@pytest.mark.parametrize('what', OTHERS)
def test_another_teacher_has_another_store(what, tmp_path, calls):
    first, (x, _) = stored(tmp_path), batch()
    first(x)
    other = stored(tmp_path, **OTHERS[what]())
    assert other.store.folder != first.store.folder
    calls.clear()
    other(x)
    assert calls == [8] and len(list(tmp_path.iterdir())) == 2
    assert stored(tmp_path).store.folder == first.store.folder


def test_of_several_each_has_a_store(tmp_path, calls):
    def several(**kwargs):
        models = make_teacher(), make_teacher('test_vit', img_size=32, seed=2)
        return make_task(TASKS[0], [StaticTeacherConfig(m, **kwargs) for m in models], 'kd,nd@2').static_teacher

    x, _ = batch()
    expected = several()(x)
    several(cache=str(tmp_path))(x)
    calls.clear()
    found = several(cache=str(tmp_path))
    output = found(x)
    assert not calls and len(stored_teachers(found)) == 2 and torch.equal(output.logits, expected.logits)
    for one, other in zip(output.each, expected.each):
        assert_same(one, other)


def test_mixed_precision_has_rows_of_its_own(tmp_path, calls):
    teacher, (x, _) = stored(tmp_path), batch()
    single = teacher(x)
    with torch.autocast('cpu', torch.bfloat16):
        half = teacher(x)
        assert torch.equal(teacher(x).logits, half.logits) and half.logits.dtype == torch.bfloat16
    assert torch.equal(teacher(x).logits, single.logits) and calls[-2:] == [8, 8]


def test_the_teacher_waits_in_the_cpus_memory_until_it_is_needed(tmp_path, calls, monkeypatch):
    x, _ = batch()
    first = stored(tmp_path)
    assert not first.is_parked
    first(x)
    second, moves = stored(tmp_path), []
    monkeypatch.setattr(second.static.teacher, 'to', moves.append)
    second(x)
    assert second.is_parked and not moves
    second(x + 1), second(x + 2)
    assert not second.is_parked and moves == [torch.device('cpu')]


@pytest.mark.usefixtures('may_change_settings')
def test_what_is_compiled_is_the_teacher(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(StaticTeacher, 'compile', lambda self, **kwargs: compiled.append((self, kwargs)))
    task = make_task(TASKS[0], StaticTeacherConfig(make_teacher(), cache=str(tmp_path)))
    task.get_trainable_module().compile = lambda **_: None
    task.compile(backend='eager')
    assert compiled == [(task.static_teacher.static, {'backend': 'eager', 'mode': None})]


@pytest.mark.parametrize('size', [32, 31, 5])
def test_keys_tell_all_images_apart(size, tmp_path):
    """Images of ones and zeros, which differ in the fewest bits: blank ones with one pixel, or two neighbours, lit."""
    teacher = stored(tmp_path)
    pixels = size * size
    lit = torch.eye(pixels)
    images = torch.cat([torch.zeros(1, pixels), lit, lit[:-1] + lit[1:]]).reshape(-1, 1, size, size)
    keys = teacher._keys(images)
    for word in keys.T:
        assert len(np.unique(word)) == len(images)
    for same in (images.to(memory_format=torch.channels_last), torch.cat([images[:3], images])[3:]):
        assert (teacher._keys(same) == keys).all()
    assert not (teacher._keys(images.half()) == keys).any()
    assert not (teacher._keys(images.reshape(-1, 1, 1, pixels)) == keys).any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_outputs_come_back_as_they_were(dtype):
    for count in (1, 3):
        stage = torch.randn(count, 4, 5, 3).to(dtype)
        last = torch.randn(count, 4, 2, 2).to(memory_format=torch.channels_last)
        output = ModelOutput(torch.randn(count, 7).to(dtype), (stage, last), torch.randn(count, 5).half())
        assert_same(_unpack(*_pack(output)), output)
    assert_same(_unpack(*_pack(ModelOutput(stage[:, 0, 0]))), ModelOutput(stage[:, 0, 0].clone()))


# -- stores -----------------------------------------------------------------------------------------------------------

KIND = [['logits', 'float32', [3], False]]


def rows_of(numbers, width=12):
    """Keys, and rows that tell whose they are."""
    numbers = np.asarray(numbers, np.uint64)
    keys = np.stack([numbers * np.uint64(0x9E3779B97F4A7C15), numbers], 1)
    return keys, np.stack([np.full(width, number % 251, np.uint8) for number in numbers])


def check(store, there, missing=()):
    """Which rows a store has, and that they are those of their keys."""
    keys, rows = rows_of([*there, *missing])
    found = store.read(keys)
    assert found.found.tolist() == [True] * len(there) + [False] * len(missing)
    assert not len(there) or ((found.rows == rows)[: len(there)].all() and found.kind == KIND)


def add(store, numbers):
    keys, rows = rows_of(numbers)
    store.add(keys, KIND, rows)


def test_stores_that_are_open_at_once_see_each_others_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(output_store, '_FEW', 7)  # keys are sorted often
    one, other = OutputStore(str(tmp_path), {}), OutputStore(str(tmp_path), {})
    for start in range(0, 120, 6):
        add(one, range(start, start + 4))
        add(other, range(start + 3, start + 6))  # one of them twice
        check(one, range(start + 6), [1000])
        check(other, range(start + 6), [1000])
    third = OutputStore(str(tmp_path), {})
    check(third, range(120), range(120, 130))
    assert len(third) == 140


def test_copies_and_forked_processes_write_segments_of_their_own(tmp_path):
    store = OutputStore(str(tmp_path), {'about': 1})
    add(store, range(3))
    twin = copy.deepcopy(store)
    child = multiprocessing.get_context('fork').Process(target=add, args=(store, range(3, 6)))
    child.start(), child.join(60)
    for start in range(6, 20, 2):
        add(store, [start])
        add(twin, [start + 1])
    for one in (store, twin, pickle.loads(pickle.dumps(twin))):
        check(one, range(20))
    assert len(list(tmp_path.glob('*.rows'))) == 3


def test_a_row_that_was_not_written_to_its_end_is_not_there(tmp_path):
    add(OutputStore(str(tmp_path), {}), range(10))
    (rows,), (keys,) = tmp_path.glob('*.rows'), tmp_path.glob('*.keys')
    written = {path: path.read_bytes() for path in (rows, keys)}

    def reopened(rows_size, keys_size):
        rows.write_bytes(written[rows][:rows_size])
        keys.write_bytes(written[keys][:keys_size])
        return OutputStore(str(tmp_path), {})

    check(reopened(120, 9 * 24), range(9), [9])  # killed before the key was written
    check(reopened(120, 9 * 24 + 11), range(9), [9])
    check(reopened(100, 240), range(8), [8, 9])
    check(reopened(0, 240), [], range(10))
    keys.unlink()
    check(OutputStore(str(tmp_path), {}), [], range(10))


@pytest.mark.parametrize('suffix', ['rows', 'keys'])
def test_a_row_that_was_damaged_is_written_anew(tmp_path, suffix):
    add(OutputStore(str(tmp_path), {}), range(10))
    (path,) = tmp_path.glob(f'*.{suffix}')
    content = bytearray(path.read_bytes())
    content[5 * (12 if suffix == 'rows' else 24) + 9] ^= 1
    path.write_bytes(content)
    store = OutputStore(str(tmp_path), {})
    check(store, [*range(5), *range(6, 10)], [5])
    add(store, [5])
    check(store, range(10))
    assert len(OutputStore(str(tmp_path), {})) == 11


def test_a_description_that_was_damaged_takes_its_rows_alone(tmp_path):
    store = OutputStore(str(tmp_path), {})
    add(store, range(5))
    (path,) = (path for path in tmp_path.glob('*.json') if path.stem != 'about')
    path.write_text('')
    store = OutputStore(str(tmp_path), {})
    check(store, [], range(5))
    add(store, range(5))
    check(OutputStore(str(tmp_path), {}), range(5))


def test_rows_of_another_kind_are_not_mixed(tmp_path):
    store = OutputStore(str(tmp_path), {})
    add(store, range(5))
    keys, rows = rows_of(range(5, 8), width=4)
    store.add(keys, [['logits', 'float32', [1], False]], rows)
    assert store.read(rows_of(range(8))[0]).found.tolist() == [True] * 5 + [False] * 3
    assert store.read(keys).rows.shape == (3, 4) and store.read(keys).found.all()
    check(OutputStore(str(tmp_path), {}), range(5))


def test_a_full_disk_is_said_once_and_leaves_whole_rows(tmp_path, caplog):
    store = OutputStore(str(tmp_path), {})
    with disk_that_takes(700), caplog.at_level(logging.WARNING):
        add(store, range(10))
        for start in range(10, 200, 10):
            add(store, range(start, start + 10))
            check(store, range(10))
    (warning,) = caplog.messages
    assert 'takes no more outputs of the static teacher (File too large)' in warning
    whole = OutputStore(str(tmp_path), {})
    assert 20 <= len(whole) < 200
    check(whole, range(len(whole)), [len(whole)])


def test_a_folder_that_someone_removes_ends_no_run(tmp_path, caplog):
    store = OutputStore(str(tmp_path / 'store'), {})
    add(store, range(5))
    shutil.rmtree(tmp_path / 'store')
    check(store, [], range(8))
    add(store, range(5, 8))
    assert 'takes no more outputs of the static teacher (No such file or directory)' in caplog.text


def test_a_folder_without_room_for_a_store_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='the store .*/file/x cannot be used: Not a directory'):
        OutputStore(str(tmp_path / 'file' / 'x'), {})
