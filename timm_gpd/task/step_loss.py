"""What a learner is trained on at every step, and how its terms are weighted."""

from typing import Callable, Dict, Iterator, Mapping, Optional, Tuple

import torch
import torch.nn as nn

from ..distillers import Distillers, ModelOutput
from ..errors import InputError, check_number
from .online_modules import online_terms

__all__ = ['StepLoss', 'loss_weights']


class StepLoss(nn.Module):
    """A learner's share of the loss: ``a * L_task``, and with a static teacher ``+ b * L_KD``.

    Args:
        criterion: task loss of logits and targets, a module or a function.
        task_weight: weight a.
        distill_weight: weight b.
        distillers: losses from the static teacher, by learner; none where there is no static teacher.

    Attributes:
        online_modules: those of static teachers that adapt, by the teacher's number, 0 for the only one. They train on
            the student's images, and their loss is added to the student's.
    """

    def __init__(
        self,
        criterion: Callable[..., torch.Tensor],
        task_weight: float = 1.0,
        distill_weight: float = 1.0,
        distillers: Optional[Mapping[str, Distillers]] = None,
    ) -> None:
        super().__init__()
        if not callable(criterion):
            raise InputError(f'criterion must be a loss of logits and targets, but is {criterion!r}')
        self.distillers = nn.ModuleDict(distillers or {})
        self.criterion = criterion
        self.online_modules = nn.ModuleDict()
        self.task_weight, self.distill_weight = task_weight, distill_weight

    def forward(
        self,
        learner: str,
        output: ModelOutput,
        target: torch.Tensor,
        static_output: Optional[ModelOutput] = None,
    ) -> Dict[str, torch.Tensor]:
        """One learner's loss, its logits, and the terms of the loss.

        Args:
            learner: ``'student'`` or ``'dynamic_teacher'``.
            output: what it made of the images.
            target: class indices, shape (B,), or whatever else the criterion and the distillers take.
            static_output: what the static teacher made of the images.

        Returns:
            ``loss``; ``output``, logits of shape (B, num_classes); the terms without a and b: ``task_loss``, and
            ``kd/<loss>`` for every loss from the static teacher; and of several views ``output_<view>``, their logits.
            Where static teachers adapt, also the student's ``online_task_loss`` and ``online_kd_loss``, theirs.

        Raises:
            InputError: if the model returned more than logits.
        """
        if not isinstance(output.logits, torch.Tensor):
            raise InputError(
                f'the student returns a {type(output.logits).__name__} in training mode, and a task needs its logits, '
                'one tensor: let its forward return them alone'
            )
        task_loss = self.criterion(output.logits, target)
        terms = {}
        if static_output is not None:
            taught = self.distillers[learner](output, static_output.detach(), target)
            terms = {f'kd/{name}': term for name, term in taught.items()}
        loss = self.task_weight * task_loss + self.distill_weight * sum(terms.values())
        if static_output is not None and learner == 'student' and self.online_modules:
            online = self._online_terms(output, static_output, target)
            loss, terms = loss + sum(online.values()), {**terms, **online}
        views = {f'output_{view}': logits for view, logits in (output.views or {}).items()}
        return {'loss': loss, 'output': output.logits, 'task_loss': task_loss, **terms, **views}

    def _online_terms(
        self, output: ModelOutput, static_output: ModelOutput, target: torch.Tensor
    ) -> Dict[str, torch.Tensor]:
        """Sums over the teachers that adapt."""
        numbers = [int(number) for number in self.online_modules]
        teachers = [static_output.each[number - 1] if number else static_output for number in numbers]
        found = [online_terms(each.logits, output.logits, target, self.criterion) for each in teachers]
        return {name: torch.stack([terms[name] for terms in found]).sum() for name in found[0]}

    def parameters_of(self, learner: str) -> Iterator[nn.Parameter]:
        """What the loss of one learner computes with: parameters of the criterion and of its distillers.

        A criterion that is a function may close over others.
        """
        if isinstance(self.criterion, nn.Module):
            yield from self.criterion.parameters()
        yield from self.distillers_of(learner)

    def distillers_of(self, learner: str) -> Iterator[nn.Parameter]:
        """What one learner's losses from the static teacher learn with."""
        if learner in self.distillers:
            yield from self.distillers[learner].parameters()


def loss_weights(task_loss_weight: Optional[float], distill_loss_weight: Optional[float]) -> Tuple[float, float]:
    """Weights a of the task loss and b of the distillation loss, from what was given, as timm's tasks do.

    Raises:
        InputError: if one of them is no number.
    """
    for name, weight in (('task_loss_weight', task_loss_weight), ('distill_loss_weight', distill_loss_weight)):
        if weight is not None:
            check_number(name, weight)
    if distill_loss_weight is None:
        distill_loss_weight = 1.0 if task_loss_weight is None else 1.0 - task_loss_weight
    return 1.0 if task_loss_weight is None else task_loss_weight, distill_loss_weight
