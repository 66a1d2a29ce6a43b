"""What the README and the documents promise: their code runs, their flags are those of the programs."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch

from timm_gpd.training.args import parse_train_args, parse_validate_args

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
DOCUMENTS = [README, *sorted((ROOT / 'docs').glob('*.md'))]
PARSERS = {'train.py': parse_train_args, 'validate.py': parse_validate_args}


def code_blocks(document, language):
    return re.findall(rf'^```{language}\n(.*?)^```', document.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readmes_python_runs(capsys):
    """It leaves two models that start as one function, and a plain student."""
    namespace = {'__name__': 'readme'}
    blocks = code_blocks(README, 'python')
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), 'exec'), namespace)
    assert 'conv1' in capsys.readouterr().out  # the plan names what widens
    assert namespace['student_logits'].shape == (2, 10)
    torch.testing.assert_close(namespace['teacher_logits'], namespace['student_logits'], rtol=1e-4, atol=1e-5)
    student = namespace['teacher'].extract_student()
    assert type(student) is type(namespace['student'])
    assert student.state_dict().keys() == namespace['student'].state_dict().keys()


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_what_documents_import_is_there(document):
    for block in code_blocks(document, 'python'):
        for statement in ast.walk(ast.parse(block)):
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(statement), {})


def flag_rows(document):
    """Flags of the rows that begin with one: name, default as the table says it, and other flags that it mentions."""
    for line in document.read_text().splitlines():
        if line.startswith('| `--'):
            first, default, *rest = (cell.strip() for cell in line.strip('|').split('|'))
            yield first.strip('`').split()[0], default.strip('`'), re.findall(r'`(--[\w-]+)', ' '.join(rest))


def same_value(said, default):
    if default is None or default is False:
        return said in ('none', 'off')
    try:
        return float(said) == float(default)
    except ValueError:
        return said == default


@pytest.mark.parametrize('document', [path for path in DOCUMENTS if any(flag_rows(path))], ids=lambda path: path.name)
def test_flags_of_the_tables_are_the_parsers(document):
    defaults = vars(parse_train_args([]))
    for flag, default, mentioned in flag_rows(document):
        names = [name.lstrip('-').replace('-', '_') for name in (flag, *mentioned)]
        assert [name for name in names if name not in defaults] == [], f'{document.name}: {flag}'
        # A document may say what a flag that is not given leads to; the README says the parser's default.
        if document == README or defaults[names[0]] is not None and default:
            assert same_value(default, defaults[names[0]]), f'{document.name}: {flag} is {defaults[names[0]]!r}'


def commands(document):
    for block in code_blocks(document, 'sh'):
        for line in block.replace('\\\n', ' ').splitlines():
            match = re.match(r'(?:\S*/)?python (train|validate)\.py (.*)', line)
            if match:
                yield f'{match.group(1)}.py', shlex.split(match.group(2), comments=True)


@pytest.mark.parametrize(
    'program, arguments',
    [
        pytest.param(*command, id=f'{path.name}-{index}')
        for path in DOCUMENTS
        for index, command in enumerate(commands(path))
    ],
)
def test_commands_are_understood(program, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)  # configurations are named from there
    given = PARSERS[program](arguments)
    assert given.data_dir in ('imagenet', 'data/glyphs') or '--data-dir' not in arguments


def test_the_readme_shows_its_commands():
    assert {program for program, _ in commands(README)} == PARSERS.keys()
    assert len(list(flag_rows(README))) >= 7
