"""The code of every document: Python runs, and commands are parsed.

Python blocks run one after another in an empty folder. Commands are parsed by the parser of the program that they
start, so that a flag or a value that it does not know fails: most take long, or need data. A comment in the line above
a block says otherwise::

    <!-- not run: needs the Hub -->      Python is compiled, and its imports are run
    <!-- run: --epochs 1 -->             commands run, with arguments that make them short here

The notebook runs where the site is built.
"""

import argparse
import ast
import json
import multiprocessing
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch.distributed.run
import yaml
from PIL import Image

from programs import run
from timm_gpd.training.args import parse_train_args, parse_validate_args, train_parser
from timm_gpd.training.args.config import read_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
FENCE = re.compile(
    r'(?:^ *<!-- (?P<mark>[^>]*) -->\n)?^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^ *```$', re.M | re.S
)
PARSERS = {'train.py': parse_train_args, 'validate.py': parse_validate_args}


class Block(NamedTuple):
    """A piece of code in a document, with the comment above it."""

    language: str
    code: str
    line: int
    kind: str
    argument: str


def blocks(document):
    text = document.read_text()
    for match in FENCE.finditer(text):
        kind, _, argument = (match['mark'] or '').partition(': ')
        code = re.sub(f'^{match["indent"]}', '', match['code'], flags=re.M)
        yield Block(match['language'], code, text[: match.start('code')].count('\n'), kind, argument)


BLOCKS = {document: list(blocks(document)) for document in DOCUMENTS}


def documents_with(language):
    chosen = [path for path in DOCUMENTS if any(block.language == language for block in BLOCKS[path])]
    return pytest.mark.parametrize('document', chosen, ids=lambda path: path.name)


def test_every_block_and_every_mark_is_known():
    known = {
        'python': ('', 'not run'),
        'sh': ('', 'run', 'demo-command', 'test-command'),
        'yaml': ('',),
        'bibtex': ('',),
    }
    for document, found in BLOCKS.items():
        assert [block for block in found if block.kind not in known.get(block.language, ())] == [], document.name
    fences = sum(len(re.findall('^ *```', path.read_text(), re.M)) for path in DOCUMENTS)
    assert fences == 2 * sum(map(len, BLOCKS.values()))  # none is overlooked


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@documents_with('python')
def test_python_runs(document, empty_folder):
    """In a process of its own: documents register models, losses and rules. README.md has a test in test_readme.py."""
    if document.name != 'README.md':
        process = multiprocessing.get_context('fork').Process(target=run_python, args=(document,))
        process.start()
        process.join(120)
        assert process.exitcode == 0


def run_python(document):
    """Runs blocks one after another: a later one knows what the earlier ones have made."""
    module = sys.modules['document'] = ModuleType('document')
    for block in BLOCKS[document]:
        if block.language == 'python':
            code = '\n' * block.line + block.code  # so that a traceback names the document's lines
            statements = ast.parse(code, str(document))
            if block.kind == 'not run':
                statements.body = [part for part in statements.body if isinstance(part, (ast.Import, ast.ImportFrom))]
            exec(compile(statements, str(document), 'exec'), vars(module))


@documents_with('yaml')
def test_configurations_are_read(document, empty_folder):
    for block in BLOCKS[document]:
        if block.language == 'yaml':
            Path('config.yaml').write_text(block.code)
            assert read_config('config.yaml', train_parser()).keys() == yaml.safe_load(block.code).keys()
            parse_train_args(['--config', 'config.yaml'])


class Parsed(BaseException):
    """The program has understood its command line; no Exception, which programs catch."""


def commands(code):
    """Programs of this repository that a block of commands starts, each with its arguments."""
    for line in re.sub(r'\\\n', ' ', code).splitlines():
        for command in re.split(r'&&|\|', line):
            words = shlex.split(command, comments=True)
            for index, word in enumerate(words):
                if re.fullmatch(r'(train|validate)\.py|benchmarks/\w+\.py', word):
                    yield words[:index], word, words[index + 1 :]
                elif word == '-m' and words[index + 1].startswith('timm_gpd'):
                    yield words[:index], words[index + 1], words[index + 2 :]


def parse(launcher, program, arguments, patch):
    if 'torchrun' in launcher:
        launcher = launcher[launcher.index('torchrun') + 1 :]
        torch.distributed.run.get_args_parser().parse_args([*launcher, program, *arguments])
    if program in PARSERS:
        given = PARSERS[program](arguments)
        assert given.data_dir in ('imagenet', 'data/glyphs', 'my_images') or '--data-dir' not in arguments
        return

    def parse_only(parser, *args, **kwargs):
        parse_args(parser, *args, **kwargs)
        raise Parsed

    parse_args = argparse.ArgumentParser.parse_args
    patch.setattr(argparse.ArgumentParser, 'parse_args', parse_only)
    patch.setattr(sys, 'argv', [program, *arguments])
    patch.setattr(sys, 'path', [str(ROOT / 'benchmarks'), *sys.path])
    with pytest.raises(Parsed):
        if program.endswith('.py'):
            runpy.run_path(str(ROOT / program), run_name='__main__')
        else:
            runpy.run_module(program, run_name='__main__')


@documents_with('sh')
def test_commands_are_understood(document, monkeypatch):
    monkeypatch.chdir(ROOT)  # configurations are named from there
    for block in BLOCKS[document]:
        if block.language == 'sh':
            for launcher, program, arguments in commands(block.code):
                with monkeypatch.context() as patch:
                    parse(launcher, program, arguments, patch)


TO_RUN = [(document, block) for document in DOCUMENTS for block in BLOCKS[document] if block.kind == 'run']


@pytest.mark.parametrize('document, block', TO_RUN, ids=[f'{path.name}-{block.line}' for path, block in TO_RUN])
def test_commands_run(document, block, empty_folder):
    (empty_folder / 'configs').symlink_to(ROOT / 'configs')
    write_images(empty_folder / 'my_images')
    found = list(commands(block.code))
    assert found
    for _, program, arguments in found:
        run(program, *arguments, *shlex.split(block.argument))


def write_images(folder):
    """Some of two classes, as a document's reader has them."""
    for name in ('train/cat', 'train/dog', 'validation/cat', 'validation/dog'):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.randint(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f'{number}.jpg')


def test_figures_are_those_of_their_script(tmp_path):
    """Not byte by byte: versions of matplotlib differ."""
    script = runpy.run_path(str(ROOT / 'docs' / 'site' / 'figures.py'))
    script['main'].__globals__['FIGURES'] = tmp_path
    script['main']()
    drawn, committed = ({path.name for path in folder.iterdir()} for folder in (tmp_path, ROOT / 'docs' / 'figures'))
    shown = set(re.findall(r'\(figures/([\w.]+)\)', (ROOT / 'docs' / 'how_it_works.md').read_text()))
    assert drawn == committed == shown and len(shown) == 3


def test_the_notebook_is_small_and_shows_what_it_did():
    path = ROOT / 'docs' / 'notebook.ipynb'
    cells = [cell for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == 'code']
    outputs = [output for cell in cells for output in cell['outputs']]
    assert path.stat().st_size < 100_000
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    assert any('image/png' in output.get('data', {}) for output in outputs)
    assert all(output.get('name') != 'stderr' and output['output_type'] != 'error' for output in outputs)
