"""The coverage sweep: what it finds, that it goes on where it stopped, and its exit codes."""
import itertools
import json

import pytest

from timm_gpd import Rule, coverage, register_rule
from timm_gpd.coverage import sweep as sweeping
from timm_gpd.rules import find_rule
from timm_gpd.rules.rule import _RULES


def sweep(tmp_path, *arguments):
    return coverage.main([
        '--cache', str(tmp_path / 'cache.jsonl'), '--output', str(tmp_path / 'coverage.md'), *arguments])


def records(tmp_path):
    return [json.loads(line) for line in (tmp_path / 'cache.jsonl').read_text().splitlines()]


def row(tmp_path, module):
    line, = [line for line in (tmp_path / 'coverage.md').read_text().splitlines() if line.startswith(f'| {module} ')]
    return [cell.strip() for cell in line.strip('|').split('|')]


def test_every_module_of_timm_is_swept_and_none_of_ours():
    modules = coverage.timm_modules()
    assert 'resnet' in modules and 'vision_transformer' in modules
    assert not set(coverage.OWN_MODULES) & set(modules)


def test_small_models_are_compared_and_large_ones_planned(tmp_path):
    models = ['test_resnet', 'test_vit', 'resnet18']
    assert sweep(tmp_path, '--models', *models, '--max-params', '1') == 0
    assert row(tmp_path, 'resnet')[:7] == ['resnet', '2', '1', '1', '0', '0', '0']
    assert row(tmp_path, 'vision_transformer')[:7] == ['vision_transformer', '1', '1', '0', '0', '0', '0']
    assert all(float(error) <= 1e-12 for error in row(tmp_path, 'resnet')[7:])
    assert {(r['step'], r['model']) for r in records(tmp_path)} == {
        *(('plan', model) for model in models), ('compare', 'test_resnet'), ('compare', 'test_vit')}


def test_only_the_smallest_of_each_module_are_compared(tmp_path):
    assert sweep(tmp_path, '--models', 'test_resnet', 'resnet18', 'test_vit', '--smallest', '1') == 0
    assert {r['model'] for r in records(tmp_path) if r['step'] == 'compare'} == {'test_resnet', 'test_vit'}


def test_what_is_too_large_is_compared_with_fewer_blocks(tmp_path):
    assert sweep(tmp_path, '--models', 'test_vit', 'vit_tiny_patch16_224', '--max-params', '2', '--smallest', '2') == 0
    assert row(tmp_path, 'vision_transformer')[1:3] == ['2', '2']
    assert '`vit_tiny_patch16_224` (depth=2)' in (tmp_path / 'coverage.md').read_text()
    assert '`test_vit`' not in (tmp_path / 'coverage.md').read_text()
    for max_params in ('40', '2'):  # whole once there is room for it, and then it stays
        assert sweep(tmp_path, '--models', 'test_vit', 'vit_tiny_patch16_224', '--max-params', max_params) == 0
        assert 'depth=2' not in (tmp_path / 'coverage.md').read_text()
    assert len(records(tmp_path)) == 5


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    assert sweep(tmp_path, '--models', 'test_resnet', '--max-params', '1') == 0
    known = records(tmp_path)
    with (tmp_path / 'cache.jsonl').open('a') as file:
        file.write('{"key": "timm-0.9", "step": "plan", "model": "test_vit", "status": "unsupported"}\n{"key": "cut o')
    with (tmp_path / 'cache.jsonl').open('a') as file:
        file.write('\n')
    asked = []
    plan_one, compare_one = sweeping.plan_one, sweeping.compare_one
    monkeypatch.setattr(sweeping, 'plan_one', lambda name, *args: asked.append(name) or plan_one(name, *args))
    monkeypatch.setattr(sweeping, 'compare_one', lambda name, *args: asked.append(name) or compare_one(name, *args))
    assert sweep(tmp_path, '--models', 'test_resnet', 'test_vit', '--max-params', '1') == 0
    assert asked == ['test_vit', 'test_vit'] and len(known) == 2  # planned and compared; the other was known


def test_worker_processes_find_the_same(tmp_path):
    for jobs in ('1', '2'):
        assert sweep(tmp_path / jobs, '--models', 'test_resnet', 'test_vit', '--jobs', jobs) == 0
    for module, jobs in itertools.product(('resnet', 'vision_transformer'), ('1', '2')):
        assert row(tmp_path / jobs, module)[:7] == [module, '1', '1', '0', '0', '0', '0']


def test_an_architecture_without_classifier_is_no_failure(tmp_path):
    assert sweep(tmp_path, '--models', 'gemma4_vit_167m_enc') == 0
    assert row(tmp_path, 'gemma4_vit')[6] == '1'
    assert '`gemma4_vit_167m_enc`' in (tmp_path / 'coverage.md').read_text()


@pytest.mark.parametrize('rule, status', [
    (Rule(), 'unsupported'),  # heads are not told: the plan fails
    (Rule(multiply=('num_heads', 'attn_dim')), 'inexact'),  # heads are told, their layout is not: the logits differ
])
def test_what_fails_is_listed_with_its_reason(tmp_path, rule, status):
    name = 'timm.layers.attention.Attention'
    right = _RULES[name]
    try:
        register_rule(name, rule)
        assert sweep(tmp_path, '--models', 'test_vit') == 1
    finally:
        register_rule(name, right)
    assert f'- `test_vit`: {status}: ' in (tmp_path / 'coverage.md').read_text()
    assert find_rule(coverage.create('test_vit').blocks[0].attn) is right


@pytest.mark.parametrize('arguments', [
    ['--modules', 'resnot'], ['--models', 'resnet19'], ['--jobs', '0'], ['--ratio', '0'], ['--smallest', 'few']])
def test_wrong_arguments_end_with_code_2(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep(tmp_path, *arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err or arguments[1] in capsys.readouterr().err
