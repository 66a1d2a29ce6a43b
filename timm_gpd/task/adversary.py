"""Adversarial training: the images of a task's steps are perturbed before all else sees them."""

import logging
from typing import Any, Callable, Dict, List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..distillers import AdversarialDistiller, Tap, evaluation_mode, loss_and_teacher
from ..errors import InputError
from ..losses.adversarial import VIEWS
from ..private_torch import pre_hooks_of
from ..teacher import DynamicTeacher
from .attack import Attack
from .learners import Learners
from .stored_teacher import stored_teachers

__all__ = ['Adversary', 'setup_adversary']

_logger = logging.getLogger(__name__)


class Adversary:
    """Perturbs the images that a task is called with, and shows it the views that its losses compare.

    The student is attacked, in evaluation mode, as in the published code of AdaAD, DGAD and IGDM; it learns in training
    mode. What the perturbation makes large is the task loss of the student, or where a loss of the static teacher's is
    adversarial the divergence of the student from that teacher, whose gradient is followed as well (AdaAD).

    Args:
        attack: how.
        views: what a task is shown, of ``timm_gpd.losses.adversarial.VIEWS``, in that order.
        teachers: numbers of the static teachers whose losses are adversarial, 0 for the only one or for their mean.
    """

    def __init__(self, attack: Attack, views: Tuple[str, ...], teachers: Tuple[int, ...]) -> None:
        self.attack, self.views, self.teachers = attack, views, teachers

    def __call__(
        self,
        task: TrainingTask,
        args: Tuple[torch.Tensor, ...],
        kwargs: Dict[str, torch.Tensor],
    ) -> Tuple[Tuple[torch.Tensor, ...], Dict[str, Any]]:
        """What a task is called with, as a hook of its forward pass."""
        given = {**dict(zip(('input', 'target'), args)), **kwargs}
        images, target = given['input'], given['target']
        perturbed = self.perturb(task, images, target)
        difference = perturbed - images.detach()
        if images.requires_grad:
            perturbed = perturbed + (images - images.detach())  # plus 0, whose gradient goes to the images
        views = {'clean': images, 'perturbed': perturbed, 'mirrored': images - difference}
        return (torch.cat([views[view] for view in self.views]), target), {}

    def perturb(self, task: TrainingTask, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Attacks the student of a task.

        Args:
            task: the task.
            images: shape (B, in_chans, H, W), normalised.
            target: class indices, shape (B,), or what else the task's criterion takes.

        Returns:
            Images of the same shape, without history.
        """
        student = _student_to_attack(task)
        criterion: Any = task.criterion

        def objective(x: torch.Tensor) -> torch.Tensor:
            logits = student(x)
            if not self.teachers:
                return criterion(logits, target) * len(x)  # a sum, so that gradients of half precision do not vanish
            return torch.stack([_divergence(logits, teacher(x)) for teacher in self._static_teachers(task)]).sum()

        with evaluation_mode(student):
            return self.attack(objective, images)

    def _static_teachers(self, task: Any) -> List[Callable[[torch.Tensor], torch.Tensor]]:
        static = task.static_teacher
        return [static.teachers[number - 1].logits if number else static.logits for number in self.teachers]


def setup_adversary(task: TrainingTask, attack: Attack) -> None:
    """Lets a task train on perturbed images, from now on. Call it before the task is compiled or distributed.

    Each call ``task(images, target)`` then attacks the student first: all losses are of the perturbed images, of
    student and dynamic teacher, and those of ``timm_gpd.losses.ADVERSARIAL_LOSSES`` also of other views. Random numbers
    are torch's: seed its generator before a step, with another seed in every process, to repeat it.

    Args:
        task: :class:`timm_gpd.GapPreservingTask`, :class:`timm_gpd.DistillationTask` or timm's ``ClassificationTask``.
        attack: from :func:`timm_gpd.task.create_attack`.

    Raises:
        InputError: if the task has an adversary already, trains ratios between by views of images, or has a static
            teacher whose outputs are stored or that adapts by online modules.
    """
    if any(isinstance(hook, Adversary) for hook in pre_hooks_of(task)):
        raise InputError('the task has an adversary already: make another task')
    static = getattr(task, 'static_teacher', None)
    if static is not None and stored_teachers(static):
        raise InputError(
            'perturbed images do not come again, so that a store of outputs is of no use: leave out the cache'
        )
    if static is not None and any(teacher.online_modules is not None for teacher in static.members):
        raise InputError('an attack does not see the online modules of a static teacher: leave one of them out')
    learners = unwrap_model(task.get_trainable_module())
    taps = [module for module in task.modules() if isinstance(module, Tap)]
    distillers: Dict[str, nn.Module] = {}
    if isinstance(learners, Learners):
        taps += learners.taps.values()
        distillers = dict(learners.step_loss.distillers['student'].items()) if learners.step_loss.distillers else {}
    adversarial = {name: loss for name, loss in distillers.items() if isinstance(loss, AdversarialDistiller)}
    wanted = {'perturbed', *(getattr(getattr(task, 'gpd_loss', None), 'views', ()))}
    wanted.update(view for loss in adversarial.values() for view in loss.views)
    views = tuple(view for view in VIEWS if view in wanted)
    if getattr(task, 'ratios', None) is not None and (len(views) > 1 or getattr(task.gpd_loss, 'views', ())):
        raise InputError(
            'ratios between learn from one view of images, and a loss compares several: take method joint, or other '
            'losses than dgad and igdm'
        )
    for tap in taps:
        tap.views = views
    teachers = tuple(sorted({loss_and_teacher(name)[1] for name in adversarial}))
    task.register_forward_pre_hook(Adversary(attack, views, teachers), with_kwargs=True)
    if task.verbose:
        _logger.info(
            f'{type(task).__name__} trains on images that {attack} has perturbed, shown as {", ".join(views)}; what '
            'that costs is in no estimate'
        )


def _student_to_attack(task: TrainingTask) -> nn.Module:
    """The student, of a dynamic teacher a copy: its parameters are computed once, and not at every step."""
    learners = unwrap_model(task.get_trainable_module())
    model = learners.model if isinstance(learners, Learners) else learners
    return model.extract_student().requires_grad_(False) if isinstance(model, DynamicTeacher) else model


def _divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """A sum over images, of which gradients go to both."""
    teacher = F.log_softmax(teacher_logits, -1)
    return F.kl_div(F.log_softmax(student_logits, -1), teacher, reduction='sum', log_target=True)
