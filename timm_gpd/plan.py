"""The expansion plan: one piece of data, two directions."""

from dataclasses import dataclass, field, replace
from typing import Any, Dict, Mapping, Optional, Tuple

import torch

from .axes import TensorMap
from .errors import InputError

__all__ = ['ExpansionPlan']


@dataclass(frozen=True)
class ExpansionPlan:
    """How a student becomes a dynamic teacher, and how the student is read back. Pure data.

    Attributes:
        ratio: the expansion ratio that was asked for.
        tensors: parameter or buffer name -> :class:`TensorMap`. Tensors that are not listed stay as they are.
        attributes: module name -> attribute -> (student's value, teacher's value), such as head counts.
        divided_inputs: module name -> what its input is divided by in the teacher. For layers that compute their weight
            from a parameter, such as weight standardisation, which would undo a division of the parameter.
        notes: what the planner had to do out of the ordinary, one line each.
        input_shape: ``(channels, height, width)``, in pixels, of images that the student accepts: it was planned with
            them. None in a plan that was made by hand.
    """

    ratio: int
    tensors: Mapping[str, TensorMap]
    attributes: Mapping[str, Mapping[str, Tuple[Any, Any]]]
    divided_inputs: Mapping[str, int] = field(default_factory=dict)
    notes: Tuple[str, ...] = ()
    input_shape: Optional[Tuple[int, int, int]] = None

    def expand(self, state_dict: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Inverse reparameterization: student tensors to teacher tensors (Sec. 3.2 of arXiv 2410.04140).

        Args:
            state_dict: student tensors by name, shapes as in ``plan.tensors[name].shape``.

        Returns:
            New tensors under the same names, shapes as in ``plan.tensors[name].teacher_shape``.

        Raises:
            ValueError: if a tensor does not have the shape that was planned for.
        """
        return {name: self.expand_tensor(name, tensor) for name, tensor in state_dict.items()}

    def expand_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """:meth:`expand` of one tensor.

        Args:
            name: its name in the student.
            tensor: the student's tensor, of shape ``plan.tensors[name].shape``.

        Returns:
            A new tensor of shape ``plan.tensors[name].teacher_shape``; a copy where the plan leaves it as it is.

        Raises:
            ValueError: if the tensor does not have the shape that was planned for.
        """
        tensor_map = self.tensors.get(name)
        if tensor_map is None:
            return tensor.clone()
        self._check(name, tensor, tensor_map.shape)
        return tensor_map.replicate(tensor / tensor_map.divisor if tensor_map.divisor > 1 else tensor)

    def extract(self, state_dict: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Channel-branch reparameterization: teacher tensors to student tensors (Sec. 3.3). Differentiable.

        Args:
            state_dict: teacher tensors by name, branches already merged, shapes as in
                ``plan.tensors[name].teacher_shape``.

        Returns:
            Student tensors under the same names, shapes as in ``plan.tensors[name].shape``. Views of the teacher's
            where no divisor applies and strides allow.

        Raises:
            ValueError: if a tensor does not have the shape that was planned for.
        """
        student = {}
        for name, tensor in state_dict.items():
            tensor_map = self.tensors.get(name)
            if tensor_map is None:
                student[name] = tensor
                continue
            self._check(name, tensor, tensor_map.teacher_shape)
            narrow = tensor_map.first_replica(tensor)
            student[name] = narrow * tensor_map.divisor if tensor_map.divisor > 1 else narrow
        return student

    def at_ratio(self, ratio: int) -> 'ExpansionPlan':
        """The plan of a narrower teacher inside that of this plan: replicas 0 to ``ratio`` - 1 of every axis.

        Nested widths as in slimmable networks (arXiv 1812.08928), at whole multiples of the student's.

        Args:
            ratio: its expansion ratio k, from 1, the student's, to that of this plan.

        Returns:
            What :func:`timm_gpd.plan_expansion` gives for that ratio, worked out from this plan: an attribute is
            multiplied or divided by k where it is by this plan's ratio; another number grows in equal steps, as one
            does that counts entries of which some are replicated.

        Raises:
            InputError: if the plan holds no such ratio.
            UnsupportedModelError: if a tensor has no ratio between.
        """
        if not isinstance(ratio, int) or isinstance(ratio, bool) or not 1 <= ratio <= self.ratio:
            raise InputError(f'a ratio inside a dynamic teacher must be one of 1 to {self.ratio}, but is {ratio!r}')
        if ratio == self.ratio:
            return self
        tensors = {name: tensor_map.at_ratio(ratio) for name, tensor_map in self.tensors.items()}
        attributes = {
            module: {
                attribute: (before, _at_ratio(before, after, self.ratio, ratio))
                for attribute, (before, after) in changes.items()
            }
            for module, changes in self.attributes.items()
            if ratio > 1
        }
        return replace(
            self,
            ratio=ratio,
            tensors={name: tensor_map for name, tensor_map in tensors.items() if tensor_map.axes},
            attributes=attributes,
            divided_inputs=dict.fromkeys(self.divided_inputs, ratio) if ratio > 1 else {},
        )

    @staticmethod
    def _check(name: str, tensor: torch.Tensor, shape: Tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f'{name} has shape {tuple(tensor.shape)}, but the plan was made for {shape}: plan again')

    def __str__(self) -> str:
        lines = [
            f'ExpansionPlan(ratio={self.ratio}, input_shape={self.input_shape}): {len(self.tensors)} tensors widen'
        ]
        width = max((len(name) for name in self.tensors), default=0)
        for name, tensor_map in self.tensors.items():
            axes = [
                f'axis {axis}: '
                + ' + '.join(
                    f'{s.size}x{s.ratio}' + (f' in blocks of {s.block}' if s.block > 1 else '') for s in axis_map
                )
                for axis, axis_map in tensor_map.axes
                if len(axis_map) > 1 or axis_map[0].block > 1
            ]
            notes = ([f'divided by {tensor_map.divisor}'] if tensor_map.divisor > 1 else []) + axes
            lines.append(
                f'  {name:<{width}}  {tensor_map.shape} -> {tensor_map.teacher_shape}'
                + (f'  ({"; ".join(notes)})' if notes else '')
            )
        for module, changes in self.attributes.items():
            lines.append(
                f'  {module or "(root)"}: '
                + ', '.join(
                    f'{attribute} {before} -> {after}'
                    for attribute, (before, after) in changes.items()
                    if attribute != 'feature_info'
                )
            )  # a table as long as the model
        lines += [f'  {module}: input divided by {ratio}' for module, ratio in self.divided_inputs.items()]
        return '\n'.join(lines + [f'  note: {note}' for note in self.notes])


def _at_ratio(before: Any, after: Any, planned: int, ratio: int) -> Any:
    """An attribute's value at a ratio between, from the student's and that of the ratio that was planned."""
    if isinstance(before, dict) and isinstance(after, dict):
        return {key: _at_ratio(before.get(key), value, planned, ratio) for key, value in after.items()}
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)) and len(before) == len(after):
        values = [_at_ratio(*pair, planned, ratio) for pair in zip(before, after)]
        return type(after)(*values) if hasattr(after, '_fields') else type(after)(values)
    is_number = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (before, after))
    if not is_number or before == after:
        return after
    if after == before * planned:
        return before * ratio
    if after == before / planned:
        return before / ratio
    step = (after - before) / (planned - 1)
    return before + (int(step) if step == int(step) else step) * (ratio - 1)
