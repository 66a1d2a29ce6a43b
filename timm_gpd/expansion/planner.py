"""Infers the expansion plan of a model from a shape-only dry run.

One idea: **a tensor widens when what it meets is wider.** The student runs once on the meta device, where nothing is
computed. Every torch function that its forward calls is seen on the way in. A weight, bias, norm or token that meets an
input wider than itself has just shown which of its axes carry channels, so it is replaced by a wider one, its own
output becomes wider, and the widening flows on to the classifier, which keeps its classes. Since functions are watched
rather than layer classes, a model that calls ``F.linear(x, self.qkv.weight)`` by hand is read as well as ``nn.Linear``.
What shapes cannot tell (head counts, split sizes) comes from :mod:`timm_gpd.rules`.
"""
from dataclasses import replace
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..axes import AxisMap, Segment, TensorMap
from ..errors import UnsupportedModelError
from .images import accepted_input_shape, blank_images, input_shape
from .copies import blank, blank_copy
from ..plan import ExpansionPlan
from ..private_torch import InstanceNorm
from ..rules import find_rule

__all__ = ['plan_expansion', 'check_positive_int']

NO_CLASSIFIER = 'has no classifier'


def plan_expansion(student: nn.Module, ratio: int = 2) -> ExpansionPlan:
    """Plans how every tensor and attribute of a student widens; allocates neither a student nor a teacher.

    Args:
        student: a timm model with a classifier.
        ratio: expansion ratio r of the channels, a positive integer.

    Returns:
        The plan; ``print(plan)`` shows it.

    Raises:
        ValueError: if ``ratio`` is not a positive integer.
        UnsupportedModelError: if the model has no classifier, or a module cannot be widened.
    """
    check_positive_int('ratio', ratio)
    shape = input_shape(student)
    try:
        return _DryRun(student, ratio, shape).plan()
    except UnsupportedModelError:
        accepted = accepted_input_shape(student)
        if accepted == shape:
            raise
    if accepted is not None:
        return _DryRun(student, ratio, accepted).plan()
    note = f'planned on the CPU: the forward of {type(student).__name__} does not run on the meta device'
    return replace(_DryRun(student, ratio, shape, device='cpu').plan(), notes=(note,))


def check_positive_int(name: str, value: Any) -> None:
    """Raises a one-line ValueError unless ``value`` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f'{name} must be a positive integer, but is {value!r}')


def classifier_names(model: nn.Module) -> Set[str]:
    """Names of the modules that produce class logits, as the model's own ``get_classifier()`` tells.

    Raises:
        UnsupportedModelError: if there is none.
    """
    classifiers = model.get_classifier() if hasattr(model, 'get_classifier') else None
    classifiers = classifiers if isinstance(classifiers, (tuple, list)) else (classifiers,)
    wanted = {id(module) for module in classifiers if isinstance(module, nn.Module)}
    names = {
        name for name, module in model.named_modules()
        if id(module) in wanted and any(True for _ in module.parameters())
    }
    if not names:
        raise UnsupportedModelError(
            f'{type(model).__name__} {NO_CLASSIFIER}: create it with num_classes > 0 to distil logits')
    return names


class _DryRun(TorchFunctionMode):
    """Runs the student, on tensors without values, and widens what meets wider inputs."""

    def __init__(self, student: nn.Module, ratio: int, shape: Tuple[int, int, int], device: str = 'meta') -> None:
        super().__init__()
        self.shape = shape
        self.device = device
        self.student_name = type(student).__name__
        self.ratio = ratio
        self.kept = classifier_names(student)
        self.model = blank_copy(student, device)
        self.tensors: Dict[str, TensorMap] = {}
        self.attributes: Dict[str, Dict[str, Tuple[Any, Any]]] = {}
        self.divided_inputs: Dict[str, int] = {}
        self.layouts: Dict[Tuple[str, str], Union[int, AxisMap]] = {}
        self.touched: Set[str] = set()
        self.stack: List[str] = ['']
        self.modules_by_name = dict(self.model.named_modules())

        # A tensor may stand under several names (tied weights); all of them widen together.
        self.names: Dict[str, List[str]] = {}
        first_name: Dict[int, str] = {}
        for module_name, module in self.model.named_modules():
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    continue
                name = f'{module_name}.{key}' if module_name else key
                first = first_name.setdefault(id(tensor), name)
                self.names.setdefault(first, []).append(name)
                tensor.gpd_sources = (first,)
                tensor.gpd_is_own = True
        for name, module in self.model.named_modules():
            module.register_forward_pre_hook(self._enter(name))
            module.register_forward_hook(self._leave)

    # -- the run --------------------------------------------------------------------------------------------------

    def plan(self) -> ExpansionPlan:
        for name in self.modules_by_name:
            self.stack = [name]
            self.apply_rule(name)
        self._forward(training=False)
        parameters = {names[0] for names in self.names.values()} & {n for n, _ in self.model.named_parameters()}
        if parameters - self.touched:
            # Auxiliary heads and the like run in training only.
            try:
                self._forward(training=True)
            except UnsupportedModelError:
                if parameters - self.touched:
                    raise
        return ExpansionPlan(self.ratio, self.tensors, self.attributes, self.divided_inputs)

    def _forward(self, training: bool) -> None:
        self.model.train(training)
        self.stack = ['']
        x = blank_images(self.model, self.shape, self.device)
        try:
            with torch.no_grad(), self:
                self.model(x)
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise self.unsupported(f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}')

    def _enter(self, name: str) -> Callable:
        def pre_hook(module: nn.Module, inputs: Tuple[Any, ...]) -> None:
            self.stack.append(name)
            for cls, handler in _MODULE_HANDLERS.items():
                if isinstance(module, cls):
                    handler(self, name, module, inputs[0])
        return pre_hook

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.stack.pop()

    def unsupported(self, reason: str) -> UnsupportedModelError:
        name = self.stack[-1]
        cls = type(self.modules_by_name[name])
        return UnsupportedModelError(
            f'{self.student_name} cannot be widened: module {name or "(root)"!r} of class '
            f'{cls.__module__}.{cls.__qualname__}: {reason} (register_rule can teach it)')

    # -- rules ----------------------------------------------------------------------------------------------------

    def apply_rule(self, name: str) -> None:
        """Applies the rule of a module; those around it come first."""
        module = self.modules_by_name[name]
        rule = find_rule(module)
        if rule is None:
            return
        for target, block in rule.blocks.items():
            size = block(module) if callable(block) else getattr(module, block) if isinstance(block, str) else block
            for key in self.layout_keys(name, target):
                self.layouts[key] = size
        for pattern in rule.keep:
            self.kept.update(self.children(name, pattern))
        for attribute in rule.multiply:
            self.scale_attribute(name, attribute, lambda value: value * self.ratio)
        for attribute in rule.divide:
            self.scale_attribute(name, attribute, lambda value: value / self.ratio)
        for key, axes in rule.params.items():
            tensor = getattr(module, key, None)
            if isinstance(tensor, torch.Tensor):
                self.widen(tensor, {
                    axis: self.axis(tensor, '', tensor.shape[axis], self.ratio)
                    for axis in ((axes,) if isinstance(axes, int) else axes)})
        if rule.code is not None:
            rule.code(RuleContext(self, name, module))

    def children(self, name: str, pattern: str) -> Iterator[str]:
        """Full names of the modules that a rule's dotted name stands for; ``*`` is any child, '' the module itself."""
        found = [(name, self.modules_by_name[name])]
        for key in filter(None, pattern.split('.')):
            found = [
                (join(path, child), module)
                for path, parent in found for child, module in parent._modules.items()
                if module is not None and key in (child, '*')
            ]
        return iter([path for path, _ in found])

    def layout_keys(self, name: str, target: str) -> Iterator[Tuple[str, str]]:
        """What a rule's ``'<child>.in'``, ``'<child>.out'`` or own ``'<parameter>'`` stands for."""
        child, _, side = target.rpartition('.')
        if side in ('in', 'out'):
            return ((path, side) for path in self.children(name, child))
        return iter([(join(name, target), '')])

    def scale_attribute(self, name: str, attribute: str, scale: Callable[[Any], Any]) -> None:
        """Scales a number, or every number in a tuple or list, that is an attribute of a module."""
        path, _, attribute = attribute.rpartition('.')
        for owner in self.children(name, path):
            value = getattr(self.modules_by_name[owner], attribute, None)
            if value is not None:
                self.set_attribute(owner, attribute, tree_map_only((int, float), scale, value))

    def set_attribute(self, name: str, attribute: str, value: Any) -> None:
        """Sets an attribute of a module in the dry run and notes it for the teacher."""
        module = self.modules_by_name[name]
        before = getattr(module, attribute)
        if before != value:
            changes = self.attributes.setdefault(name, {})
            changes[attribute] = (changes.get(attribute, (before,))[0], value)
            setattr(module, attribute, value)

    # -- widening -------------------------------------------------------------------------------------------------

    def owner(self, tensor: torch.Tensor) -> str:
        """Name of the module that owns a parameter or buffer."""
        return tensor.gpd_sources[0].rpartition('.')[0]

    def is_new(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter or buffer itself, seen for the first time."""
        return _is_own(tensor) and tensor.gpd_sources[0] not in self.touched

    def axis(self, tensor: torch.Tensor, side: str, size: int, ratio: int) -> AxisMap:
        """How an axis of ``size`` entries is replicated: plainly, or as a rule says for it or for a module around it.

        A rule for a whole subtree holds wherever its block divides the axis: the same size gets the same layout.
        """
        owner = self.owner(tensor)
        layout = self.layouts.get((tensor.gpd_sources[0], '')) or self.layouts.get((owner, side or 'out'))
        if layout is None:
            layout = 1
            while owner and layout == 1:
                owner = owner.rpartition('.')[0]
                inherited = self.layouts.get((owner, side or 'out'), 1)
                layout = inherited if isinstance(inherited, AxisMap) or size % inherited == 0 else 1
        if isinstance(layout, AxisMap):
            if layout.size != size:
                raise self.unsupported(f'a rule describes {layout.size} entries of an axis that has {size}')
            return layout
        if size % layout:
            raise self.unsupported(f'{tensor.gpd_sources[0]} has {size} entries, not a multiple of {layout}')
        return AxisMap.uniform(size, ratio, layout)

    def axis_like(self, tensor: torch.Tensor, side: str, size: int, actual: int, what: str) -> AxisMap:
        """How an axis is replicated that meets ``actual`` channels.

        Raises:
            UnsupportedModelError: if no replication of it has that size.
        """
        axis_map = self.axis(tensor, side, size, max(actual // size, 1))
        if axis_map.teacher_size != actual:
            raise self.unsupported(f'{what} expects {size} channels and got {actual}')
        return axis_map

    def out_axis(self, weight: torch.Tensor, size: int) -> AxisMap:
        """How a layer's outputs are replicated. A single output is a mask that broadcasts, unless a rule says more."""
        owner = self.owner(weight)
        kept = any(not name or owner == name or owner.startswith(f'{name}.') for name in self.kept)
        mask = size == 1 and (owner, 'out') not in self.layouts
        return AxisMap.uniform(size, 1) if kept or mask else self.axis(weight, 'out', size, self.ratio)

    def widen(
            self,
            tensor: torch.Tensor,
            axes: Union[Mapping[int, AxisMap], Sequence[Tuple[int, AxisMap]]],
            sum_axis: Optional[int] = None,
    ) -> torch.Tensor:
        """Replaces a parameter or buffer by a wider one, under all its names, and notes how.

        Args:
            tensor: the parameter or buffer.
            axes: axis -> how it is replicated; pairs where an axis holds several flattened ones.
            sum_axis: the axis that the layer sums over.
        """
        first, = tensor.gpd_sources
        self.touched.add(first)
        if first in self.tensors:
            return tensor
        pairs = axes.items() if isinstance(axes, Mapping) else axes
        wider = tuple((axis % tensor.dim(), axis_map) for axis, axis_map in pairs if axis_map.ratio > 1)
        if not wider:
            return tensor
        if any(axis == sum_axis and len({segment.ratio for segment in axis_map}) > 1 for axis, axis_map in wider):
            raise self.unsupported(f'{first} sums over entries of different ratios')
        return self.replace(tensor, TensorMap(tuple(tensor.shape), wider, sum_axis))

    def replace(self, tensor: torch.Tensor, tensor_map: TensorMap) -> torch.Tensor:
        """Puts a blank tensor of the teacher's shape in the place of a parameter or buffer."""
        first, = tensor.gpd_sources
        wide = blank(tensor_map.teacher_shape, tensor.dtype, self.device)
        if isinstance(tensor, nn.Parameter):
            wide = nn.Parameter(wide, requires_grad=tensor.requires_grad)
        wide.gpd_sources, wide.gpd_is_own = (first,), True
        self.touched.add(first)
        for name in self.names[first]:
            owner, _, key = name.rpartition('.')
            module = self.modules_by_name[owner]
            (module._parameters if key in module._parameters else module._buffers)[key] = wide
            self.tensors[name] = tensor_map
        return wide

    def widen_derived(self, tensor: torch.Tensor, ratios: Mapping[int, int]) -> torch.Tensor:
        """Widens the parameter that a tensor was computed from, and the tensor along with it.

        Which axis of a parameter an axis of the result came from is told by its size, which must be unique there.
        """
        if _is_own(tensor):
            return self.widen(tensor, {
                axis: self.axis(tensor, '', tensor.shape[axis], ratio) for axis, ratio in ratios.items()})
        shape = list(tensor.shape)
        for axis, ratio in ratios.items():
            size = shape[axis]
            for source in tensor.gpd_sources:
                parameter = self.parameter(source)
                tensor_map = self.tensors.get(source)
                student_shape = tensor_map.shape if tensor_map else tuple(parameter.shape)
                if student_shape.count(size) != 1:
                    raise self.unsupported(
                        f'an axis of {size} entries, computed from {", ".join(tensor.gpd_sources)}, met one of '
                        f'{size * ratio}, and its origin is not clear')
                index = student_shape.index(size)
                self.widen(parameter, {index: self.axis(parameter, '', size, ratio)})
            shape[axis] = size * ratio
        wide = blank(shape, tensor.dtype, self.device)
        wide.gpd_sources = tensor.gpd_sources
        return wide

    def parameter(self, name: str) -> torch.Tensor:
        owner, _, key = name.rpartition('.')
        return getattr(self.modules_by_name[owner], key)

    # -- the functions that are watched -----------------------------------------------------------------------------

    def __torch_function__(self, func: Callable, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        args, kwargs = tree_map_only(torch.Tensor, self._to_device, (args, kwargs))
        handler = _HANDLERS.get(func) or _HANDLERS_BY_NAME.get(getattr(func, '__name__', '').strip('_'))
        if handler is not None:
            args, kwargs = handler(self, func, args, kwargs)
        output = _STAND_INS.get(func, func)(*args, **kwargs)
        self._note_origin(args, kwargs, output)
        return output

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.device.type == self.device else tensor.to(self.device)

    @staticmethod
    def _note_origin(args: Any, kwargs: Any, output: Any) -> None:
        """A tensor computed from parameters alone still carries their channels: remember which they were."""
        sources: List[str] = []
        for tensor in _tensors((args, kwargs)):
            own = getattr(tensor, 'gpd_sources', None)
            if own is None:
                if tensor.is_floating_point():
                    return
                continue  # an index
            sources += [source for source in own if source not in sources]
        if sources:
            for tensor in _tensors(output):
                if not hasattr(tensor, 'gpd_sources'):
                    tensor.gpd_sources = tuple(sources)


class RuleContext:
    """What a rule's code may do: look at the module, and say how its parts widen."""

    def __init__(self, run: _DryRun, name: str, module: nn.Module) -> None:
        self._run, self._name = run, name
        self.module = module
        self.ratio = run.ratio

    def set(self, attribute: str, value: Any) -> None:
        """Sets an attribute of the module, or of a child by its dotted name, in the teacher."""
        path, _, attribute = attribute.rpartition('.')
        self._run.set_attribute(join(self._name, path), attribute, value)

    def widen(self, tensor: str, axes: Sequence[Tuple[int, AxisMap]], sum_axis: Optional[int] = None) -> None:
        """Widens a parameter or buffer, by its dotted name: axes and how they are replicated, in order."""
        self._run.widen(self._run.parameter(join(self._name, tensor)), axes, sum_axis)

    def layout(self, target: str, *segments: Tuple[int, int, int]) -> None:
        """Says how an axis is replicated, where not all of it is alike.

        Args:
            target: ``'<child>.in'``, ``'<child>.out'`` or an own ``'<parameter>'``, as in ``Rule.blocks``.
            segments: ``(size, ratio, block)`` of each run of entries, in order.
        """
        for key in self._run.layout_keys(self._name, target):
            self._run.layouts[key] = AxisMap(Segment(*segment) for segment in segments)


def join(name: str, child: str) -> str:
    return f'{name}.{child}' if name and child else name or child


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))


def _is_own(tensor: Any) -> bool:
    """Whether a tensor is a parameter or buffer itself, not something computed from one."""
    return isinstance(tensor, torch.Tensor) and getattr(tensor, 'gpd_is_own', False)


def _from_parameters(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, 'gpd_sources')


_HANDLERS: Dict[Callable, Callable] = {}
_HANDLERS_BY_NAME: Dict[str, Callable] = {}


def _watch(*functions: Callable, names: Sequence[str] = ()) -> Callable:
    """Registers a handler ``(run, arguments)`` that edits a function's arguments, by name, before it is called."""
    def register(handler: Callable) -> Callable:
        def handle(run: _DryRun, func: Callable, args: Tuple[Any, ...], kwargs: Dict[str, Any]):
            arguments = {**dict(zip(names, args)), **kwargs}
            handler(run, arguments)
            return (), arguments
        for function in functions:
            _HANDLERS[function] = handle
        return handler
    return register


def _weight(run: _DryRun, a: Dict[str, Any]) -> Optional[torch.Tensor]:
    """The parameter that a layer's weight is, or is computed from entry by entry; None where it has been widened."""
    weight = a['weight']
    if not _from_parameters(weight):
        return None
    if _is_own(weight):
        return weight if run.is_new(weight) else None
    return next((
        run.parameter(source) for source in weight.gpd_sources
        if source not in run.tensors and run.parameter(source).shape == weight.shape), None)


def _widen_weight(
        run: _DryRun, a: Dict[str, Any], parameter: torch.Tensor, axes: Mapping[int, AxisMap], sum_axis: Optional[int],
) -> None:
    """Widens a layer's weight.

    A weight that is computed (weight standardisation) may not be divided by way of its parameter, so the input is divided
    instead; this takes for granted that it is computed alike from every replica.
    """
    if parameter is a['weight']:
        a['weight'] = run.widen(parameter, axes, sum_axis)
        return
    name, sources = run.owner(parameter), a['weight'].gpd_sources
    if name != run.stack[-1]:
        raise run.unsupported(f'a weight is computed from {parameter.gpd_sources[0]}, of another module')
    for source in sources:
        other = run.parameter(source)
        if other.dim() == len(parameter.shape):
            run.widen(other, {
                axis: axis_map for axis, axis_map in axes.items()
                if other is parameter or other.shape[axis] == axis_map.size > 1})
    if sum_axis is not None and axes[sum_axis].ratio > 1:
        run.divided_inputs[name] = axes[sum_axis].ratio
    wide = run.parameter(parameter.gpd_sources[0])
    a['weight'] = blank(wide.shape, wide.dtype, run.device)
    a['weight'].gpd_sources = sources


def _widen_bias_of_tied_weight(run: _DryRun, a: Dict[str, Any]) -> None:
    """A weight that another layer has widened already leaves this layer's bias to be widened like its outputs."""
    weight, bias = a['weight'], a.get('bias')
    if _is_own(weight) and bias is not None and run.is_new(bias) and weight.gpd_sources[0] in run.tensors:
        axes = dict(run.tensors[weight.gpd_sources[0]].axes)
        a['bias'] = run.widen(bias, {0: axes[0]} if 0 in axes else {})


_CONV = ('input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'groups')
_CONV_TRANSPOSE = ('input', 'weight', 'bias', 'stride', 'padding', 'output_padding', 'groups', 'dilation')


@_watch(F.conv1d, F.conv2d, F.conv3d, names=_CONV)
def _conv(run: _DryRun, a: Dict[str, Any]) -> None:
    weight, bias, groups = _weight(run, a), a.get('bias'), a.get('groups', 1)
    if weight is None:
        _widen_bias_of_tied_weight(run, a)
        return
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    actual = a['input'].shape[1 - weight.dim()]
    owner = run.owner(weight)
    if groups == inputs == outputs and groups > 1:
        # Depthwise: nothing is summed over channels, so there are more groups and no divisor.
        out_map = run.axis_like(weight, 'out', outputs, actual, 'a convolution')
        axes, sum_axis = {0: out_map}, None
        a['groups'] = actual
        _set_sizes(run, owner, groups=actual)
    else:
        # Other groups stay: each of them is wider.
        out_map = run.out_axis(weight, outputs)
        in_map = run.axis_like(weight, 'in', weight.shape[1], actual // groups, 'a group of a convolution')
        axes, sum_axis = {0: out_map, 1: in_map}, 1
    _set_sizes(run, owner, in_channels=actual, out_channels=out_map.teacher_size)
    _widen_weight(run, a, weight, axes, sum_axis)
    if _is_own(bias):
        a['bias'] = run.widen(bias, {0: out_map})


@_watch(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, names=_CONV_TRANSPOSE)
def _conv_transpose(run: _DryRun, a: Dict[str, Any]) -> None:
    weight, bias, groups = a['weight'], a.get('bias'), a.get('groups', 1)
    if not run.is_new(weight):
        return
    inputs, outputs = weight.shape[0], weight.shape[1] * groups
    actual = a['input'].shape[1 - weight.dim()]
    owner = run.owner(weight)
    in_map = run.axis_like(weight, 'in', inputs, actual, 'a transposed convolution')
    if groups == inputs == outputs and groups > 1:
        out_map, axes, sum_axis = in_map, {0: in_map}, None
        a['groups'] = actual
        _set_sizes(run, owner, groups=actual)
    else:
        out_map = run.out_axis(weight, weight.shape[1])
        axes, sum_axis = {0: in_map, 1: out_map}, 0
    bias_map = out_map if out_map.size == outputs else run.out_axis(weight, outputs)
    _set_sizes(run, owner, in_channels=actual, out_channels=bias_map.teacher_size)
    a['weight'] = run.widen(weight, axes, sum_axis)
    if _is_own(bias):
        a['bias'] = run.widen(bias, {0: bias_map})


@_watch(F.linear, names=('input', 'weight', 'bias'))
def _linear(run: _DryRun, a: Dict[str, Any]) -> None:
    weight, bias = _weight(run, a), a.get('bias')
    if weight is None:
        _widen_bias_of_tied_weight(run, a)
        return
    outputs, inputs = weight.shape
    actual = a['input'].shape[-1]
    in_map = run.axis_like(weight, 'in', inputs, actual, 'a linear layer')
    out_map = run.out_axis(weight, outputs)
    _set_sizes(run, run.owner(weight), in_features=actual, out_features=out_map.teacher_size)
    _widen_weight(run, a, weight, {0: out_map, 1: in_map}, 1)
    if _is_own(bias):
        a['bias'] = run.widen(bias, {0: out_map})


@_watch(F.embedding, names=('input', 'weight'))
def _embedding(run: _DryRun, a: Dict[str, Any]) -> None:
    if run.is_new(a['weight']):
        axis_map = run.out_axis(a['weight'], a['weight'].shape[1])
        _set_sizes(run, run.owner(a['weight']), embedding_dim=axis_map.teacher_size)
        a['weight'] = run.widen(a['weight'], {1: axis_map})


@_watch(F.batch_norm, names=(
    'input', 'running_mean', 'running_var', 'weight', 'bias', 'training', 'momentum', 'eps'))
def _batch_norm(run: _DryRun, a: Dict[str, Any]) -> None:
    _norm(run, a, ('running_mean', 'running_var', 'weight', 'bias'), axis=1, size_name='num_features')


@_watch(F.instance_norm, names=(
    'input', 'running_mean', 'running_var', 'weight', 'bias', 'use_input_stats', 'momentum', 'eps'))
def _instance_norm(run: _DryRun, a: Dict[str, Any]) -> None:
    _norm(run, a, ('running_mean', 'running_var', 'weight', 'bias'), axis=1, size_name='num_features')


@_watch(F.group_norm, names=('input', 'num_groups', 'weight', 'bias', 'eps'))
def _group_norm(run: _DryRun, a: Dict[str, Any]) -> None:
    _norm(run, a, ('weight', 'bias'), axis=1, size_name='num_channels')


@_watch(F.prelu, names=('input', 'weight'))
def _prelu(run: _DryRun, a: Dict[str, Any]) -> None:
    if a['weight'].numel() > 1:
        _norm(run, a, ('weight',), axis=1, size_name='num_parameters')


def _norm(run: _DryRun, a: Dict[str, Any], keys: Sequence[str], axis: int, size_name: str) -> None:
    """Per-channel tensors along one axis of the input."""
    for key in keys:
        if _is_own(a.get(key)):
            tensor = a[key]
            actual = a['input'].shape[axis]
            axis_map = run.axis_like(tensor, 'out', tensor.shape[0], actual, 'a norm')
            _set_sizes(run, run.owner(tensor), **{size_name: actual})
            a[key] = run.widen(tensor, {0: axis_map})


@_watch(F.layer_norm, names=('input', 'normalized_shape', 'weight', 'bias', 'eps'))
def _layer_norm(run: _DryRun, a: Dict[str, Any]) -> None:
    shape = a['normalized_shape']
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    actual = tuple(a['input'].shape[-len(shape):])
    for key in ('weight', 'bias'):
        if _is_own(a.get(key)) and tuple(a[key].shape) == shape:
            a[key] = run.widen(a[key], {
                axis: run.axis_like(a[key], 'out', shape[axis], actual[axis], 'a norm') for axis in range(len(shape))})
    if actual != shape:
        name = run.stack[-1]
        before = run.modules_by_name[name].normalized_shape
        run.set_attribute(name, 'normalized_shape', type(before)(actual))
        a['normalized_shape'] = actual


@_watch(F.rms_norm, names=('input', 'normalized_shape', 'weight', 'eps'))
def _rms_norm(run: _DryRun, a: Dict[str, Any]) -> None:
    _layer_norm(run, a)


@_watch(F.multi_head_attention_forward, names=(
    'query', 'key', 'value', 'embed_dim_to_check', 'num_heads', 'in_proj_weight', 'in_proj_bias', 'bias_k', 'bias_v',
    'add_zero_attn', 'dropout_p', 'out_proj_weight', 'out_proj_bias'))
def _multi_head_attention(run: _DryRun, a: Dict[str, Any]) -> None:
    out_weight, size = a['out_proj_weight'], a['embed_dim_to_check']
    if not run.is_new(out_weight):
        return
    name, head_dim = run.stack[-1], size // a['num_heads']
    ratio = a['query'].shape[-1] // size

    def widen(key: str, axes: Mapping[int, AxisMap], sum_axis: Optional[int] = None) -> None:
        if _is_own(a.get(key)):
            a[key] = run.widen(a[key], axes, sum_axis)

    def heads(count: int) -> AxisMap:
        return AxisMap.uniform(count * size, ratio, head_dim)

    for key, weight in (('query', 'q_proj_weight'), ('key', 'k_proj_weight'), ('value', 'v_proj_weight')):
        weight = weight if _is_own(a.get(weight)) else 'in_proj_weight'
        in_map = run.axis_like(a[weight], 'in', a[weight].shape[1], a[key].shape[-1], f'the {key} of an attention')
        if weight != 'in_proj_weight':
            widen(weight, {0: heads(1), 1: in_map}, 1)
    if not a.get('use_separate_proj_weight'):
        widen('in_proj_weight', {0: heads(3), 1: in_map}, 1)
    widen('in_proj_bias', {0: heads(3)})
    widen('bias_k', {2: heads(1)})
    widen('bias_v', {2: heads(1)})
    out_map = run.out_axis(out_weight, size)
    widen('out_proj_weight', {0: out_map, 1: heads(1)}, 1)
    widen('out_proj_bias', {0: out_map})
    _set_sizes(run, run.owner(out_weight), in_features=ratio * size, out_features=out_map.teacher_size)
    a['embed_dim_to_check'], a['num_heads'] = ratio * size, ratio * a['num_heads']
    _set_sizes(
        run, name, embed_dim=a['embed_dim_to_check'], num_heads=a['num_heads'],
        kdim=a['key'].shape[-1], vdim=a['value'].shape[-1])


def _recurrent(run: _DryRun, name: str, module: nn.RNNBase, x: torch.Tensor) -> None:
    """Gates are the outer axis of the rows."""
    first = module.weight_ih_l0
    if not run.is_new(first):
        return
    in_map = run.axis_like(first, 'in', module.input_size, x.shape[-1], 'a recurrent layer')
    ratio = run.out_axis(first, first.shape[0]).ratio
    for key, tensor in list(module._parameters.items()):
        axes = {axis: AxisMap.uniform(size, ratio) for axis, size in enumerate(tensor.shape)}
        if key.startswith('weight_ih_l0'):
            axes[1] = in_map
        run.widen(tensor, axes, 1 if tensor.dim() > 1 else None)
    _set_sizes(
        run, name, input_size=x.shape[-1], hidden_size=ratio * module.hidden_size, proj_size=ratio * module.proj_size)


def _recurrent_outputs(
        x: torch.Tensor, state: Any, weights: Any, has_biases: bool, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool,
) -> Tuple[torch.Tensor, ...]:
    state = state if isinstance(state, tuple) else (state,)
    width = state[0].shape[-1] * (2 if bidirectional else 1)
    return (blank((*x.shape[:-1], width), x.dtype, x.device.type), *state)


# Functions whose outputs have known shapes, and that take long to find out: recurrent layers go step by step.
_STAND_INS: Dict[Callable, Callable] = dict.fromkeys(
    (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent_outputs)

# Layers that check their sizes before they call any function.
_MODULE_HANDLERS: Dict[type, Callable] = {
    nn.RNNBase: _recurrent,
    InstanceNorm: lambda run, name, _, x: _set_sizes(run, name, num_features=x.shape[1]),
}


@_watch(F.scaled_dot_product_attention, names=('query', 'key', 'value', 'attn_mask'))
def _attention(run: _DryRun, a: Dict[str, Any]) -> None:
    mask = a.get('attn_mask')
    if _from_parameters(mask):
        scores = (*a['query'].shape[:-1], a['key'].shape[-2])
        ratios = _mismatch(run, mask.shape, scores)
        if ratios:
            a['attn_mask'] = run.widen_derived(mask, ratios)


def _elementwise(run: _DryRun, func: Callable, args: Tuple[Any, ...], kwargs: Dict[str, Any]):
    """Parameters that are added to or multiplied with wider activations."""
    tensors = [tensor for tensor in _tensors((args, kwargs))]
    if len(tensors) < 2:
        return args, kwargs

    def fit(tensor: torch.Tensor) -> torch.Tensor:
        if not _from_parameters(tensor):
            return tensor
        run.touched.update(tensor.gpd_sources)
        for other in tensors:
            if other is not tensor:
                ratios = _mismatch(run, tensor.shape, other.shape)
                if ratios:
                    return run.widen_derived(tensor, ratios)
        return tensor

    return tree_map_only(torch.Tensor, fit, (args, kwargs))


def _concatenate(run: _DryRun, func: Callable, args: Tuple[Any, ...], kwargs: Dict[str, Any]):
    """Tokens that are put beside wider ones."""
    tensors = list(_tensors((args, kwargs)))
    dim = kwargs.get('dim', args[1] if len(args) > 1 else 0)

    def fit(tensor: torch.Tensor) -> torch.Tensor:
        if not _from_parameters(tensor):
            return tensor
        run.touched.update(tensor.gpd_sources)
        for other in tensors:
            if other is not tensor and other.dim() == tensor.dim():
                shape = list(other.shape)
                shape[dim] = tensor.shape[dim]
                ratios = _mismatch(run, tensor.shape, shape)
                if ratios:
                    return run.widen_derived(tensor, ratios)
        return tensor

    return tree_map_only(torch.Tensor, fit, (args, kwargs))


_HANDLERS_BY_NAME.update({
    **dict.fromkeys(
        ('add', 'radd', 'iadd', 'sub', 'rsub', 'isub', 'mul', 'rmul', 'imul', 'div', 'truediv', 'rtruediv', 'itruediv',
         'addcmul', 'where', 'maximum', 'minimum', 'lerp'),
        _elementwise),
    **dict.fromkeys(('cat', 'concat'), _concatenate),
})


def _mismatch(run: _DryRun, shape: Sequence[int], other: Sequence[int]) -> Dict[int, int]:
    """Axes, counted from the end, on which ``other`` is ``ratio`` times as wide and does not broadcast."""
    return {
        -k: run.ratio for k in range(1, min(len(shape), len(other)) + 1)
        if run.ratio > 1 and shape[-k] > 1 and other[-k] == shape[-k] * run.ratio
    }


def _set_sizes(run: _DryRun, owner: str, **sizes: int) -> None:
    """Keeps a layer's own record of its sizes true."""
    module = run.modules_by_name[owner]
    for attribute, size in sizes.items():
        if isinstance(getattr(module, attribute, None), int):
            run.set_attribute(owner, attribute, size)
