"""The student's part of the gradients that meet in stored tensors, taken down on its way there."""

from typing import Dict, Mapping

import torch

__all__ = ['StudentGradients']


class StudentGradients:
    """Sums up the gradients of the student's own weights over backward passes, as ``grad`` does those of the sum."""

    def __init__(self) -> None:
        self._sums: Dict[str, torch.Tensor] = {}

    def watch(self, parameters: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Tensors of the same values for the student to run on, whose gradients are taken down under their first names.

        Args:
            parameters: the student's, by all their names.
        """
        watched: Dict[int, torch.Tensor] = {}
        for name, tensor in parameters.items():
            if id(tensor) in watched:
                continue
            # A view: a tensor that is not replicated is the teacher's, too, and so is its gradient.
            watched[id(tensor)] = view = tensor.view_as(tensor)
            if view.requires_grad:
                view.register_hook(lambda gradient, name=name: self._add(name, gradient.detach()))
        return {name: watched[id(tensor)] for name, tensor in parameters.items()}

    def pop(self) -> Dict[str, torch.Tensor]:
        """What has been summed up since the last call, by the first of each parameter's names."""
        sums, self._sums = self._sums, {}
        return sums

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient
