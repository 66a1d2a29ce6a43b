"""Every public function says what it takes, returns and raises."""

import ast
import importlib
import inspect
import re
import textwrap

PACKAGE = 'timm_gpd'
FACES = [
    'timm_gpd',
    *(f'timm_gpd.{room}' for room in ('rules', 'losses', 'distillers', 'task', 'task.gap_control', 'teacher')),
    *(
        f'timm_gpd.{room}'
        for room in ('models.releases', 'models.weights', 'student_folder', 'hub', 'coverage', 'rank', 'data.glyphs')
    ),
]


def listed(doc, *sections):
    """Names that sections of a docstring explain."""
    bodies = (re.search(rf'^{section}:\n((?: .*\n|\n)*)', f'{doc}\n', re.M) for section in sections)
    return {name for body in bodies if body for name in re.findall(r'^ {4}\*{0,2}(\w+):', body[1], re.M)}


def raises(function):
    """Whether a function, and none inside it, raises an error that it did not catch."""
    try:
        nodes = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body
    except OSError:  # a dataclass or a NamedTuple wrote it
        return False
    for node in nodes:
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            nodes.extend(ast.iter_child_nodes(node))
    return False


def missing(function, doc, is_constructor=False):
    """What a docstring lacks of what the signature and the body of its function show."""
    if not doc:
        return ['a docstring']
    signature = inspect.signature(function)
    parameters = signature.parameters.keys() - {'self', 'cls', '_cls'}
    known = listed(doc, 'Args', 'Attributes') if is_constructor else listed(doc, 'Args')
    found = [f'{name} in Args' for name in sorted(parameters - known)]
    found += [f'a parameter {name}, which is in Args' for name in sorted(listed(doc, 'Args') - parameters)]
    returns = not is_constructor and signature.return_annotation not in (None, 'None')
    if returns and not re.search('^(Returns|Yields):', doc, re.M):
        found.append('Returns')
    if raises(function) and not re.search('^Raises:', doc, re.M):
        found.append('Raises')
    return found


def functions_of(cls):
    """Names and gaps of a class's functions that this package defines; those that have torch's docstring need none."""
    for base in (base for base in cls.__mro__ if base.__module__.split('.')[0] in (PACKAGE, __name__)):
        for name, value in vars(base).items():
            function = inspect.unwrap(getattr(value, '__func__', value))
            full_name = f'{base.__module__}.{base.__name__}.{name}'
            if name == '__init__' or (name == '__new__' and hasattr(base, '_fields')):
                yield full_name, missing(function, inspect.getdoc(base), is_constructor=True)
            elif isinstance(value, property):
                yield full_name, [] if value.__doc__ else ['a docstring']
            elif inspect.isfunction(function) and not name.startswith('_'):
                is_torchs = any(name in vars(k) for k in base.__mro__ if k.__module__.split('.')[0] == 'torch')
                if function.__doc__ or name == 'forward' or not is_torchs:
                    yield full_name, missing(function, inspect.getdoc(getattr(base, name)))


def gaps(objects):
    """What is missing, a line for each function."""
    found = {}
    for value in objects:
        if inspect.isclass(value):
            found.update(functions_of(value))
        elif inspect.isfunction(value):
            found[f'{value.__module__}.{value.__name__}'] = missing(inspect.unwrap(value), inspect.getdoc(value))
    return [f'{name}: {", ".join(lacks)}' for name, lacks in sorted(found.items()) if lacks]


def test_public_functions_say_what_they_take_return_and_raise():
    modules = [importlib.import_module(face) for face in FACES]
    lines = gaps([getattr(module, name) for module in modules for name in module.__all__])
    assert not lines, 'missing in docstrings:\n' + '\n'.join(lines)


class Half:
    """Half documented."""

    def __init__(self, size: int) -> None:
        self.size = size

    def grow(self, by: int) -> int:
        """Grows.

        Args:
            factor: how much.
        """
        if by < 1:
            raise ValueError
        return self.size * by

    def shrink(self) -> None:
        """Shrinks; what is raised inside a function, or again, is not its own."""

        def fail():
            raise ValueError

        try:
            fail()
        except ValueError:
            raise


def test_gaps_are_found():
    assert gaps([Half, Half.shrink]) == [
        f'{__name__}.Half.__init__: size in Args',
        f'{__name__}.Half.grow: by in Args, a parameter factor, which is in Args, Returns, Raises',
    ]
