"""The house's plan: which rooms may know which, how large a file may grow, where private names of others may stand."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGE = 'timm_gpd'
PROGRAMS = ('train', 'validate')
MAX_FILE, MAX_CLASS = 450, 250

# A room and the rooms and modules of the package that it may import, beside itself and what is at the bottom. The
# package's own face, `timm_gpd`, stands above task: it is what a user imports.
BOTTOM = {'errors', 'version', 'command_line', 'private_torch', 'private_timm'}
EXPANSION = {'axes', 'plan', 'rules', 'expansion'}
TEACHER = EXPANSION | {'teacher'}
TASK = TEACHER | {'losses', 'distillers', 'task'}
TRAINING = TASK | {'data', 'models', 'student_folder', 'training'}
MAY_IMPORT = {
    **dict.fromkeys(BOTTOM, set()),
    'axes': set(),
    'plan': {'axes'},
    'rules': {'axes', 'plan'},
    'expansion': EXPANSION,
    'coverage': TASK,  # it does what a user does: teacher, task, checkpoints
    'teacher': TEACHER,
    'losses': set(),
    'distillers': {'losses'},
    'task': TASK,
    'models': TEACHER,
    'student_folder': set(),
    'data': set(),
    '': TASK | {'models', 'rank'},
    'training': TRAINING,
    'hub': TRAINING,
    'rank': TRAINING,
    'train': TRAINING,
    'validate': TRAINING,
}


def module_name(path):
    """Dotted name of a file of the package, or of a program."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {
    module_name(path): path
    for path in [*sorted((ROOT / PACKAGE).rglob('*.py')), *(ROOT / f'{name}.py' for name in PROGRAMS)]
}
TREES = {name: ast.parse(path.read_text(), path.name) for name, path in FILES.items()}


def room(module):
    """First part of a module's name inside the package; '' is the package's face."""
    return module if module in PROGRAMS else (module.split('.') + [''])[1]


def imported_modules(name):
    """Modules of the package that a module names in its import statements, those inside functions included."""
    package = name if FILES[name].name == '__init__.py' else name.rpartition('.')[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parents = package.split('.')
                parents = parents[: len(parents) - node.level + 1]
                base = '.'.join(parents + ([base] if base else []))
            # `from package import name` imports the module of that name, where there is one.
            targets = [f'{base}.{alias.name}' if f'{base}.{alias.name}' in FILES else base for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split('.')[0] == PACKAGE:
                assert target in FILES, f'{name} imports {target}, which is not there'
                yield target


GRAPH = {name: sorted(set(imported_modules(name)) - {name}) for name in FILES}


def test_no_module_imports_itself_by_way_of_others():
    remaining = dict(GRAPH)
    while True:  # takes away what imports nothing that remains
        free = [name for name, targets in remaining.items() if not set(targets) & remaining.keys()]
        if not free:
            break
        for name in free:
            del remaining[name]
    lines = [f'{name} -> {", ".join(set(targets) & remaining.keys())}' for name, targets in remaining.items()]
    assert not remaining, 'imports in a circle:\n' + '\n'.join(lines)


def test_rooms_import_only_what_is_below_them():
    upwards = [
        f'{name} imports {target}'
        for name, targets in GRAPH.items()
        for target in targets
        if room(target) != room(name) and room(target) not in MAY_IMPORT[room(name)] | BOTTOM
    ]
    assert not upwards, '\n'.join(upwards)


def test_every_room_has_its_place():
    assert {room(name) for name in FILES} == MAY_IMPORT.keys()


def test_the_bottom_imports_only_itself():
    above = [
        f'{name} imports {target}'
        for name in FILES
        if room(name) in BOTTOM
        for target in GRAPH[name]
        if room(target) not in BOTTOM
    ]
    assert not above, '\n'.join(above)


@pytest.mark.parametrize('folder', [PACKAGE, 'tests', 'benchmarks', '.'])
def test_no_file_and_no_class_is_too_long(folder):
    long = []
    for path in sorted((ROOT / folder).glob('*.py') if folder == '.' else (ROOT / folder).rglob('*.py')):
        source, name = path.read_text(), path.relative_to(ROOT)
        lines = len(source.splitlines())
        if lines > MAX_FILE:
            long.append(f'{name}: {lines} lines')
        long += [
            f'{name}: class {node.name} has {node.end_lineno - node.lineno + 1} lines'
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno + 1 > MAX_CLASS
        ]
    assert not long, '\n'.join(long)


def dotted(node):
    """`a.b.c` of an expression that is one, else None."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return '.'.join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def is_private(name):
    return any(part.startswith('_') and not part.startswith('__') for part in name.split('.'))


def private_names(tree):
    """Names of torch and timm with an underscore in front, as `module.name`, with their lines."""
    origins = {}  # a name in this file -> what it is a name of
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local, origin = (alias.asname, alias.name) if alias.asname else (alias.name.split('.')[0],) * 2
                origins[local] = origin
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                origins[alias.asname or alias.name] = f'{node.module}.{alias.name}'
                yield f'{node.module}.{alias.name}', node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            if name is not None and name.split('.')[0] in origins:
                first, _, rest = name.partition('.')
                yield f'{origins[first]}.{rest}', node.lineno


@pytest.mark.parametrize(
    'source, found',
    [
        ('import torch\ntorch._foreach_mul(a, b)', ['torch._foreach_mul']),
        ('import torch.nn as nn\nnn.modules.batchnorm._BatchNorm', ['torch.nn.modules.batchnorm._BatchNorm']),
        ('from timm.models._features import feature_take_indices', ['timm.models._features.feature_take_indices']),
        ('def f():\n    from torch import _C', ['torch._C']),
        ('import torch\ntorch.__version__\nself._torch._x\n_private = torch.add', []),
    ],
)
def test_private_names_are_found(source, found):
    assert sorted({name for name, _ in private_names(ast.parse(source)) if is_private(name)}) == found


def test_private_names_of_torch_and_timm_stand_in_one_module_each():
    homes = {f'{PACKAGE}.private_torch', f'{PACKAGE}.private_timm'}
    trees = {
        **{name: tree for name, tree in TREES.items() if name not in homes},
        **{str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in (ROOT / 'benchmarks').glob('*.py')},
    }
    strays = sorted(
        {
            f'{module}, line {line}: {name}'
            for module, tree in trees.items()
            for name, line in private_names(tree)
            if name.split('.')[0] in ('torch', 'timm', 'torchvision') and is_private(name)
        }
    )
    assert not strays, '\n'.join(strays)


# Of Python: documented, or argparse's. Of nn.Module: dictionaries that its subclasses may use.
KNOWN = {'_asdict', '_fields', '_exit', '_actions', '_ArgumentGroup', '_parameters', '_modules', '_buffers'}


def test_private_attributes_of_others_stand_there_too():
    """Those that nothing in the package defines, also where ``getattr`` names them."""
    used, defined = {}, set()
    for module, tree in TREES.items():
        if module.startswith(f'{PACKAGE}.private_'):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            elif isinstance(node, ast.Attribute):
                used.setdefault(node.attr, []).append(f'{module}, line {node.lineno}')
            elif isinstance(node, ast.Call) and dotted(node.func) in ('getattr', 'hasattr', 'setattr'):
                if len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                    used.setdefault(node.args[1].value, []).append(f'{module}, line {node.lineno}')
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                name = getattr(part, 'name', '')
                if is_private(name) and hasattr(torch.nn.Module, name):
                    used.setdefault(f'{name}, which may be that of nn.Module', []).append(f'{module}, {part.lineno}')
    assert '_parameters' in used and '_RULES' in defined
    strays = {name: places for name, places in used.items() if is_private(name) and name not in defined | KNOWN}
    assert not strays


ALONE = """
import gc, importlib, sys, types
import timm, torch._dynamo.config, torch._inductor.config
gc.collect(), gc.freeze()  # garbage is looked for many times, and is not there
failed = []
for name in sys.argv[2:]:
    for loaded in [module for module in sys.modules if module.split('.')[0] == 'timm_gpd']:
        del sys.modules[loaded]
    if name != 'timm_gpd':  # its face imports everything, in an order that could hide what a module lacks
        face = types.ModuleType('timm_gpd')
        face.__path__ = [sys.argv[1]]
        sys.modules['timm_gpd'] = face
    try:
        importlib.import_module(name)
    except Exception as error:
        failed.append(f'{name}: {type(error).__name__}: {error}')
sys.exit('\\n'.join(failed) or 0)
"""


def test_every_module_can_be_imported_first():
    modules = [name for name in FILES if not name.endswith('__main__') and name not in PROGRAMS]
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', ALONE, str(ROOT / PACKAGE), *modules],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
