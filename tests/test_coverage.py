"""The coverage sweep: what it finds, that it goes on where it stopped, and its exit codes."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from timm_gpd import Rule, coverage, register_rule
from timm_gpd.coverage import sweep as sweeping
from timm_gpd.coverage.cache import PATH_SOURCES, fingerprint
from timm_gpd.coverage.whole_path import WholePath
from timm_gpd.rules import find_rule
from timm_gpd.rules.rule import _RULES


def sweep(tmp_path, *arguments):
    return coverage.main(
        ['--cache', str(tmp_path / 'cache.jsonl'), '--output', str(tmp_path / 'coverage.md'), *arguments]
    )


def records(tmp_path):
    return [json.loads(line) for line in (tmp_path / 'cache.jsonl').read_text().splitlines()]


def row(tmp_path, module, table=0):
    """A module's cells, of the table of architectures or of that of whole paths."""
    lines = [line for line in (tmp_path / 'coverage.md').read_text().splitlines() if line.startswith(f'| {module} ')]
    return [cell.strip() for cell in lines[table].strip('|').split('|')]


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
        *(('plan', model) for model in models),
        *itertools.product(('compare', 'path'), ('test_resnet', 'test_vit')),
    }
    assert row(tmp_path, 'resnet', table=1) == ['resnet', '`test_resnet`', 'yes', 'yes', 'yes', 'yes', 'yes', '14']


def test_only_the_smallest_of_each_module_are_compared(tmp_path):
    assert sweep(tmp_path, '--models', 'test_resnet', 'resnet18', 'test_vit', '--smallest', '1') == 0
    assert {r['model'] for r in records(tmp_path) if r['step'] == 'compare'} == {'test_resnet', 'test_vit'}


def test_what_is_too_large_is_compared_with_fewer_blocks(tmp_path):
    assert sweep(tmp_path, '--models', 'test_vit', 'vit_tiny_patch16_224', '--max-params', '2', '--smallest', '2') == 0
    assert row(tmp_path, 'vision_transformer')[1:3] == ['2', '2']
    assert '`vit_tiny_patch16_224` (depth=2)' in (tmp_path / 'coverage.md').read_text()
    assert '`test_vit` (' not in (tmp_path / 'coverage.md').read_text()
    for max_params in ('40', '2'):  # whole once there is room for it, and then it stays
        assert sweep(tmp_path, '--models', 'test_vit', 'vit_tiny_patch16_224', '--max-params', max_params) == 0
        assert 'depth=2' not in (tmp_path / 'coverage.md').read_text()
    assert len([r for r in records(tmp_path) if r['step'] != 'path']) == 5


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    assert sweep(tmp_path, '--models', 'test_resnet', '--max-params', '1') == 0
    known = records(tmp_path)
    with (tmp_path / 'cache.jsonl').open('a') as file:
        file.write('{"key": "timm-0.9", "step": "plan", "model": "test_vit", "status": "unsupported"}\n{"key": "cut o')
    with (tmp_path / 'cache.jsonl').open('a') as file:
        file.write('\n')
    asked = []

    def asks(step):
        return lambda name, *args: asked.append(name) or step(name, *args)

    for step in ('plan_one', 'compare_one', 'path_one'):
        monkeypatch.setattr(sweeping, step, asks(getattr(sweeping, step)))
    assert sweep(tmp_path, '--models', 'test_resnet', 'test_vit', '--max-params', '1') == 0
    assert asked == ['test_vit'] * 3 and len(known) == 3  # planned, walked and compared; the other was known


def test_what_fails_on_the_whole_path_is_listed(tmp_path, monkeypatch):
    def fails(self):
        raise KeyError('stem')

    monkeypatch.setattr(WholePath, 'copies', fails)
    assert sweep(tmp_path, '--models', 'test_resnet', '--max-params', '1') == 1
    assert row(tmp_path, 'resnet')[:3] == ['resnet', '1', '1']
    assert row(tmp_path, 'resnet', table=1)[2:] == ['yes', 'yes', 'yes', 'yes', 'fails', '14']
    assert "- `test_resnet`, copies: KeyError: 'stem'" in (tmp_path / 'coverage.md').read_text()


def test_worker_processes_find_the_same(tmp_path):
    for jobs in ('1', '2'):
        assert sweep(tmp_path / jobs, '--models', 'test_resnet', 'test_vit', '--jobs', jobs) == 0
    for module, jobs in itertools.product(('resnet', 'vision_transformer'), ('1', '2')):
        assert row(tmp_path / jobs, module)[:7] == [module, '1', '1', '0', '0', '0', '0']


def test_an_architecture_without_classifier_is_no_failure(tmp_path):
    assert sweep(tmp_path, '--models', 'gemma4_vit_167m_enc') == 0
    assert row(tmp_path, 'gemma4_vit')[6] == '1'
    assert '`gemma4_vit_167m_enc`' in (tmp_path / 'coverage.md').read_text()


@pytest.mark.parametrize(
    'rule, reason',
    [
        # Heads are not told: the plan fails.
        (Rule(), "unsupported: VisionTransformer cannot be widened: module 'blocks.0.attn' of class "),
        # Heads are told, their blocks are not: the logits differ.
        (Rule(multiply=('num_heads', 'attn_dim')), 'inexact: the planned teacher differs from the student\n'),
    ],
)
def test_what_fails_is_listed_with_its_reason(tmp_path, rule, reason):
    name = 'timm.layers.attention.Attention'
    right = _RULES[name]
    try:
        register_rule(name, rule)
        assert sweep(tmp_path, '--models', 'test_vit') == 1
    finally:
        register_rule(name, right)
    assert f'- `test_vit`: {reason}' in (tmp_path / 'coverage.md').read_text()
    assert find_rule(coverage.create('test_vit').blocks[0].attn) is right


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--modules', 'resnot'], r'resnot is not a module of timm \S+: see timm.list_modules\(\)'),
        (['--models', 'resnet19'], r'resnet19 is not an architecture of timm \S+: see timm.list_models\(\)'),
        (['--jobs', '0'], '--jobs must be at least 1, but is 0'),
        (['--ratio', '0'], '--ratio must be at least 1, but is 0'),
        (['--smallest', 'few'], "argument --smallest: invalid int value: 'few'"),
    ],
)
def test_wrong_arguments_end_with_code_2(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep(tmp_path, *arguments)
    assert stop.value.code == 2
    # The usage above it names every flag: only the last line says what is wrong.
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(f'python -m timm_gpd.coverage: error: {message}', last_line), last_line
    assert not list(tmp_path.iterdir())


def test_it_runs_as_a_module_without_a_warning():
    run = subprocess.run(
        [sys.executable, '-W', 'error::RuntimeWarning', '-m', 'timm_gpd.coverage', '--help'],
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, '')
    assert '--max-params' in run.stdout


@pytest.fixture
def package(tmp_path):
    """A copy of the package's sources."""
    return Path(
        shutil.copytree(
            Path(coverage.__file__).parents[1], tmp_path / 'timm_gpd', ignore=shutil.ignore_patterns('__pycache__')
        )
    )


# Moves keep the order of the files, so that the bytes in all alone do not tell.
CHANGES = {
    'a rule changes': lambda package: (package / 'rules/tokens.py').write_text('# no rules\n'),
    'a file of rules is added': lambda package: (package / 'rules/new.py').touch(),
    'a file of rules goes': lambda package: (package / 'rules/tokens.py').unlink(),
    'a file of rules moves': lambda package: (package / 'rules/tokens.py').rename(package / 'rules/tokens_.py'),
    'a handler changes': lambda package: (package / 'expansion/functions/linear.py').write_text('# nothing\n'),
    'a folder of handlers moves': lambda package: (package / 'expansion/functions').rename(
        package / 'expansion/functions_'
    ),
    'a line moves to another file': lambda package: move_first_line(
        package / 'expansion/planner.py', package / 'expansion/images.py'
    ),
    'the check changes': lambda package: (package / 'expansion/verify.py').write_text('# nothing\n'),
    'a private name of torch changes': lambda package: (package / 'private_torch.py').write_text('# nothing\n'),
    'architectures are created in another way': lambda package: (package / 'coverage/architectures.py').write_text(
        '# nothing\n'
    ),
}


def move_first_line(source, target):
    """Moves the first line of a file to the end of the one before it."""
    first, rest = source.read_text().split('\n', 1)
    source.write_text(rest)
    target.write_text(target.read_text() + first + '\n')


@pytest.mark.parametrize('change', CHANGES)
def test_what_a_plan_depends_on_makes_a_cache_stale(package, change):
    before = fingerprint(package)
    assert before == fingerprint()
    CHANGES[change](package)
    assert fingerprint(package) != before


@pytest.mark.parametrize(
    'path, is_on_the_path',
    [
        ('losses/logits.py', True),
        ('teacher/dynamic_teacher.py', True),
        ('task/gap_preserving.py', True),
        ('coverage/whole_path.py', True),
        ('coverage/report.py', False),
        ('errors.py', False),
    ],
)
def test_what_no_plan_depends_on_leaves_plans_fresh_and_paths_where_they_do_not_depend_on_it(
    package, path, is_on_the_path
):
    before, path_before = fingerprint(package), fingerprint(package, PATH_SOURCES)
    (package / path).write_text('# nothing\n')
    assert fingerprint(package) == before
    assert (fingerprint(package, PATH_SOURCES) != path_before) == is_on_the_path


def test_a_stale_cache_is_not_read(tmp_path, monkeypatch):
    assert sweep(tmp_path, '--models', 'test_resnet', '--max-params', '0.001') == 0
    monkeypatch.setattr('timm_gpd.coverage.cache.fingerprint', lambda **kwargs: 'another')
    assert sweep(tmp_path, '--models', 'test_resnet', '--max-params', '0.001') == 0
    steps = [(record['step'], record['model']) for record in records(tmp_path)]
    assert len(steps) == 2 * len(set(steps)) and ('plan', 'test_resnet') in steps
