"""Characters of fonts: drawn the same everywhere, of families that no split shares, and another view every epoch."""

import dataclasses
import hashlib
import json
import os
import shutil
from fractions import Fraction

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font
from safetensors.numpy import load_file, save_file

from programs import ROOT, differences, run, summary
from timm_gpd.data.glyphs import (
    CLASSES,
    SPLITS,
    augment,
    choose_faces,
    choose_families,
    read_glyphs,
    render_face,
    split_families,
)
from timm_gpd.data.glyphs.command import main
from timm_gpd.errors import UsageError
from timm_gpd.training.args import parse_train_args
from timm_gpd.training.data.datasets import resolve_data, with_defaults
from timm_gpd.training.data.loaders import create_eval_loader, create_train_loader
from timm_gpd.training.data.replay import ReplayedLoader
from timm_gpd.training.processes import Processes
from timm_gpd.training.student import create_student, resolve_input

FONTS = os.path.join(matplotlib.get_data_path(), 'fonts', 'ttf')
CPU = torch.device('cpu')
SOME = ('DejaVuSans', 'DejaVuSans-Bold', 'DejaVuSansMono', 'DejaVuSerif', 'STIXGeneral', 'cmr10', 'cmtt10')
SHARES = ['--test-share', '1/6', '--validation-share', '1/6']


@pytest.fixture(scope='module')
def fonts(tmp_path_factory):
    """Folder of seven fonts of six families."""
    return copied(tmp_path_factory.mktemp('fonts') / 'some', *(f'{name}.ttf' for name in SOME))


@pytest.fixture(scope='module')
def folder(fonts):
    """Their glyphs."""
    assert main([str(fonts.parent / 'glyphs'), '--fonts', str(fonts), *SHARES]) == 0
    return fonts.parent / 'glyphs'


def described(folder):
    return json.loads((folder / 'glyphs.json').read_text())


def copied(path, *names):
    """A folder of some of matplotlib's fonts."""
    path.mkdir()
    for name in names:
        shutil.copy(os.path.join(FONTS, name), path)
    return path


# -- drawing ----------------------------------------------------------------------------------------------------------


def test_classes_are_distinct_characters_of_all_scripts():
    assert len(set(CLASSES)) == len(CLASSES) >= 100
    assert {'0', 'A', 'Ω', 'Ж', '&'} < set(CLASSES) and not {'O', 'o', 'c', 'Α', 'А', 'l', 'I'} & set(CLASSES)


def test_the_same_fonts_give_the_same_bytes_wherever_they_lie(folder, tmp_path, capsys):
    fonts = copied(tmp_path / 'elsewhere', *(f'{name}.ttf' for name in reversed(SOME)))
    assert main([str(tmp_path / 'again'), '--fonts', str(fonts), *SHARES]) == 0
    for name in ('glyphs.safetensors', 'glyphs.json'):
        assert (tmp_path / 'again' / name).read_bytes() == (folder / name).read_bytes()
    said = described(folder)
    assert said['arrays_sha256'] == hashlib.sha256((folder / 'glyphs.safetensors').read_bytes()).hexdigest()
    assert f'{len(CLASSES)} classes, digest {said["digest"]}' in capsys.readouterr().out


def test_no_family_is_in_two_splits(folder):
    families = {split: set(read_glyphs(str(folder), split).families.tolist()) for split in SPLITS}
    assert all(families.values())
    assert sum(map(len, families.values())) == len(set.union(*families.values())) == len(described(folder)['families'])
    said = {family['name']: family['split'] for family in described(folder)['families']}
    names = list(said)
    assert all(said[names[index]] == split for split in SPLITS for index in families[split])


def test_a_deal_moves_few_families_when_one_is_added():
    shares = (Fraction(1, 3), Fraction(1, 10))
    names = [f'family {index}' for index in range(300)]
    before = split_families(names, 0, *shares)
    assert [list(before.values()).count(split) for split in SPLITS] == [180, 20, 100]
    after = split_families([*names, 'another'], 0, *shares)
    assert sum(before[name] != after[name] for name in names) <= 2
    fewer = split_families(names, 0, *shares, count=150)
    assert len(fewer) == 150 and split_families(names, 1, *shares) != before


def test_images_are_of_different_characters_that_fill_their_box(folder):
    for split in SPLITS:
        glyphs = read_glyphs(str(folder), split)
        assert glyphs.images.shape[1:] == (28, 28) and set(glyphs.targets.tolist()) <= set(range(len(CLASSES)))
        ink = glyphs.images > 0
        sides = np.stack([np.ptp(np.nonzero(image), axis=1) + 1 for image in ink])
        assert (sides.max(1) >= 18).all() and (sides.max(1) <= 20).all()
        for family in set(glyphs.families.tolist()):
            classes_of = {}
            for index in np.flatnonzero(glyphs.families == family):
                classes_of.setdefault(glyphs.images[index].tobytes(), set()).add(CLASSES[glyphs.targets[index]])
            assert [classes for classes in classes_of.values() if len(classes) > 1] == []


def choose_faces_of(fonts):
    return choose_faces([os.path.join(fonts, name) for name in sorted(os.listdir(fonts))])


def test_what_a_font_lacks_is_left_out(tmp_path):
    fonts = copied(tmp_path / 'fonts', 'cmr10.ttf', 'cmsy10.ttf', 'DejaVuSans.ttf', 'STIXSizOneSymReg.ttf')
    families, left_out = choose_families(choose_faces_of(fonts), 28, 0.4)
    known = {family.name: {CLASSES[target] for target in family.faces[0].images} for family in families}
    assert known['DejaVu Sans'] == set(CLASSES)
    charmap = {chr(code) for code in FT2Font(str(fonts / 'cmr10.ttf')).get_charmap()}
    assert known['cmr10'] == set(CLASSES) & charmap > {'A', 'g', '7'} and known['cmr10'] < set(CLASSES)
    assert left_out.keys() == {'cmsy10', 'STIXSizeOneSym'} and left_out['cmsy10'] == 'pictures'
    assert left_out['STIXSizeOneSym'].endswith(f' of {len(CLASSES)} characters')


def test_families_that_share_their_latin_letters_count_once(fonts, monkeypatch):
    """Here a family of another name draws those of DejaVu Sans, and no Greek; and one has capitals alone."""
    faces = {name: choose_faces_of(fonts)[name] for name in ('DejaVu Sans', 'DejaVu Serif')}
    faces['Another Name'] = [dataclasses.replace(faces['DejaVu Sans'][0], family='Another Name')]

    def draw(face, size):
        drawn = {CLASSES[target]: image for target, image in render_face(face, size).items()}
        if face.family == 'Another Name':
            drawn = {character: image for character, image in drawn.items() if character.isascii()}
        if face.family == 'DejaVu Serif':
            drawn.update({character.lower(): drawn[character] for character in 'ABDEFGHJMNQRTY'})
        return {target: drawn[name] for target, name in enumerate(CLASSES) if name in drawn}

    monkeypatch.setattr('timm_gpd.data.glyphs.families.render_face', draw)
    families, left_out = choose_families(faces, 28, 0.4)
    assert [family.name for family in families] == ['DejaVu Sans', 'DejaVu Serif']
    assert left_out == {'Another Name': 'letters of DejaVu Sans'}
    assert [drawn.face.style for drawn in families[0].faces] == ['Book', 'Bold']
    small = {CLASSES[target] for target in families[1].faces[0].images if CLASSES[target].islower()}
    assert 'i' in small and not small & set('abdefghjmnqrty')


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--fonts', 'nowhere'], 'font folder nowhere does not exist: check --fonts'),
        (['--fonts', os.path.join(ROOT, 'configs')], 'no fonts in'),
        (['--size', '2'], '--size must be at least 8'),
        (['--families', '2'], '--families must be at least 3'),
        (
            ['--families', '9', '--fonts', 'FONTS'],
            '6 families can be used, and --families asks for 9',
        ),
        (['--test-share', '1'], '1 is not between 0 and 1'),
        (['--test-share', 'half'], 'half is no share'),
        (['--test-share', '0.99', '--fonts', 'FONTS'], 'families do not fill the splits'),
    ],
)
def test_what_is_wrong_is_one_line(fonts, tmp_path, capsys, arguments, message):
    arguments = [str(fonts) if text == 'FONTS' else text for text in arguments]
    assert main([str(tmp_path / 'out'), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count('\n') == 1 and not os.listdir(tmp_path)


def test_nothing_is_overwritten_and_nothing_half_stays(fonts, folder, tmp_path, capsys, monkeypatch):
    before = (folder / 'glyphs.safetensors').stat()
    assert main([str(folder), '--fonts', str(fonts)]) == 2
    assert f'{folder} exists: choose another folder' in capsys.readouterr().err
    assert (folder / 'glyphs.safetensors').stat() == before

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_gpd.data.glyphs.store.json.dump', interrupted)  # the last that is written
    assert main([str(tmp_path / 'out'), '--fonts', str(fonts)]) == 130
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--data-dir', ''], '--dataset glyphs needs --data-dir, a folder that python -m timm_gpd.data.glyphs wrote'),
        (['--data-dir', ROOT], 'holds no glyphs: write them with python -m timm_gpd.data.glyphs'),
        (['--val-split', 'tset'], "glyphs have no split 'tset': choose of train, validation, test"),
        (['--num-classes', '10'], f'the train split has {len(CLASSES)} classes and the model 10: set --num-classes'),
        (['--img-size', '32'], 'are of 28 x 28 grey pixels, and the model takes 3 x 32 x 32: set --input-size 1 28 28'),
        (['--no-prefetcher'], '--no-prefetcher does not go with --dataset glyphs: leave it out'),
        (['--class-map', 'map.txt'], '--class-map does not go with --dataset glyphs'),
    ],
)
def test_commands_that_glyphs_cannot_follow_are_refused(folder, tmp_path, flags, message):
    said = train(tmp_path, folder, *flags, code=2).stderr.splitlines()[-1]
    assert said.startswith('train.py: error: ') and message in said


def test_damaged_glyphs_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'cut')
    os.truncate(tmp_path / 'cut' / 'glyphs.safetensors', 1000)
    with pytest.raises(UsageError, match='glyphs.safetensors cannot be read: write the glyphs again'):
        read_glyphs(str(tmp_path / 'cut'), 'train')
    shutil.copytree(folder, tmp_path / 'other')
    arrays = load_file(tmp_path / 'other' / 'glyphs.safetensors')
    save_file({**arrays, 'targets': arrays['targets'] + 500}, tmp_path / 'other' / 'glyphs.safetensors')
    with pytest.raises(UsageError, match='is not what glyphs.json describes: write the glyphs again'):
        read_glyphs(str(tmp_path / 'other'), 'train')


def test_what_has_no_effect_is_warned_about(folder, caplog):
    parse_train_args(['--dataset', 'glyphs', '--data-dir', str(folder), '--hflip', '0', '--aa', 'rand-m9'])
    assert '--hflip, --aa does nothing with --dataset glyphs' in caplog.text


# -- augmentation -----------------------------------------------------------------------------------------------------


def test_a_view_depends_on_the_image_and_its_seed_alone(folder):
    images = torch.from_numpy(read_glyphs(str(folder), 'train').images[:6])
    views = augment(images, range(6))
    assert views.dtype == torch.uint8 and views.shape == images.shape
    for index in range(6):
        assert torch.equal(augment(images[index : index + 1], [index])[0], views[index])
    assert all(not torch.equal(*pair) for pair in zip(augment(images, range(1, 7)), views))


def test_ink_is_the_lighter_as_often_as_the_darker():
    images = torch.zeros(400, 28, 28, dtype=torch.uint8)
    images[:, 10:18, 10:18] = 255
    views = augment(images, range(400)).float()
    contrast = views[:, 12:16, 12:16].mean((1, 2)) - views[:, :3].mean((1, 2))
    assert 150 < (contrast > 0).sum() < 250 and contrast.abs().min() > 30
    assert 0.05 < (contrast.abs() > 200).float().mean() < 0.3


def loaders(folder, *flags):
    args = parse_train_args(['-c', os.path.join(ROOT, 'configs', 'glyphs.yaml'), '--data-dir', str(folder), *flags])
    source = resolve_data(args)
    args = with_defaults(args, source)
    config = resolve_input(args, create_student(args))
    assert config.input_size == (1, 28, 28) and config.crop_pct == 1.0
    common = args, source, config, args.num_classes, CPU
    return ReplayedLoader(create_train_loader(*common)[0], 0, Processes(CPU)), create_eval_loader(*common)


@pytest.mark.parametrize('workers', ['0', '1'])
def test_epochs_differ_and_are_the_same_when_they_are_repeated(folder, workers):
    train_loader, eval_loader = loaders(folder, '-j', workers)

    def epoch(number, **where):
        return [images for _, (images, _) in train_loader.run_epoch(number, **where)]

    first = epoch(0)
    assert len(first) >= 2 and all(torch.equal(*pair) for pair in zip(epoch(0, first_batch=1), first[1:]))
    again = epoch(1)
    assert not {image.numpy().tobytes() for image in torch.cat(first)} & {
        image.numpy().tobytes() for image in torch.cat(again)
    }
    one, other = ([images for images, _ in eval_loader] for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(one, other))


def test_no_aug_shows_training_images_as_they_were_drawn(folder):
    train_loader, _ = loaders(folder, '--no-aug')
    drawn = {image.tobytes() for image in read_glyphs(str(folder), 'train').images}
    for _, (images, _) in train_loader.run_epoch(0):
        assert {image.tobytes() for image in ((images + 1) * 127.5).round().byte().numpy()} <= drawn


# -- training ---------------------------------------------------------------------------------------------------------


def train(tmp_path, folder, *flags, config='glyphs', code=0):
    quick = ['--warmup-epochs', '0', '--data-dir', folder, '--output', tmp_path, '--experiment', 'run']
    return run('train.py', '-c', os.path.join(ROOT, 'configs', f'{config}.yaml'), *quick, *flags, code=code)


def test_a_run_that_is_resumed_ends_as_the_one_that_was_left_alone(folder, tmp_path):
    train(tmp_path / 'alone', folder, '--epochs', '2', config='glyphs_gpd')
    train(tmp_path / 'resumed', folder, '--epochs', '2', '--stop-epoch', '1', config='glyphs_gpd')
    train(tmp_path / 'resumed', folder, '--epochs', '2', '--resume', 'auto', config='glyphs_gpd')
    assert not differences(tmp_path / 'resumed' / 'run', tmp_path / 'alone' / 'run')


def test_a_student_is_validated_on_the_images_of_its_run_and_tested_on_others(folder, tmp_path):
    train(tmp_path, folder, '--epochs', '1')
    flags = ['--dataset', 'glyphs', '--data-dir', folder, '--device', 'cpu', '-j', '0']
    student = ['--model', f'local-dir:{tmp_path}/run/student', '--pretrained']

    def loss(*split):
        return json.loads(run('validate.py', *flags, *student, *split).stdout.partition('--result')[2])['loss']

    assert loss() == pytest.approx(float(summary(tmp_path / 'run')[0]['eval_loss']), abs=1e-3)
    assert loss('--split', 'test') != pytest.approx(loss(), abs=1e-3)
