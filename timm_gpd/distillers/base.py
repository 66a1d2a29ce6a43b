"""What all distillers share."""

from typing import Any, Dict, FrozenSet, Sequence, Tuple

import torch
import torch.nn as nn

from .feature_tap import ModelOutput

__all__ = ['Distiller', 'deepest_pairs']


class Distiller(nn.Module):
    """A loss between one learner and one teacher, with whatever it needs to compare the two.

    Built from the outputs of both on an example, whose shapes tell widths and sizes.

    Args:
        learner: output of the model that learns.
        teacher: output of the static teacher on the same images.
        hyperparameters: those of ``defaults`` that differ.

    Attributes:
        learner_needs: what the learner must be tapped for, of ``'stages'`` and ``'embedding'``.
        teacher_needs: the same of the teacher.
        defaults: hyperparameters with the values of the paper or its code.
        weight: factor of the loss where several are added up.
    """

    learner_needs: FrozenSet[str] = frozenset()
    teacher_needs: FrozenSet[str] = frozenset()
    defaults: Dict[str, Any] = {}
    weight = 1.0

    def __init__(self, learner: ModelOutput, teacher: ModelOutput, **hyperparameters: Any) -> None:
        super().__init__()
        self.hyperparameters = {**self.defaults, **hyperparameters}

    def forward(self, learner: ModelOutput, teacher: ModelOutput, target: torch.Tensor) -> torch.Tensor:
        """The loss of a batch of B images, without the weight.

        Args:
            learner: output of the model that learns.
            teacher: output of the static teacher on the same images. Gradients do not flow into it.
            target: class indices, shape (B,), or class probabilities, shape (B, num_classes).

        Returns:
            A scalar.

        Raises:
            NotImplementedError: if a subclass does not define it.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ', '.join(f'{name}={value}' for name, value in self.hyperparameters.items())


def deepest_pairs(learner: Sequence[Any], teacher: Sequence[Any]) -> Tuple[Sequence[Any], Sequence[Any]]:
    """As many of the deepest stages of each as both have."""
    count = min(len(learner), len(teacher))
    return learner[-count:], teacher[-count:]
