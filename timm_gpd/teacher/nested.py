"""The ratios between student and dynamic teacher: narrower teachers that its stored tensors hold.

A dynamic teacher of ratio r starts with r equal replicas of every channel, so the first k of them, divided by k instead
of r, are a teacher of ratio k of the same function: nested widths, as in slimmable networks (arXiv 1812.08928).
"""

from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import torch
import torch.nn as nn

from ..axes import TensorMap
from ..expansion.copies import INPUT_DIVISOR
from ..expansion.verify import verify_plan
from ..plan import ExpansionPlan
from .computed_parameters import ComputedParameters
from .functional import call_with_parameters, memory_format_of
from .parameter_layout import ParameterLayout
from .shared_tensors import SharedTensors, refuse_shards
from .student_view import StudentView, View

__all__ = ['NestedRatios', 'NestedTensors', 'RatioView']

ShareGradients = Callable[[Mapping[str, torch.Tensor], Mapping[str, TensorMap]], Dict[str, torch.Tensor]]


class NestedTensors:
    """Reads stored tensors as a narrower teacher's, and as the student's inside it.

    Args:
        plan: the dynamic teacher's.
        layout: the names of the student's parameters.
        ratio: the narrower teacher's expansion ratio k, between 1 and that of the plan.
        stored_scales: whose numbers each parameter holds, see :func:`timm_gpd.expand`, by its first name.

    Attributes:
        attributes: what the wide model's modules are changed to: module name -> attribute -> value.
    """

    def __init__(
        self,
        plan: ExpansionPlan,
        layout: ParameterLayout,
        ratio: int,
        stored_scales: Mapping[str, str],
    ) -> None:
        self._layout = layout
        self.ratio = ratio
        self.plan, narrower = plan, plan.at_ratio(ratio)
        self.attributes = {
            module: {attribute: after for attribute, (_, after) in changes.items()}
            for module, changes in narrower.attributes.items()
        }
        for module, divisor in narrower.divided_inputs.items():
            self.attributes.setdefault(module, {})[INPUT_DIVISOR] = divisor
        multipliers: Dict[str, float] = {}
        student_multipliers: Dict[str, float] = {}
        first_multipliers: Dict[str, float] = {}
        for name, scale in stored_scales.items():
            if name not in plan.tensors:
                continue
            divisor = plan.tensors[name].divisor
            student_multipliers[name] = divisor if scale == 'teacher' else 1
            first_multipliers[name] = 1 / divisor if scale == 'balanced' else 1
            multipliers[name] = (1 if scale == 'student' else divisor) / narrower.tensors[name].divisor
        self._maps = {name: narrower.tensors[name] for name in multipliers}
        self._shared = SharedTensors(self._maps, multipliers, student_multipliers, first_multipliers)

    def __call__(
        self,
        stored: Mapping[str, torch.Tensor],
        share: ShareGradients,
    ) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
        """The narrower teacher's and the student's tensors, by all their names. Differentiable.

        Args:
            stored: the dynamic teacher's stored tensors, by their first names.
            share: scales the narrower teacher's gradients, :meth:`ComputedParameters.share_gradients`.

        Raises:
            RuntimeError: if a tensor is one shard of many.
        """
        wider, student = self._shared(self._slice(stored))
        wider = share(wider, self._maps)
        return self._layout.under_all_names(wider), self._layout.under_all_names(student)

    def of_teacher(
        self,
        stored: Mapping[str, torch.Tensor],
        share: Optional[ShareGradients] = None,
    ) -> Dict[str, torch.Tensor]:
        """The narrower teacher's tensors alone, see :meth:`__call__`; without ``share`` gradients are as they are."""
        wider = self._shared.of_teacher(self._slice(stored))
        return self._layout.under_all_names(wider if share is None else share(wider, self._maps))

    def buffers(self, wide: nn.Module) -> Dict[str, torch.Tensor]:
        """Buffers for one run, by all their names: the wide model's, of the replicas that are kept, on other memory.

        Whatever a run writes into them is gone with it.
        """
        tensors = {}
        for name, buffer in wide.named_buffers(remove_duplicate=False):
            tensor_map = self.plan.tensors.get(name)
            tensors[name] = (
                buffer.clone() if tensor_map is None else tensor_map.first_replicas(buffer, self.ratio).clone()
            )
        return tensors

    def _slice(self, stored: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        refuse_shards(stored)
        maps = self.plan.tensors
        return {
            name: _in_order_of(tensor, maps[name].first_replicas(tensor, self.ratio)) if name in maps else tensor
            for name, tensor in stored.items()
        }


def _in_order_of(tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Keeps a kernel in the order in memory that convolutions of such images take."""
    is_kernel = tensor.dim() == 4
    return part.contiguous(memory_format=memory_format_of(tensor)) if is_kernel else part


class RatioView(View):
    """A teacher of a ratio between 1 and r inside a dynamic teacher, always up to date. It owns nothing.

    Its running statistics are no statistics of its own. In training mode it normalises by its batches, and what a layer
    would record of them is dropped: neither student nor dynamic teacher sees it. In evaluation mode it reads the
    dynamic teacher's, of the same replicas: right as long as replicas are equal, and afterwards to be replaced by
    statistics of this ratio, as universally slimmable networks do after training (arXiv 1903.05134).

    Args:
        dynamic_teacher: a :class:`DynamicTeacher`; the wide model's mode is the view's.
        tensors: how its stored tensors are read.
    """

    def __init__(self, dynamic_teacher: Any, tensors: NestedTensors) -> None:
        super().__init__(dynamic_teacher, 'wide')
        self.tensors = tensors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (B, num_classes), of images of shape (B, in_chans, H, W). Differentiable to stored tensors."""
        stored = self.dynamic_teacher.merged_tensors(memory_format_of(x))
        return self.run(self.tensors.of_teacher(stored), x)

    def computed_parameters(self, memory_format: torch.memory_format) -> Dict[str, torch.Tensor]:
        """What it trains on, by the student's parameter names; merged kernels in this order in memory.

        Its loss goes into the student's entries by ``share_weight``.
        """
        stored = self.dynamic_teacher.merged_tensors(memory_format)
        return self.tensors.of_teacher(stored, self.dynamic_teacher.share_gradients)

    def parameters_of_both(
        self,
        memory_format: torch.memory_format,
    ) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
        """:meth:`computed_parameters`, and the student's, read from them in one go."""
        stored = self.dynamic_teacher.merged_tensors(memory_format)
        return self.tensors(stored, self.dynamic_teacher.share_gradients)

    def run(self, parameters: Mapping[str, torch.Tensor], x: torch.Tensor) -> Any:
        """Runs the wide model as this ratio's.

        Args:
            parameters: from :meth:`computed_parameters`.
            x: images, shape (B, in_chans, H, W).

        Returns:
            What the student's class returns for them.

        Raises:
            RuntimeError: if it is compiled.
        """
        wide = self.dynamic_teacher.wide
        return call_with_parameters(wide, {**parameters, **self.tensors.buffers(wide)}, x, self.tensors.attributes)


class NestedRatios(ComputedParameters):
    """The part of :class:`DynamicTeacher` that gives the models of all ratios."""

    extract_student: Callable[[], nn.Module]
    _nested: Dict[int, NestedTensors]

    def at_ratio(self, ratio: int) -> nn.Module:
        """The model of another ratio that the stored tensors hold, differentiable to them.

        It reads replicas 0 to k - 1 of every axis, divided by k instead of r, and starts as the student's function.
        With noise that is so for k = 1 and k = r alone: noise sums to zero over all replicas.

        Args:
            ratio: its expansion ratio k, from 1 to that of the plan.

        Returns:
            A model that gives logits, shape (B, num_classes), for images, shape (B, in_chans, H, W): a
            :class:`StudentView` for 1, this module itself for its own ratio, and a :class:`RatioView` between, which
            says what becomes of running statistics.

        Raises:
            InputError: if there is no such ratio.
            UnsupportedModelError: if it would not be exactly the student. This is checked when a ratio between is asked
                for first, as by :func:`expand`.
        """
        if ratio not in self._nested:
            narrower = self.plan.at_ratio(ratio)
            if ratio == 1:
                return StudentView(self)
            if ratio == self.plan.ratio:
                return self
            verify_plan(self.extract_student(), narrower)
            scales = {name: 'teacher' if name in self._branched else self.scale for name in self._layout.names}
            self._nested[ratio] = NestedTensors(self.plan, self._layout, ratio, scales)
        return RatioView(self, self._nested[ratio])
