"""What a rule's code may do."""

from typing import Any, List, Optional, Protocol, Sequence, Tuple

import torch
import torch.nn as nn

from ..axes import AxisMap, Segment

__all__ = ['RuleContext', 'find_axes', 'find_children', 'join']


class Planner(Protocol):
    """What the planner does for a rule's code. Modules and tensors go by their full names in the student."""

    ratio: int

    def set_attribute(self, module: str, attribute: str, value: Any) -> None:
        """Gives an attribute of a module another value in the teacher."""

    def describe(self, name: str, side: str, described: AxisMap) -> None:
        """Says how the axis ``'in'`` or ``'out'`` of a module, or '' of a parameter, is replicated."""

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter or buffer."""

    def widen(self, tensor: torch.Tensor, axes: Sequence[Tuple[int, AxisMap]], sum_axis: Optional[int]) -> torch.Tensor:
        """Replaces a parameter or buffer by a wider one."""


class RuleContext:
    """One module of the student, as the code of its rule sees it, and what the code may say about it.

    Args:
        planner: carries out what the code says.
        name: the module's full name in the student, '' for the student itself.

    Attributes:
        module: the module, in a copy of the student whose tensors have shapes and no values. It is for reading;
            attributes that the rule multiplies or divides have their new values.
        ratio: the expansion ratio.
    """

    def __init__(self, planner: Planner, name: str, module: Any) -> None:
        self._planner, self._name = planner, name
        self.module = module
        self.ratio = planner.ratio

    def set(self, attribute: str, value: Any) -> None:
        """Sets an attribute in the teacher.

        Args:
            attribute: an attribute of the module, or of a child by its dotted name, such as ``'conv.groups'``.
            value: its value in the teacher.

        Raises:
            AttributeError: if the student has no such attribute.
        """
        child, _, attribute = attribute.rpartition('.')
        self._planner.set_attribute(join(self._name, child), attribute, value)

    def widen(self, tensor: str, axes: Sequence[Tuple[int, AxisMap]], sum_axis: Optional[int] = None) -> None:
        """Widens a parameter or buffer.

        Args:
            tensor: its name, dotted where it is a child's.
            axes: ``(axis, axis map)`` for every replicated axis, applied in order; an axis that holds several
                flattened ones comes once for each of them.
            sum_axis: the axis that the layer sums over; the tensor is divided by its ratio.

        Raises:
            UnsupportedModelError: if ``sum_axis`` has entries of different ratios.
        """
        self._planner.widen(self._planner.tensor(join(self._name, tensor)), axes, sum_axis)

    def axis(self, target: str, *segments: Tuple[int, int, int]) -> None:
        """Says how an axis is replicated, where not all of it is alike.

        Args:
            target: ``'<child>.in'``, ``'<child>.out'`` or an own ``'<parameter>'``, as in ``Rule.blocks``.
            segments: ``(size, ratio, block)`` of each segment, in order: so many entries of the student, how many
                times they are replicated, and the run of entries that is replicated as a whole.
        """
        axis_map = AxisMap(Segment(*segment) for segment in segments)
        for name, side in find_axes(self.module, target):
            self._planner.describe(join(self._name, name), side, axis_map)

    layout = axis  # the former name, which rules of users may have


def find_children(module: nn.Module, pattern: str) -> List[str]:
    """The modules that a rule's dotted name stands for.

    Args:
        module: the module that the rule is for.
        pattern: names of children, ``*`` for any; '' is the module itself.

    Returns:
        Their names relative to the module; none where it lacks them.
    """
    found: List[Tuple[str, nn.Module]] = [('', module)]
    for key in filter(None, pattern.split('.')):
        found = [
            (join(path, name), child)
            for path, parent in found
            for name, child in parent._modules.items()
            if child is not None and key in (name, '*')
        ]
    return [path for path, _ in found]


def find_axes(module: nn.Module, target: str) -> List[Tuple[str, str]]:
    """The axes that a rule's ``'<child>.in'``, ``'<child>.out'`` or own ``'<parameter>'`` stands for.

    Args:
        module: the module that the rule is for.
        target: a key of ``Rule.blocks``.

    Returns:
        ``(name of a child, 'in' or 'out')`` or ``(name of a parameter, '')``, relative to the module.
    """
    child, _, side = target.rpartition('.')
    if side in ('in', 'out'):
        return [(name, side) for name in find_children(module, child)]
    return [(target, '')]


def join(name: str, child: str) -> str:
    """The full name of a module's child, or of a parameter; either may be '', the root and the module itself."""
    return f'{name}.{child}' if name and child else name or child
