"""A student as it widens: which of its tensors have become wider, and what the plan will say of them."""

from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn

from ..axes import AxisMap, TensorMap
from ..errors import UnsupportedModelError
from ..rules.context import join
from .copies import blank, blank_copy
from .traced import is_own, mark_derived, mark_own, mark_wide, sources, view_axes

__all__ = ['Widening']

Axes = Union[Mapping[int, AxisMap], Sequence[Tuple[int, AxisMap]]]


class Widening:
    """A copy of the student without values, whose tensors and attributes are exchanged for the teacher's one by one.

    Attributes:
        ratio: the expansion ratio.
        model, device: the copy, and where it is: ``'meta'`` or ``'cpu'``.
        modules: its modules by name.
        kept: names of modules whose outputs keep their width, and so does what is inside them.
        running: names of the modules whose forward runs, outermost first; messages name the last.
        tensors, attributes, divided_inputs: what has been decided, as in a plan.
        ruled: names of the tensors that a rule has widened; how they are used is the rule's affair.
        met: names of the parameters and buffers that have been met, wider or not; the first name of tied ones.
    """

    def __init__(self, student: nn.Module, ratio: int, kept: Set[str], device: str = 'meta') -> None:
        self.student_class = type(student).__name__
        self.ratio = ratio
        self.device = device
        self.model = blank_copy(student, device)
        self.modules = dict(self.model.named_modules())
        self.kept = set(kept)
        self.running: List[str] = ['']
        self.tensors: Dict[str, TensorMap] = {}
        self.attributes: Dict[str, Dict[str, Tuple[Any, Any]]] = {}
        self.divided_inputs: Dict[str, int] = {}
        self.ruled: Set[str] = set()
        self.met: Set[str] = set()
        # What rules say of axes: (module, 'in' or 'out') or (parameter, '') -> its block, or all of it.
        self._described: Dict[Tuple[str, str], Union[int, AxisMap]] = {}
        # A tensor may stand under several names (tied weights); all of them widen together.
        self._names: Dict[str, List[str]] = {}
        first_names: Dict[int, str] = {}
        for module_name, module in self.modules.items():
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    name = join(module_name, key)
                    first = first_names.setdefault(id(tensor), name)
                    self._names.setdefault(first, []).append(name)
                    mark_own(tensor, first)

    def unsupported(self, reason: str) -> UnsupportedModelError:
        """An error to raise that names the module which runs."""
        name = self.running[-1]
        cls = type(self.modules[name])
        return UnsupportedModelError(
            f'{self.student_class} cannot be widened: module {name or "(root)"!r} of class '
            f'{cls.__module__}.{cls.__qualname__}: {reason} (register_rule can teach it)'
        )

    # -- tensors and attributes -----------------------------------------------------------------------------------

    def unmet_parameters(self) -> Set[str]:
        """Names of the parameters that no function that was watched has met, the first of tied ones."""
        parameters = {name for name, _ in self.model.named_parameters()}
        return (parameters & {names[0] for names in self._names.values()}) - self.met

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter or buffer by its name, as wide as it is by now."""
        owner, _, key = name.rpartition('.')
        return getattr(self.modules[owner], key)

    def current(self, tensor: torch.Tensor) -> torch.Tensor:
        """What an own tensor, or one whose axes are in another order, has become since it was read."""
        order = view_axes(tensor)
        if order is None or sources(tensor)[0] not in self.tensors:
            return tensor
        now = self.tensor(sources(tensor)[0])
        if is_own(tensor):
            return now
        shape = [size if axis is None else now.shape[axis] for axis, size in zip(order, tensor.shape)]
        return tensor if shape == list(tensor.shape) else self.derived(shape, tensor)

    def owner(self, tensor: torch.Tensor) -> str:
        """Name of the module that owns a parameter or buffer."""
        return sources(tensor)[0].rpartition('.')[0]

    def is_new(self, tensor: Any) -> bool:
        """Whether something is a parameter or buffer itself, seen for the first time."""
        return is_own(tensor) and sources(tensor)[0] not in self.met

    def set_attribute(self, module: str, attribute: str, value: Any) -> None:
        """Sets an attribute of a module and notes it for the teacher."""
        before = getattr(self.modules[module], attribute)
        if before != value:
            changes = self.attributes.setdefault(module, {})
            changes[attribute] = (changes.get(attribute, (before,))[0], value)
            setattr(self.modules[module], attribute, value)

    def set_sizes(self, module: str, **sizes: int) -> None:
        """Keeps a layer's own record of its sizes true; what it does not record is skipped."""
        for attribute, size in sizes.items():
            if isinstance(getattr(self.modules[module], attribute, None), int):
                self.set_attribute(module, attribute, size)

    # -- axes -----------------------------------------------------------------------------------------------------

    def describe(self, name: str, side: str, described: Union[int, AxisMap]) -> None:
        """Takes down what a rule says of an axis.

        Args:
            name: a module, or a parameter or buffer.
            side: ``'in'`` or ``'out'`` of the module and of those inside it, '' of a parameter or buffer.
            described: the axis's block, or its axis map.
        """
        self._described[name, side] = described

    def axis(self, tensor: torch.Tensor, side: str, size: int, ratio: int) -> AxisMap:
        """How an axis is replicated: entry by entry, or as a rule says for it or for a module around it.

        A rule for all that is inside a module holds wherever its block divides the axis.

        Args:
            tensor: a parameter or buffer.
            side: ``'in'``, ``'out'``, or '' where the tensor is no layer's.
            size: the axis's entries in the student.
            ratio: how many times they are replicated, unless a rule gives the axis map.

        Raises:
            UnsupportedModelError: if a rule's axis map has another size, or its block does not divide the axis.
        """
        owner, side = self.owner(tensor), side or 'out'
        described = self._described.get((sources(tensor)[0], '')) or self._described.get((owner, side))
        if described is None:
            described = 1
            while owner and described == 1:
                owner = owner.rpartition('.')[0]
                around = self._described.get((owner, side), 1)
                described = around if isinstance(around, AxisMap) or size % around == 0 else 1
        if isinstance(described, AxisMap):
            if described.size != size:
                raise self.unsupported(f'a rule describes {described.size} entries of an axis that has {size}')
            return described
        if size % described:
            raise self.unsupported(f'{sources(tensor)[0]} has {size} entries, not a multiple of {described}')
        return AxisMap.uniform(size, ratio, described)

    def axis_like(self, tensor: torch.Tensor, side: str, size: int, actual: int, what: str, block: int = 1) -> AxisMap:
        """:meth:`axis` of an axis that meets ``actual`` channels, which ``what``, for the message, expects.

        Entries that arrive in blocks are replicated in blocks, where no rule says more.

        Raises:
            UnsupportedModelError: if no replication of it has that size.
        """
        axis_map = self.axis(tensor, side, size, max(actual // size, 1))
        if len(axis_map) == 1 and axis_map[0].block == 1 and axis_map.ratio > 1 and size % block == 0:
            axis_map = AxisMap.uniform(size, axis_map.ratio, block)
        if axis_map.teacher_size != actual:
            raise self.unsupported(f'{what} expects {size} channels and got {actual}')
        return axis_map

    def out_axis(self, weight: torch.Tensor, size: int) -> AxisMap:
        """How a layer's outputs are replicated. A single output is a mask that broadcasts, unless a rule says more."""
        owner = self.owner(weight)
        kept = any(not name or owner == name or owner.startswith(f'{name}.') for name in self.kept)
        mask = size == 1 and (owner, 'out') not in self._described
        return AxisMap.uniform(size, 1) if kept or mask else self.axis(weight, 'out', size, self.ratio)

    def mismatch(self, shape: Sequence[int], other: Sequence[int]) -> Dict[int, int]:
        """Axes, counted from the end, on which ``other`` is ``ratio`` times as wide and does not broadcast."""
        return {
            -k: self.ratio
            for k in range(1, min(len(shape), len(other)) + 1)
            if self.ratio > 1 and shape[-k] > 1 and other[-k] == shape[-k] * self.ratio
        }

    # -- widening -------------------------------------------------------------------------------------------------

    def widen(self, tensor: torch.Tensor, axes: Axes, sum_axis: Optional[int] = None) -> torch.Tensor:
        """Replaces a parameter or buffer by a wider one, under all its names, and notes how. Once: then it stays.

        Args:
            tensor: the parameter or buffer.
            axes: axis -> how it is replicated; pairs where an axis holds several flattened ones.
            sum_axis: the axis that the layer sums over.

        Returns:
            The wider tensor; the same one if it stays.

        Raises:
            UnsupportedModelError: if ``sum_axis`` has entries of different ratios.
        """
        (first,) = sources(tensor)
        self.met.add(first)
        if first in self.tensors:
            return tensor
        pairs = axes.items() if isinstance(axes, Mapping) else axes
        wider = tuple((axis % tensor.dim(), axis_map) for axis, axis_map in pairs if axis_map.ratio > 1)
        if not wider:
            return tensor
        if any(axis == sum_axis and len({segment.ratio for segment in axis_map}) > 1 for axis, axis_map in wider):
            raise self.unsupported(f'{first} sums over entries of different ratios')
        return self._replace(tensor, TensorMap(tuple(tensor.shape), wider, sum_axis))

    def _replace(self, tensor: torch.Tensor, tensor_map: TensorMap) -> torch.Tensor:
        (first,) = sources(tensor)
        wide = blank(tensor_map.teacher_shape, tensor.dtype, self.device)
        if isinstance(tensor, nn.Parameter):
            wide = nn.Parameter(wide, requires_grad=tensor.requires_grad)
        mark_own(wide, first)
        mark_wide(wide)
        for name in self._names[first]:
            owner, _, key = name.rpartition('.')
            module = self.modules[owner]
            (module._parameters if key in module._parameters else module._buffers)[key] = wide
            self.tensors[name] = tensor_map
        return wide

    def widen_to_meet(self, tensor: torch.Tensor, shapes: Sequence[Sequence[int]]) -> torch.Tensor:
        """Widens what meets something wider.

        Args:
            tensor: an own or derived tensor.
            shapes: what it meets; the first that is wider counts.

        Returns:
            The wider tensor; the same one if nothing is wider.

        Raises:
            UnsupportedModelError: if it is not clear which axis of a parameter the wider axis came from.
        """
        self.met.update(sources(tensor))
        ratios = next(filter(None, (self.mismatch(tensor.shape, shape) for shape in shapes)), {})
        if not ratios:
            return tensor
        if is_own(tensor):
            return self.widen(
                tensor, {axis: self.axis(tensor, '', tensor.shape[axis], ratio) for axis, ratio in ratios.items()}
            )
        return self._widen_derived(tensor, ratios)

    def _widen_derived(self, tensor: torch.Tensor, ratios: Mapping[int, int]) -> torch.Tensor:
        """Widens the parameters that a tensor was computed from, and the tensor along with them."""
        shape = list(tensor.shape)
        for axis, ratio in ratios.items():
            size = shape[axis]
            for source in sources(tensor):
                parameter = self.tensor(source)
                if parameter.numel() > 1 or tensor.numel() == 1:  # one entry is for all channels
                    own_axis = _axis_in_source(self, tensor, axis, source, size * ratio)
                    self.widen(parameter, {own_axis: self.axis(parameter, '', size, ratio)})
            shape[axis] = size * ratio
        return self.derived(shape, tensor)

    def derived(self, shape: Sequence[int], tensor: torch.Tensor) -> torch.Tensor:
        """A blank tensor of another shape, computed from the same parameters as a derived one."""
        wide = blank(shape, tensor.dtype, self.device)
        mark_derived(wide, sources(tensor), view_axes(tensor))
        mark_wide(wide)
        return wide


def _axis_in_source(widening: Widening, tensor: torch.Tensor, axis: int, source: str, actual: int) -> int:
    """Which axis of a parameter an axis of a derived tensor came from.

    That is told by the order of axes, if nothing else was done, or by its size, which must be unique there.
    """
    size, order, widened = tensor.shape[axis], view_axes(tensor), widening.tensors.get(source)
    student_shape = tuple(widening.tensor(source).shape) if widened is None else widened.shape
    if order is None and student_shape.count(size) != 1:
        raise widening.unsupported(
            f'an axis of {size} entries, computed from {", ".join(sources(tensor))}, met one of '
            f'{actual}, and its origin is not clear'
        )
    own_axis = student_shape.index(size) if order is None else order[axis]
    if own_axis is None:
        raise widening.unsupported(f'{source} is repeated along an axis that is wider')
    if widened is not None and own_axis not in dict(widened.axes):
        raise widening.unsupported(f'{source} was met before, where other axes were wider')
    return own_axis
