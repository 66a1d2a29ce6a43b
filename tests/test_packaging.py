"""What setup.cfg declares: every package that is imported, none that is not, and every folder of the package."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest
import yaml

from timm_gpd.version import __version__

ROOT = Path(__file__).parents[1]
# Where the name differs, or one comes with the other.
DISTRIBUTIONS = {'PIL': 'pillow', 'sklearn': 'scikit-learn', 'scipy': 'scikit-learn', 'yaml': 'pyyaml'}
FOLDERS = ['', 'tests', 'benchmarks']  # whose modules import one another by name alone
NOT_IMPORTED = {'build', 'pytest-xdist', 'pytest-randomly', 'ruff', 'setuptools', 'mypy'}  # run, not imported

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / 'setup.cfg')


def declared(section, option):
    """Names of the packages that are declared, with their versions taken off."""
    return {re.match(r'[\w-]+', line).group().lower() for line in SETUP[section][option].split('\n') if line.strip()}


REQUIRED = declared('options', 'install_requires')
EXTRAS = {option: declared('options.extras_require', option) for option in SETUP['options.extras_require']}


def imported(path, everywhere=True):
    """Packages that a file imports from elsewhere; without ``everywhere`` only those that importing the file needs."""
    nodes = list(ast.parse(path.read_text()).body)
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            if everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                nodes += ast.iter_child_nodes(node)
            continue
        for name in names:
            package = name.split('.')[0]
            # `benchmarks/kill.py` compares runs with what tests compare them with
            own = package == 'timm_gpd' or any((ROOT / folder / f'{package}.py').exists() for folder in FOLDERS)
            if package not in sys.stdlib_module_names and not own:
                yield DISTRIBUTIONS.get(package, package)


def imported_by(*patterns, everywhere=True):
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert paths
    return {name for path in paths for name in imported(path, everywhere)}


def test_what_the_package_needs_is_required():
    assert imported_by('timm_gpd/**/*.py', 'train.py', 'validate.py', everywhere=False) == REQUIRED


def test_what_it_imports_where_it_is_used_is_an_extra():
    optional = imported_by('timm_gpd/**/*.py', 'train.py', 'validate.py') - REQUIRED
    assert optional == EXTRAS['demo']


@pytest.mark.parametrize(
    'extra, patterns', [('demo', ['benchmarks/*.py']), ('test', ['tests/*.py', 'benchmarks/*.py'])]
)
def test_extras_hold_what_their_files_import(extra, patterns):
    used = imported_by(*patterns, 'timm_gpd/**/*.py') - REQUIRED
    assert used == EXTRAS[extra] - NOT_IMPORTED


def test_every_required_package_has_a_lowest_version():
    lines = [line for line in SETUP['options']['install_requires'].split('\n') if line.strip()]
    assert [line for line in lines if not re.fullmatch(r'[\w-]+>=[\d.]+', line)] == []


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == __version__ and f'## {__version__}' in (ROOT / 'CHANGELOG.md').read_text()
    paper = citation['references'][0]
    readme = (ROOT / 'README.md').read_text()
    assert paper['title'] in readme and paper['url'] in readme
    assert all(f'{author["family-names"]}, {author["given-names"]}' in readme for author in paper['authors'])


def test_every_folder_is_found_as_a_package():
    """`packages = find:` takes the folders that hold an `__init__.py`."""
    folders = {path.parent for path in (ROOT / 'timm_gpd').rglob('*.py')}
    assert [folder.name for folder in folders if not (folder / '__init__.py').exists()] == []
    assert SETUP['options.packages.find']['include'] == 'timm_gpd*'
