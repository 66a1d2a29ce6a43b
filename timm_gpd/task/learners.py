"""What a static teacher teaches: a model that is trained, and the distillers of every learner in it."""
from typing import Any, Callable, Dict, Mapping, Set, Tuple

import torch
import torch.nn as nn
from timm.models import group_parameters

from ..distillers import Distillers, DistillSettings, ModelOutput, Tap, example_output, tap_learner
from ..teacher.dynamic_teacher import DynamicTeacher
from ..expansion.images import accepted_input_shape, input_shape
from .static_teacher import StaticTeacher

__all__ = ['Learners', 'PairOfLearners', 'StudentLearner', 'examples']

# From a learner's logits and its distillation losses to named tensors, the scalar 'loss' among them.
LearnerLoss = Callable[[torch.Tensor, Dict[str, torch.Tensor]], Dict[str, torch.Tensor]]


class Learners(nn.Module):
    """A model together with its distillers: all that is trained, in one forward pass, which is what DDP wraps.

    The taps are no submodules: the parameters keep the names that the model gives them.

    Args:
        model: what is trained, with the learners in it.
        taps: one for every learner, by its name.
        settings: losses, from :func:`timm_gpd.distillers.distill_settings`.
        example_input: images, shape (B, in_chans, H, W).
        goal: the static teacher's output for them.
    """

    def __init__(
            self,
            model: nn.Module,
            taps: Mapping[str, Tap],
            settings: DistillSettings,
            example_input: torch.Tensor,
            goal: ModelOutput,
    ) -> None:
        super().__init__()
        self.model = model
        self.taps = dict(taps)
        outputs = example_output(model, example_input, self.run)
        self.distillers = nn.ModuleDict({
            name: Distillers(settings, output, goal) for name, output in outputs.items()}).to(example_input)

    def run(self, x: torch.Tensor) -> Dict[str, ModelOutput]:
        """Every learner's output for images of shape (B, in_chans, H, W)."""
        raise NotImplementedError

    def learn(
            self,
            learner: str,
            output: ModelOutput,
            goal: ModelOutput,
            target: torch.Tensor,
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """A learner's logits, shape (B, num_classes), and its loss terms, scalars ``kd/<loss>`` whose sum is L_KD."""
        terms = self.distillers[learner](output, goal, target)
        return output.logits, {f'kd/{name}': term for name, term in terms.items()}

    # -- what timm asks of what is trained --------------------------------------------------------------------------

    def no_weight_decay(self) -> Set[str]:
        """Names of parameters that the student's class exempts from weight decay."""
        exempt = self.model.no_weight_decay() if hasattr(self.model, 'no_weight_decay') else set()
        return {f'model.{name}' for name in exempt}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The student's layer groups, for layer-wise learning rate decay. Distillers go with the last."""
        layers = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name[len('model.'):], last) if name.startswith('model.') else last


class StudentLearner(Learners):
    """A student that learns from a static teacher alone."""

    def __init__(self, student: nn.Module, settings: DistillSettings, *example: Any) -> None:
        super().__init__(student, {'student': tap_learner(student, settings)}, settings, *example)

    def run(self, x: torch.Tensor) -> Dict[str, ModelOutput]:
        return {'student': self.taps['student'](x)}

    def forward(
            self,
            x: torch.Tensor,
            goal: ModelOutput,
            target: torch.Tensor,
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """Logits and distillation losses, see :meth:`learn`.

        Args:
            x: images, shape (B, in_chans, H, W).
            goal: the static teacher's output for them.
            target: class indices, shape (B,), or class probabilities, shape (B, num_classes).
        """
        return self.learn('student', self.run(x)['student'], goal, target)


class PairOfLearners(Learners):
    """A dynamic teacher and the student inside it, which both learn from a static teacher."""

    def __init__(self, dynamic_teacher: DynamicTeacher, settings: DistillSettings, *example: Any) -> None:
        taps = {'student': tap_learner(dynamic_teacher.student, settings),
                'dynamic_teacher': tap_learner(dynamic_teacher.wide, settings)}
        super().__init__(dynamic_teacher, taps, settings, *example)

    def run(self, x: torch.Tensor) -> Dict[str, ModelOutput]:
        student, teacher = self.model.joint_tapped(x, self.taps['student'], self.taps['dynamic_teacher'])
        return {'student': student, 'dynamic_teacher': teacher}

    def forward(
            self,
            x: torch.Tensor,
            goal: ModelOutput,
            target: torch.Tensor,
            teacher_loss: LearnerLoss,
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor], Dict[str, torch.Tensor], torch.Tensor]:
        """Logits and distillation losses of the student, and what the dynamic teacher makes of its own.

        Args:
            x: images, shape (B, in_chans, H, W).
            goal: the static teacher's output for them.
            target: class indices, shape (B,), or class probabilities, shape (B, num_classes).
            teacher_loss: see :meth:`DynamicTeacher.forward`; takes what :meth:`learn` returns.

        Returns:
            What :meth:`learn` returns for the student, and as from the dynamic teacher what ``teacher_loss`` returned
            and a scalar 0 with its gradients.
        """
        output, *teacher = self.model.joint_tapped(
            x, self.taps['student'], self.taps['dynamic_teacher'],
            lambda output: teacher_loss(*self.learn('dynamic_teacher', output, goal, target)),
            self.distillers['dynamic_teacher'].parameters())
        return *self.learn('student', output, goal, target), *teacher


def examples(
        student: nn.Module,
        static_teacher: StaticTeacher,
        settings: DistillSettings,
) -> Tuple[torch.Tensor, ModelOutput]:
    """Random images of the student's size, and the static teacher's output for them.

    Raises:
        ValueError: if one of the two does not offer what the losses need, or would be another model if tapped for it.
    """
    shape = accepted_input_shape(student) or input_shape(student)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(next(student.parameters()))
    tap_learner(student, settings).verify(x)
    static_teacher.verify(x)
    return x, static_teacher(x)
