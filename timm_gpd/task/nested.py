"""Other ways to train a dynamic teacher and the student inside it: with ratios between, or one wider model at a time.

*Sandwich* is the rule of universally slimmable networks (arXiv 1903.05134): a step trains the full width, the smallest
and some random ones between; the smaller learn from the full width's soft labels, which that paper calls inplace
distillation. *NetAug* is network augmentation (arXiv 2110.08890): a step trains the small model and one random wider
model that holds it, each by the task loss alone, with equal weights.
"""

import random
from functools import partial
from typing import Dict, List, Optional, Sequence, Tuple

import torch

from ..distillers import DistillSettings, ModelOutput
from ..errors import InputError
from ..teacher import DynamicTeacher, JointOutput
from ..teacher.early_backward import EarlyBackward
from ..teacher.functional import memory_format_of
from .gap_control import Switch
from .gpd_loss import GpdLoss
from .learners import JointLearners
from .step_loss import StepLoss

__all__ = ['METHODS', 'DrawnRatios', 'NetAugLearners', 'SandwichLearners', 'create_learners', 'draw_ratios_for']

METHODS = ('joint', 'sandwich', 'netaug')


class DrawnRatios:
    """The random ratios of every update: the same in all processes, and in a run that was resumed.

    Args:
        choices: the ratios that may be drawn.
        count: how many different ones an update has.
        seed: the run's.
    """

    def __init__(self, choices: Sequence[int], count: int, seed: int) -> None:
        self.choices, self.count, self.seed = tuple(choices), min(count, len(choices)), seed
        self.update = 0
        self.is_told = False

    def begin_update(self, update: int) -> None:
        """Takes down the number of the update that is next. Where nobody tells it, every draw is the next update's."""
        self.update, self.is_told = update, True

    def draw(self) -> Tuple[int, ...]:
        """The ratios of the update, largest first."""
        generator = random.Random(f'ratios of an update: {self.seed}, {self.update}')
        self.update += not self.is_told
        return tuple(sorted(generator.sample(self.choices, self.count), reverse=True))


def draw_ratios_for(method: str, ratio: int, between: int, seed: int) -> Optional[DrawnRatios]:
    """What a method draws at every update.

    Args:
        method: one of ``METHODS``.
        ratio: the dynamic teacher's expansion ratio.
        between: how many ratios between a step of ``'sandwich'`` has, if there are as many.
        seed: the run's.

    Returns:
        The ratios to draw; None for ``'joint'``, which draws nothing.

    Raises:
        InputError: if the method does not exist, or there is nothing wider to draw.
    """
    if method not in METHODS:
        raise InputError(f'method must be one of {", ".join(METHODS)}, but is {method!r}')
    if not isinstance(between, int) or isinstance(between, bool) or between < 0:
        raise InputError(f'between must be an integer of at least 0, but is {between!r}')
    if method == 'joint':
        return None
    if ratio < 2:
        raise InputError(f'method {method} trains wider models, and of ratio {ratio} there are none: raise the ratio')
    if method == 'sandwich':
        return DrawnRatios(range(2, ratio), between, seed)
    return DrawnRatios(range(2, ratio + 1), 1, seed)


class _NestedLearners(JointLearners):
    """Learners that run ratios between, which a compiler cannot follow."""

    def look_for_other_sources(self, x: torch.Tensor) -> None:
        if self.model.plan.ratio > 2:
            raise InputError(
                'ratios between student and dynamic teacher run uncompiled: leave out compile(), or take ratio 2'
            )
        super().look_for_other_sources(x)


class SandwichLearners(_NestedLearners):
    """A dynamic teacher, the student inside it, and ratios between, which learn from the dynamic teacher alone.

    Args:
        dynamic_teacher: what is trained.
        settings: losses from a static teacher, which the ratios between do not have.
        step_loss: the losses of the two.
        gpd_loss: how a ratio between learns from the dynamic teacher.
    """

    def __init__(
        self,
        dynamic_teacher: DynamicTeacher,
        settings: DistillSettings,
        step_loss: StepLoss,
        gpd_loss: GpdLoss,
    ) -> None:
        super().__init__(dynamic_teacher, settings, step_loss)
        self.gpd_loss = gpd_loss

    def forward(
        self,
        x: torch.Tensor,
        target: torch.Tensor,
        static_output: Optional[ModelOutput] = None,
        ratios: Sequence[int] = (),
        switch: Optional[Switch] = None,
        teacher_weight: Optional[torch.Tensor] = None,
    ) -> JointOutput:
        """What :meth:`JointLearners.forward` returns, with the sum of the losses between in the teacher's ``loss``.

        Each ratio between runs forward and backward after the dynamic teacher and before the student, so that no two
        models' activations are held at once.

        Args:
            x: images, shape (B, in_chans, H, W).
            target: see :meth:`StepLoss.forward`.
            static_output: the static teacher's output for the images.
            ratios: the ratios between.
            switch: decides about the dynamic teacher's loss, and not about those of ratios between.
            teacher_weight: a scalar that the dynamic teacher's loss is multiplied by, and not those.

        Returns:
            The student's, and the dynamic teacher's; the student's has ``between_loss``, the mean over the ratios
            between, if there are any.
        """
        labels: List[torch.Tensor] = []
        losses: List[torch.Tensor] = []
        passes: List[EarlyBackward] = []
        terms: Dict[str, torch.Tensor] = {}
        run_student, run_teacher = self._runs()

        def teacher_loss(output: ModelOutput) -> Dict[str, torch.Tensor]:
            result = self._teacher_loss(target, static_output, teacher_weight, output)
            labels.append(result['output'].detach())
            return result

        def run_between_and_student(parameters: Dict[str, torch.Tensor], x: torch.Tensor) -> ModelOutput:
            for ratio in ratios:
                loss, early = self._learn(ratio, x, labels[0], target)
                losses.append(loss)
                passes.append(early)
            return run_student(parameters, x)

        output, teacher = self.model.joint(
            x,
            run_between_and_student,
            run_teacher,
            teacher_loss,
            self.step_loss.parameters_of('dynamic_teacher'),
            are_all=self._are_all(target),
            pauses=self._pauses(switch, target, terms),
        )
        student = {**self.step_loss('student', output, target, static_output), **terms}
        if ratios:
            total = torch.stack(losses).sum()
            student['between_loss'] = total / len(ratios)
            teacher['loss'] = teacher['loss'] + total
            teacher['gradients'] = teacher['gradients'] + torch.stack([early.join() for early in passes]).sum()
        return JointOutput(student, teacher)

    def _learn(
        self, ratio: int, x: torch.Tensor, labels: torch.Tensor, target: torch.Tensor
    ) -> Tuple[torch.Tensor, EarlyBackward]:
        """The loss of a ratio between, detached, and the backward pass that it has run."""
        model = self.model.at_ratio(ratio)
        parameters = model.computed_parameters(memory_format_of(x))
        early = EarlyBackward((*parameters.values(), x))
        output = self.taps['dynamic_teacher'].read(model.run(parameters, x))
        result = early.run({'loss': self.gpd_loss(output.logits, labels, target)})
        return result['loss'], early


class NetAugLearners(_NestedLearners):
    """A student and one wider model around it at a time: the dynamic teacher, or a ratio between."""

    def forward(
        self,
        x: torch.Tensor,
        target: torch.Tensor,
        static_output: Optional[ModelOutput] = None,
        ratios: Sequence[int] = (),
    ) -> JointOutput:
        """What :meth:`JointLearners.forward` returns, with a drawn ratio in the dynamic teacher's place.

        Args:
            x: images, shape (B, in_chans, H, W).
            target: see :meth:`StepLoss.forward`.
            static_output: not used.
            ratios: the one ratio of the wider model.

        Returns:
            The student's, and the wider model's.
        """
        (ratio,) = ratios
        if ratio == self.model.plan.ratio:
            return super().forward(x, target)
        wider = self.model.at_ratio(ratio)
        run_student, _ = self._runs()
        output, teacher = self.model.joint(
            x,
            run_student,
            lambda parameters, x: ModelOutput(wider.run(parameters, x)),
            partial(self._teacher_loss, target, None, None),
            self.step_loss.parameters_of('dynamic_teacher'),
            are_all=self._are_all(target),
            wider=wider,
        )
        return JointOutput(self.step_loss('student', output, target), teacher)


def create_learners(
    method: str,
    dynamic_teacher: DynamicTeacher,
    settings: DistillSettings,
    step_loss: StepLoss,
    gpd_loss: Optional[GpdLoss],
) -> JointLearners:
    """What a method trains.

    Args:
        method: one of ``METHODS``.
        dynamic_teacher: the dynamic teacher with the student inside it.
        settings: losses from a static teacher; none where there is no static teacher.
        step_loss: the losses of both.
        gpd_loss: how a smaller model learns from the dynamic teacher; None where it does not.

    Returns:
        The learners.

    Raises:
        UnsupportedModelError: if a ratio between is not exactly the student.
    """
    if method == 'joint':
        return JointLearners(dynamic_teacher, settings, step_loss)
    for ratio in range(2, dynamic_teacher.plan.ratio):
        dynamic_teacher.at_ratio(ratio)
    if method == 'sandwich':
        return SandwichLearners(dynamic_teacher, settings, step_loss, gpd_loss)
    return NetAugLearners(dynamic_teacher, settings, step_loss)
