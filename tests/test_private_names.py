"""Every private name of torch and timm that the package uses: that it is there, and that it does what ours says."""

import ast
import importlib
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
import torch._dynamo.config
import torch._inductor.config
import torch.nn as nn

from test_layout import is_private, private_names
from timm_gpd import private_timm, private_torch
from timm_gpd.axes import AxisMap, TensorMap
from timm_gpd.teacher.shared_tensors import add_to_first_replicas

HOMES = {private_torch: torch, private_timm: timm}
TRACES = hasattr(torch._dynamo.config, 'trace_autograd_ops')
INHERITED = ('_flat_weights', '_init_flat_weights')  # of a module, so no names of torch itself


def describe(home, name):
    """What a failure says: which name, in which version, and which version was checked."""
    library = HOMES[home]
    checked = re.search(r'Checked with \w+ ([\d.]+)\.', home.__doc__).group(1)
    return (
        f'{name} of {library.__name__} {library.__version__} is not what {home.__name__.rpartition(".")[2]}.py, '
        f'checked with {library.__name__} {checked}, takes it for'
    )


@contextmanager
def relies_on(home, name):
    try:
        yield
    except Exception as error:
        pytest.fail(f'{describe(home, name)}: {type(error).__name__}: {error}')


def used_names():
    for home in HOMES:
        tree = ast.parse(Path(home.__file__).read_text())
        for name in sorted({name for name, _ in private_names(tree) if is_private(name)}):
            yield pytest.param(home, name, id=name)


def resolve(name):
    """What a dotted name stands for: the longest part that is a module, then attributes."""
    parts = name.split('.')
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module('.'.join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


@pytest.mark.parametrize('home, name', used_names())
def test_is_there(home, name):
    if name == 'torch._dynamo.config.trace_autograd_ops' and not TRACES:
        pytest.skip(f'came after torch {torch.__version__}; the backward pass is traced only where it is')
    with relies_on(home, name):
        resolve(name)


def test_a_failure_names_what_is_gone():
    with pytest.raises(
        pytest.fail.Exception,
        match=(
            rf'torch._foreach_gone of torch {re.escape(torch.__version__)} is not what private_torch.py, checked with '
            r'torch [\d.]+, takes it for: AttributeError: .*_foreach_gone'
        ),
    ):
        with relies_on(private_torch, 'torch._foreach_gone'):
            resolve('torch._foreach_gone')


@pytest.mark.parametrize('home', HOMES, ids=lambda home: home.__name__)
def test_nothing_is_left_out(home):
    source = Path(__file__).read_text()
    prefix = home.__name__.rpartition('.')[2]
    assert [name for name in home.__all__ if f'{prefix}.{name}' not in source] == []


def test_norms_of_every_number_of_dimensions():
    with relies_on(private_torch, 'torch.nn.modules.batchnorm._BatchNorm'):
        norms = [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)]
        assert all(isinstance(norm, private_torch.BatchNorm) for norm in norms)
        assert not isinstance(nn.GroupNorm(1, 2), private_torch.BatchNorm)
    with relies_on(private_torch, 'torch.nn.modules.instancenorm._InstanceNorm'):
        norms = [nn.InstanceNorm1d(2), nn.InstanceNorm2d(2), nn.InstanceNorm3d(2)]
        assert all(isinstance(norm, private_torch.InstanceNorm) for norm in norms)
        assert not isinstance(nn.LayerNorm(2), private_torch.InstanceNorm)


def test_products_and_sums_of_many():
    tensors = [torch.arange(3.0), torch.ones(2, 2)]
    with relies_on(private_torch, 'torch._foreach_mul'):
        for factors in ([2.0, 3.0], torch.tensor(4.0)):
            products = private_torch.multiply_each(tensors, factors)
            expected = [
                tensor * factor
                for tensor, factor in zip(tensors, factors if isinstance(factors, list) else [factors] * 2)
            ]
            assert all(torch.equal(product, other) for product, other in zip(products, expected))
    with relies_on(private_torch, 'torch._foreach_add_'):
        addresses = [tensor.data_ptr() for tensor in tensors]
        private_torch.add_each_(tensors, [torch.ones(3), torch.full((2, 2), 5.0)])
        assert tensors[0].tolist() == [1, 2, 3] and tensors[1].tolist() == [[6, 6], [6, 6]]
        assert [tensor.data_ptr() for tensor in tensors] == addresses


@pytest.mark.usefixtures('may_change_settings')
def test_a_backward_pass_is_traced():
    if not TRACES:
        pytest.skip(f'torch {torch.__version__} cannot')

    def slope(x):
        y = (x**3).sum()
        (gradient,) = torch.autograd.grad(y, x)
        return gradient * 2

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with relies_on(private_torch, 'torch._dynamo.config.trace_autograd_ops'):
        private_torch.trace_backward()
        assert private_torch.can_trace_backward()
        torch._dynamo.reset()
        assert torch.compile(lambda x: slope(x * 1), backend='eager', fullgraph=True)(x).tolist() == [6, 24]


@pytest.mark.usefixtures('may_change_settings')
@pytest.mark.skipif(not shutil.which('g++'), reason='needs a compiler')
def test_operators_that_write_into_lists_are_compiled():
    if not private_torch.compiles_writing_operators():
        pytest.skip(f'the Inductor of torch {torch.__version__} loses some; they are not used')
    tensor_map = TensorMap((4, 3), ((0, AxisMap.uniform(4, 2)),))

    def add(wholes, parts):
        wholes = [whole * 2 for whole in wholes]
        add_to_first_replicas(wholes, parts, [tensor_map] * 2)
        return [whole + 1 for whole in wholes]

    wholes, parts = torch.randn(2, 8, 3).unbind(), torch.randn(2, 4, 3).unbind()
    torch._dynamo.reset()
    for actual, expected in zip(torch.compile(add, fullgraph=True)(wholes, parts), add(wholes, parts), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures('may_change_settings')
def test_layouts_are_kept_or_not():
    with relies_on(private_torch, 'torch._inductor.config.layout_optimization'):
        for keep in (True, False):
            private_torch.set_keep_compiled_layouts(keep)
            assert private_torch.keeps_compiled_layouts() is keep
            assert torch._inductor.config.get_config_copy()['layout_optimization'] is not keep  # what Inductor reads


def test_transforms_are_seen():
    seen = []

    def look(x):
        seen.append(private_torch.has_active_transforms())
        return x.sum()

    with relies_on(private_torch, 'torch._C._are_functorch_transforms_active'):
        x = torch.ones(2)
        look(x)
        torch.func.vmap(look)(torch.ones(2, 2))
        torch.func.grad(look)(x)
        torch.func.jvp(look, (x,), (x,))
        torch.autograd.grad(look(x.requires_grad_()), x)
        assert seen == [False, True, True, True, False]


def test_forward_mode_is_seen():
    with relies_on(private_torch, 'torch.autograd.forward_ad._current_level'):
        assert not private_torch.has_forward_mode()
        with torch.autograd.forward_ad.dual_level():
            assert private_torch.has_forward_mode()
        assert not private_torch.has_forward_mode()


@pytest.mark.parametrize('layer', [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrent_layer_runs_on_its_list_of_weights(layer):
    module, other = layer(3, 4), layer(3, 4)
    x = torch.randn(5, 3)
    expected = other(x)[0]
    with relies_on(private_torch, ' and '.join(INHERITED)):
        private_torch.forget_flat_weights(module)
        assert all(weight is None for weight in module._flat_weights)
        for name, parameter in other.named_parameters():
            setattr(module, name, parameter)
        private_torch.list_flat_weights(module)
        assert all(
            weight is getattr(module, name) for name, weight in zip(module._flat_weights_names, module._flat_weights)
        )
        assert torch.equal(module(x)[0], expected)


def test_tensors_of_nested_arguments_are_mapped():
    with relies_on(private_torch, 'torch.utils._pytree.tree_map_only'):
        tensor, other = torch.ones(2), object()
        mapped = private_torch.tree_map_only(torch.Tensor, lambda x: x + 1, ([tensor, 3], {'a': (tensor, other)}))
        assert mapped[0][0].tolist() == mapped[1]['a'][0].tolist() == [2, 2]
        assert mapped[0][1] == 3 and mapped[1]['a'][1] is other


def test_features_are_taken_by_index():
    with relies_on(private_timm, 'timm.models._features.feature_take_indices'):
        assert private_timm.feature_take_indices(5) == ([0, 1, 2, 3, 4], 4)
        assert private_timm.feature_take_indices(5, 2) == ([3, 4], 4)
        assert private_timm.feature_take_indices(5, [0, -2]) == ([0, 3], 3)


def test_a_checkpoint_computes_again():
    calls = []

    def cube(x):
        calls.append(torch.is_grad_enabled())
        return x**3

    with relies_on(private_timm, 'timm.models._manipulate.checkpoint'):
        x = torch.tensor(2.0, requires_grad=True)
        result = private_timm.checkpoint(cube, x)
        assert len(calls) == 1
        result.backward()
        assert len(calls) == 2 and x.grad == 12


def test_operators_are_seen_and_leaves_are_found():
    seen = []

    class Look(private_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with relies_on(private_torch, 'torch.utils._python_dispatch.TorchDispatchMode'):
        with Look():
            torch.ones(2).mul(2)
        assert all(isinstance(func, private_torch.OpOverload) for func in seen)
        assert torch.ops.aten.mul.Tensor in seen
        with Look():
            torch.ones(2).double()
        assert private_torch.TO_COPY.default in seen
    with relies_on(private_torch, 'torch.utils._pytree.tree_leaves'):
        assert private_torch.tree_leaves([1, {'a': (2, 3)}]) == [1, 2, 3]


def test_views_are_told_from_copies():
    tensor = torch.zeros(2, 3)
    with relies_on(private_torch, 'torch.Tensor._is_view'):
        assert private_torch.is_view(tensor.t()) and private_torch.is_view(tensor[0])
        assert not private_torch.is_view(tensor) and not private_torch.is_view(tensor + 1)
        meta = torch.zeros(2, 3, device='meta')
        assert private_torch.is_view(meta.view(6)) and not private_torch.is_view(meta.clone())


def test_wrappers_and_hooks_of_modules_are_seen():
    layer = nn.Linear(2, 2)
    with relies_on(private_torch, 'torch._dynamo.eval_frame.OptimizedModule._orig_mod'):
        assert private_torch.uncompiled(torch.compile(layer)) is layer and private_torch.uncompiled(layer) is layer
    with relies_on(private_torch, 'torch.nn.Module._is_replica'):
        assert not private_torch.is_replica(layer)
        assert private_torch.is_replica(layer._replicate_for_data_parallel())
    with relies_on(private_torch, 'torch.nn.Module._forward_pre_hooks'):
        assert private_torch.pre_hooks_of(layer) == []
        layer.register_forward_pre_hook(print)
        assert private_torch.pre_hooks_of(layer) == [print]


@pytest.mark.parametrize(
    'register',
    [
        'register_forward_pre_hook',
        'register_forward_hook',
        'register_full_backward_pre_hook',
        'register_full_backward_hook',
        'register_state_dict_pre_hook',
        'register_state_dict_post_hook',
        'register_load_state_dict_pre_hook',
        'register_load_state_dict_post_hook',
    ],
)
def test_hooks_of_modules_are_in_tables(register):
    with relies_on(private_torch, register):
        module = nn.Linear(2, 2)
        getattr(module, register)(lambda *_: None)
        assert [name for name in private_torch.HOOK_TABLES if getattr(module, name)]
        assert {*private_torch.HOOK_TABLES, '_parameters', '_modules', 'training'} <= private_torch.MODULE_ATTRIBUTES
        assert module.__dict__.keys() - private_torch.MODULE_ATTRIBUTES == {'in_features', 'out_features'}


def test_a_module_keeps_its_compiled_call_under_that_name():
    layer = nn.Linear(2, 2)
    with relies_on(private_torch, f'torch.nn.Module.{private_torch.COMPILED_CALL}'):
        layer.compile(backend='eager')
        assert private_torch.COMPILED_CALL in vars(layer)
        del vars(layer)[private_torch.COMPILED_CALL]
        assert layer(torch.ones(2)).shape == (2,)
