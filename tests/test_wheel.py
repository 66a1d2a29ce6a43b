"""What `python -m build` makes: nothing is missing, nothing superfluous, and the wheel passes the README's Python."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from timm_gpd.version import __version__

ROOT = Path(__file__).parents[1]
NAME = f'timm_gpd-{__version__}'
FOLDERS = ['timm_gpd', 'tests', 'benchmarks', 'configs', 'docs']
OF_THE_PACKAGE = {str(path.relative_to(ROOT)) for path in (ROOT / 'timm_gpd').rglob('*') if path.suffix == '.py'}


def run(*command, **kwargs):
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """Both distributions, built from a copy, as building writes beside its sources; the wheel from the other one."""
    folder = tmp_path_factory.mktemp('built')
    source = folder / 'source'
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, cwd=source)
    return folder


def test_the_source_distribution_holds_the_package_and_the_programs(built):
    with tarfile.open(built / f'{NAME}.tar.gz') as archive:
        names = {member.name.partition('/')[2] for member in archive if member.isfile()}
    others = {'README.md', 'LICENSE', 'CHANGELOG.md', 'CITATION.cff', 'MANIFEST.in', 'setup.cfg', 'pyproject.toml'}
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / 'configs').rglob('*.yaml')}
    expected = OF_THE_PACKAGE | others | configs | {'train.py', 'validate.py', 'PKG-INFO'}
    assert {name for name in names if not name.startswith('timm_gpd.egg-info/')} == expected


def test_the_wheel_holds_the_package_alone(built):
    with zipfile.ZipFile(built / f'{NAME}-py3-none-any.whl') as archive:
        names = set(archive.namelist())
        metadata = archive.read(f'{NAME}.dist-info/METADATA').decode()
    assert {name for name in names if not name.startswith(f'{NAME}.dist-info/')} == OF_THE_PACKAGE
    assert f'{NAME}.dist-info/licenses/LICENSE' in names
    assert 'License: Apache-2.0' in metadata or 'License-Expression: Apache-2.0' in metadata
    assert (ROOT / 'README.md').read_text().strip() in metadata


CODE = """
import sys
import timm_gpd
assert timm_gpd.__file__.startswith(sys.prefix), timm_gpd.__file__
for block in open(sys.argv[1]).read().split('```python')[1:]:
    exec(block.split('```')[0])
print('passed')
"""


def test_the_wheel_passes_the_readmes_python(built):
    """In an environment that has what the wheel requires, which would take minutes to install, and not this package."""
    environment, empty = built / 'environment', built / 'empty'
    empty.mkdir()
    run(sys.executable, '-m', 'venv', '--without-pip', environment)
    python = environment / 'bin' / 'python'
    own = next((environment / 'lib').glob('python*/site-packages'))
    installed = [path for path in sys.path if Path(path).name in ('site-packages', 'dist-packages')]
    (own / 'installed.pth').write_text('\n'.join(installed))  # what a line of it names has no .pth files of its own
    wheel = built / f'{NAME}-py3-none-any.whl'
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', '--no-index', wheel)
    assert run(python, '-I', '-W', 'ignore', '-c', CODE, ROOT / 'README.md', cwd=empty).splitlines()[-1] == 'passed'
