"""What the README promises, and that flags of documents are those of the programs."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from timm_gpd.training.args import parse_train_args, parse_validate_args

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
DOCUMENTS = [README, *sorted((ROOT / 'docs').glob('*.md'))]


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
        return float(Fraction(said)) == float(default)  # 8/255, too
    except ValueError:
        return said == default


@pytest.mark.parametrize('document', [path for path in DOCUMENTS if any(flag_rows(path))], ids=lambda path: path.name)
def test_flags_of_the_tables_are_the_parsers(document):
    defaults = {**vars(parse_validate_args([])), **vars(parse_train_args([]))}
    for flag, default, mentioned in flag_rows(document):
        names = [name.lstrip('-').replace('-', '_') for name in (flag, *mentioned)]
        assert [name for name in names if name not in defaults] == [], f'{document.name}: {flag}'
        # A document may say what a flag that is not given leads to; the README says the parser's default.
        if document == README or defaults[names[0]] is not None and default:
            assert same_value(default, defaults[names[0]]), f'{document.name}: {flag} is {defaults[names[0]]!r}'


def test_the_readme_shows_its_commands():
    commands = '\n'.join(code_blocks(README, 'sh'))
    assert all(f'python {program}' in commands for program in ('train.py', 'validate.py', 'benchmarks/digits.py'))
    assert len(list(flag_rows(README))) >= 7
