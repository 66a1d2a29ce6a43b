"""A student's folder and its card."""

import json
import os

import pytest
import timm
import torch
from huggingface_hub import ModelCard

from timm_gpd.student_folder import card_of_repo, new_folder, read_metrics, save_student
from timm_gpd.training.args import parse_train_args

METRICS = dict(top1=93.12345, top5=99.5, teacher_top1=94.75, static_top1=96.0, loss=0.5)


def recipe(*arguments):
    return vars(parse_train_args(['--model', 'test_resnet', '--dataset', 'digits', '--lr', '0.1', *arguments]))


def card(student, folder, recipe, *more):
    save_student(student, str(folder), recipe, *more)
    return ModelCard.load(folder / 'README.md')


def test_card_tells_the_run(tiny_student, tmp_path):
    (tmp_path / 'gap.png').write_bytes(b'plot')
    result = card(
        tiny_student,
        tmp_path / 'student',
        recipe(
            '--gpd',
            '--gpd-ratio',
            '3',
            '--gpd-branches',
            '6',
            '--kd-model-name',
            'local-dir:/home/someone/teacher',
            '--data-dir',
            '/home/someone/images',
        ),
        METRICS,
        str(tmp_path / 'gap.png'),
    )
    assert result.data.library_name == 'timm' and 'gap-preserving-distillation' in result.data.tags
    assert [(r.metric_type, r.metric_name, r.metric_value, r.dataset_name) for r in result.data.eval_results] == [
        ('accuracy', 'top-1 (%)', 93.123, 'digits'),
        ('accuracy', 'top-5 (%)', 99.5, 'digits'),
    ]
    for text in (
        'a dynamic teacher of ratio 3',
        'branches per convolution: 6',
        '`teacher`',
        f'{sum(p.numel() for p in tiny_student.parameters()):,} parameters',
        '1 × 32 × 32',
        '| student | 93.12 | 99.50 |',
        '| dynamic teacher | 94.75 |  |',
        '| static teacher | 96.00 |  |',
        '![Top-1 of the student and its teachers over epochs](gap.png)',
        'arxiv.org/abs/2410.04140',
        "create_model('local-dir:path/to/this/folder', pretrained=True)",
        '@inproceedings',
    ):
        assert text in result.text, text
    assert 'someone' not in result.content
    assert (tmp_path / 'student' / 'gap.png').read_bytes() == b'plot'


def test_recipe_in_the_card_repeats_the_run(tiny_student, tmp_path):
    arguments = ['--gpd', '--gpd-noise', '0.1', '--weight-decay', '0.0005', '--sched', 'step', '--epochs', '7']
    text = card(tiny_student, tmp_path / 'student', recipe(*arguments)).text
    settings = json.loads(text.split('```json\n')[1].split('```')[0])
    (tmp_path / 'recipe.yaml').write_text(json.dumps(settings))  # JSON is YAML
    ours, theirs = recipe(*arguments), vars(parse_train_args(['--config', str(tmp_path / 'recipe.yaml')]))
    assert {name for name in ours if ours[name] != theirs[name]} == {'config'}


def test_a_plain_run_claims_no_more(tiny_student, tmp_path):
    plain = card(tiny_student, tmp_path / 'student', recipe())
    assert plain.data.eval_results is None and plain.data.tags == ['image-classification', 'timm']
    assert 'Trained on its own.' in plain.text and 'learning rate 0.1,' in plain.text
    assert not any(word in plain.text for word in ('ynamic teacher', '## Results', 'gap.png', 'bibtex'))
    distilled = card(tiny_student, tmp_path / 'student', {**recipe('--kd-model-name', 'resnet34'), 'lr': None})
    assert 'resnet34`, by the losses `logit`' in distilled.text
    assert 'base learning rate 0.1 for batches of 256' in distilled.text


def test_published_card_differs_in_its_name_only(tiny_student, tmp_path):
    local = card(tiny_student, tmp_path / 'student', recipe('--gpd'), METRICS).content
    published = card_of_repo(str(tmp_path / 'student'), 'me/digits')
    assert "create_model('hf-hub:me/digits', pretrained=True)" in published and 'local-dir:' not in published
    assert published.replace('hf-hub:me/digits', 'local-dir:path/to/this/folder') == local


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_weights_and_arguments_come_back(tiny_student, tmp_path, memory_format):
    tiny_student.to(memory_format=memory_format)
    save_student(
        tiny_student, str(tmp_path / 'student'), recipe('--model-kwargs', 'channels=[8,16,32,64]', 'stem_width=4'), {}
    )
    config = json.loads((tmp_path / 'student' / 'config.json').read_text())
    assert config['architecture'] == 'test_resnet' and config['model_args']['stem_width'] == 4
    loaded = timm.create_model(f'local-dir:{tmp_path}/student', pretrained=True)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in tiny_student.state_dict().items())


def test_the_student_stays_as_it_is(tiny_student, tmp_path):
    tiny_student.pretrained_cfg.update(license='mit', tag='in1k')
    before = dict(tiny_student.pretrained_cfg)
    text = card(tiny_student, tmp_path / 'student', recipe()).content
    assert tiny_student.pretrained_cfg == before
    config = json.loads((tmp_path / 'student' / 'config.json').read_text())['pretrained_cfg']
    assert config['input_size'] == [1, 32, 32] and not {'license', 'tag'} & config.keys() and 'license: mit' not in text


def test_metrics_are_those_of_the_epoch(tmp_path):
    path = tmp_path / 'summary.csv'
    path.write_text('epoch,train_loss,eval_top1,eval_gap,lr\n0,2.0,61.25,2.5,0.1\n1,1.0,93.125,,0.01\n')
    assert read_metrics(str(path)) == {'top1': 93.125}
    assert read_metrics(str(path), 0) == {'top1': 61.25, 'gap': 2.5}
    assert read_metrics(str(path), 7) == read_metrics(str(tmp_path / 'missing')) == {}


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    folder = tmp_path / 'folder'
    for content in ('first', 'second'):
        with new_folder(str(folder)) as partial:
            with open(os.path.join(partial, 'file'), 'w') as file:
                file.write(content)
        assert (folder / 'file').read_text() == content
    with pytest.raises(KeyboardInterrupt):
        with new_folder(str(folder)):
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ['folder'] and (folder / 'file').read_text() == 'second'
