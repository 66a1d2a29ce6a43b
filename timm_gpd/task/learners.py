"""What is trained in one forward pass: a model, the learners in it, and the loss of each."""

from functools import partial
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from timm.models import group_parameters

from ..distillers import Distillers, DistillSettings, ModelOutput, Tap, evaluation_mode, example_output, tap_learner
from ..errors import InputError
from ..expansion.copies import blank_copy
from ..expansion.images import blank_images
from ..teacher import DynamicTeacher, JointOutput
from ..teacher.dynamic_teacher import ModelRun
from ..teacher.early_backward import reaches_others
from ..teacher.functional import call_with_parameters
from .gap_control import Switch
from .step_loss import StepLoss
from .stored_teacher import AnyStaticTeacher
from .student_gradients import StudentGradients

__all__ = ['JointLearners', 'Learners', 'StudentLearner', 'example_batch']


class Learners(nn.Module):
    """A model together with the losses of its learners: all that is trained, which is what DDP wraps.

    The taps are no submodules: the parameters keep the names that the model gives them.

    Args:
        model: what is trained, with the learners in it.
        taps: one for every learner, by its name.
        step_loss: their losses. It gets its distillers from :meth:`add_distillers`.
    """

    def __init__(self, model: nn.Module, taps: Mapping[str, Tap], step_loss: StepLoss) -> None:
        super().__init__()
        self.model = model
        self.taps = dict(taps)
        for tap in self.taps.values():
            tap.separate_token()
        self.step_loss = step_loss

    def run(self, x: torch.Tensor) -> Dict[str, ModelOutput]:
        """Every learner's output for images of shape (B, in_chans, H, W)."""
        raise NotImplementedError

    def add_distillers(
        self,
        settings: DistillSettings,
        static_teacher: AnyStaticTeacher,
        x: torch.Tensor,
        static_output: ModelOutput,
    ) -> None:
        """Gives every learner its losses from the static teacher, and what trains of that.

        Args:
            settings: losses, from :func:`timm_gpd.distillers.distill_settings`.
            static_teacher: the static teacher.
            x: example images, shape (B, in_chans, H, W), whose outputs tell widths and sizes.
            static_output: what the static teacher made of them.
        """
        outputs = example_output(self.model, x, self.run)
        self.step_loss.distillers.update(
            {name: Distillers(settings, output, static_output).to(x) for name, output in outputs.items()}
        )
        for teacher in static_teacher.members:
            if teacher.online_modules is not None:
                self.step_loss.online_modules[str(teacher.number)] = teacher.online_modules

    # -- what timm asks of what is trained --------------------------------------------------------------------------

    def no_weight_decay(self) -> Set[str]:
        """Names of parameters that the student's class exempts from weight decay."""
        exempt = self.model.no_weight_decay() if hasattr(self.model, 'no_weight_decay') else set()
        return {f'model.{name}' for name in exempt}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The student's layer groups, for layer-wise learning rate decay. What the loss learns goes with the last."""
        layers = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name[len('model.') :], last) if name.startswith('model.') else last


class StudentLearner(Learners):
    """A student that learns from a static teacher alone."""

    def __init__(self, student: nn.Module, settings: DistillSettings, step_loss: StepLoss) -> None:
        super().__init__(student, {'student': tap_learner(student, settings)}, step_loss)

    def run(self, x: torch.Tensor) -> Dict[str, ModelOutput]:
        return {'student': self.taps['student'](x)}

    def forward(
        self,
        x: torch.Tensor,
        target: torch.Tensor,
        static_output: Optional[ModelOutput] = None,
    ) -> Dict[str, torch.Tensor]:
        """What :meth:`StepLoss.forward` returns.

        Args:
            x: images, shape (B, in_chans, H, W).
            target: see :meth:`StepLoss.forward`.
            static_output: the static teacher's output for the images.
        """
        return self.step_loss('student', self.taps['student'](x), target, static_output)


class JointLearners(Learners):
    """A dynamic teacher and the student inside it."""

    def __init__(self, dynamic_teacher: DynamicTeacher, settings: DistillSettings, step_loss: StepLoss) -> None:
        taps = {
            'student': tap_learner(dynamic_teacher.student, settings),
            'dynamic_teacher': tap_learner(dynamic_teacher.wide, settings),
        }
        super().__init__(dynamic_teacher, taps, step_loss)
        self.knows_all_sources = True
        self.student_gradients: Optional[StudentGradients] = None

    def take_down_student_gradients(self) -> StudentGradients:
        """From now on the student's gradients are taken down apart from the teacher's, into what is returned."""
        self.student_gradients = StudentGradients()
        return self.student_gradients

    def run(self, x: torch.Tensor) -> Dict[str, ModelOutput]:
        student, teacher = self.model.joint(x, *self._runs())
        return {'student': student, 'dynamic_teacher': teacher}

    def forward(
        self,
        x: torch.Tensor,
        target: torch.Tensor,
        static_output: Optional[ModelOutput] = None,
        switch: Optional[Switch] = None,
        teacher_weight: Optional[torch.Tensor] = None,
    ) -> JointOutput:
        """What :meth:`StepLoss.forward` returns for both; the dynamic teacher's is detached, with ``gradients`` to add.

        The dynamic teacher's backward pass runs on the way, see :meth:`DynamicTeacher.joint`.

        Args:
            x: images, shape (B, in_chans, H, W).
            target: see :meth:`StepLoss.forward`.
            static_output: the static teacher's output for the images.
            switch: decides whether the dynamic teacher's loss is left out; what it found is among the student's terms.
            teacher_weight: a scalar that the dynamic teacher's loss is multiplied by.
        """
        terms: Dict[str, torch.Tensor] = {}
        output, teacher = self.model.joint(
            x,
            *self._runs(),
            partial(self._teacher_loss, target, static_output, teacher_weight),
            self.step_loss.parameters_of('dynamic_teacher'),
            are_all=self._are_all(target),
            pauses=self._pauses(switch, target, terms),
        )
        return JointOutput({**self.step_loss('student', output, target, static_output), **terms}, teacher)

    def look_for_other_sources(self, x: torch.Tensor) -> None:
        """Before a compiler comes, which cannot look at graphs: does the dynamic teacher compute with tensors that want
        gradients and are not its own, such as a prompt that a hook adds?

        Args:
            x: example images, shape (B, in_chans, H, W).

        Raises:
            InputError: if a compiler could not follow them.
        """
        if self.student_gradients is not None:
            raise InputError(
                "a compiler keeps none of the student's gradients, by whose norm it is clipped: leave out compile()"
            )
        views = max(len(self.taps['student'].views), 1)
        with evaluation_mode(self.model), torch.enable_grad():
            logits = self.run(x.repeat(views, 1, 1, 1))['dynamic_teacher'].logits
        self.knows_all_sources = not reaches_others(logits, self.model.parameters())

    def _teacher_loss(
        self,
        target: torch.Tensor,
        static_output: Optional[ModelOutput],
        weight: Optional[torch.Tensor],
        output: ModelOutput,
    ) -> Dict[str, torch.Tensor]:
        result = self.step_loss('dynamic_teacher', output, target, static_output)
        return result if weight is None else {**result, 'loss': weight * result['loss']}

    def _pauses(
        self,
        switch: Optional[Switch],
        target: torch.Tensor,
        terms: Dict[str, torch.Tensor],
    ) -> Optional[Callable[[ModelOutput, Mapping[str, torch.Tensor]], bool]]:
        """A switch as :meth:`DynamicTeacher.joint` takes one, which puts what it found into ``terms``."""
        if switch is None:
            return None

        def pauses(student: ModelOutput, teacher: Mapping[str, torch.Tensor]) -> bool:
            terms.update(switch.decide(student.logits, teacher['output'], target))
            return bool(terms['paused'])

        return pauses

    def _are_all(self, target: torch.Tensor) -> bool:
        """Whether it is known what the dynamic teacher's loss computes with."""
        return isinstance(self.step_loss.criterion, nn.Module) and not target.requires_grad and self.knows_all_sources

    def _runs(self) -> List[ModelRun]:
        """Student and dynamic teacher through their taps, as functions of parameters."""
        return [self._run_student, partial(_run_tapped, self.taps['dynamic_teacher'])]

    def _run_student(self, parameters: Mapping[str, torch.Tensor], x: torch.Tensor) -> ModelOutput:
        if self.student_gradients is not None:
            parameters = self.student_gradients.watch(parameters)
        return _run_tapped(self.taps['student'], parameters, x)


def _run_tapped(tap: Tap, parameters: Mapping[str, torch.Tensor], x: torch.Tensor) -> ModelOutput:
    return call_with_parameters(tap, {f'model.{name}': tensor for name, tensor in parameters.items()}, x)


def example_batch(
    student: nn.Module,
    static_teacher: AnyStaticTeacher,
    settings: DistillSettings,
    shape: Tuple[int, int, int],
    student_feature_dim: Optional[int] = None,
    teacher_feature_dim: Optional[int] = None,
) -> Tuple[torch.Tensor, ModelOutput]:
    """Random images of the student's size, and the static teacher's output for them.

    Args:
        student: what will be trained.
        static_teacher: what it will learn from.
        settings: losses, from :func:`timm_gpd.distillers.distill_settings`.
        shape: channels, height and width (pixels) of the images.
        student_feature_dim: width that the student's embedding must have, if any.
        teacher_feature_dim: the same of the static teacher's, of each where there are several.

    Returns:
        Images, shape (1, in_chans, H, W), and the output.

    Raises:
        ValueError: if one of the two does not offer what the losses need, or would be another model if tapped for it.
    """
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(next(student.parameters()))
    tap = tap_learner(student, settings)
    output = tap.verify(x)
    if 'token' in tap.needs:
        _check_token(student, shape)
    static_teacher.verify(x)
    for teacher in static_teacher.members:
        teacher.add_online_modules(x)
    static_output = static_teacher(x).detach()
    _check_width('student', student_feature_dim, [output])
    _check_width('static teacher', teacher_feature_dim, static_output.each or [static_output])
    return x, static_output


def _check_token(student: nn.Module, shape: Tuple[int, int, int]) -> None:
    """Of some architectures there are models with a distillation token and without: the first give two logits."""
    copy = blank_copy(student).train()
    copy.set_distilled_training(True)
    with torch.no_grad():
        output = copy(blank_images(copy, shape))
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        raise InputError(
            f'{type(student).__name__} is without a distillation token here, which the loss token would need: choose '
            'a model that has one, such as deit_tiny_distilled_patch16_224, or another loss'
        )


def _check_width(owner: str, width: Optional[int], outputs: Sequence[ModelOutput]) -> None:
    if width is None:
        return
    found = [output.embedding.shape[-1] for output in outputs if output.embedding is not None]
    if not found:
        raise InputError(f"no loss compares the {owner}'s features, which were to have width {width}: leave that out")
    if set(found) != {width}:
        raise InputError(f"the {owner}'s features have width {found[0]}, and not {width}: leave the number out")
