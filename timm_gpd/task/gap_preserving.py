"""Gap Preserving Distillation as one more of timm's training tasks."""

import logging
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Union

import torch
import torch.nn as nn

from ..distillers import distill_settings
from ..errors import InputError, check_number
from ..expansion.student import unwrap_student
from ..teacher import DynamicTeacher, StudentView, expand
from ..teacher.branches import branch_kinds
from ..teacher.early_backward import refuse_gradients
from .base import BaseTask
from .gap_control import GapControl, resolve_gap_control
from .given_teacher import GivenTeacher, count_static_teachers, create_static_teacher
from .gpd_loss import GpdLoss, WeightSchedule
from .learners import example_batch
from .nested import create_learners, draw_ratios_for
from .reused_classifier import with_reused_classifier
from .step_loss import StepLoss, loss_weights

__all__ = ['GapPreservingTask']

_logger = logging.getLogger(__name__)


class GapPreservingTask(BaseTask):
    """Trains a student and its dynamic teacher together (Sec. 3 and Eq. 3 of arXiv 2410.04140).

    The loss, with S the student, T the dynamic teacher, and the second terms only where there is a static teacher::

        a * L_task(T) + b * L_KD(T <- static)
      + a * L_task(S) + b * L_KD(S <- static) + w * L_GPD(S <- T)

    The evaluation model is the student: a checkpoint's ``state_dict`` is a plain student's, which timm loads, and its
    ``task_state`` is the dynamic teacher, and with a static teacher the distillers of both.

    Args:
        student: timm model with a classifier, or any model whose ``classifier`` is named; without the wrappers of
            ``torch.compile`` and DDP, which are for the task. Not modified; its weights are where the dynamic teacher
            starts.
        static_teacher: None, one or several, see :class:`timm_gpd.DistillationTask`.
        criterion: task loss of logits and targets, a module or a function (default: cross-entropy). Parameters that a
            module has are trained and saved.
        ratio: expansion ratio r.
        num_branches: branches per convolution.
        noise: function-preserving noise, see :func:`timm_gpd.expand`; by default 0 with a ``method`` that runs ratios
            between, which start exact without it alone.
        scale: ``'student'``, ``'teacher'`` or ``'balanced'``, see :func:`timm_gpd.expand`.
        gpd_loss: how the student learns from the dynamic teacher, a key of ``timm_gpd.losses.GPD_LOSSES``.
        gpd_weight: weight w of that loss, at the start.
        distill_type: how both learn from the static teacher, see :class:`timm_gpd.DistillationTask`.
        distill_args: hyperparameters of these losses, see :func:`timm_gpd.distillers.distill_settings`.
        distill_loss_weight: weight b (the paper's lambda) of the static teacher, as in timm's distillation tasks.
        task_loss_weight: weight a of the task loss. Given alone, b = 1 - a.
        temperature: temperature of the losses ``kd`` or ``logit``, and ``token``.
        device: device of the task.
        dtype: dtype of the task.
        verbose: log what was built.
        branches: names the kinds of branch instead of their number, see :func:`timm_gpd.expand`.
        classifier: names the modules that give logits, see :func:`timm_gpd.expand`.
        gpd_loss_args: hyperparameters of ``gpd_loss``, those that are not its defaults.
        gpd_weight_schedule: how the weight w goes to ``gpd_weight_end`` by the end of training, of which
            :meth:`begin_update` hears: ``'constant'`` (not at all), ``'linear'`` or ``'cosine'``.
        gpd_weight_end: the weight w at the end.
        share_weight: factor, from 0 to 1, of the gradient that wider models' losses give to the entries that are the
            student's, too, see :meth:`timm_gpd.DynamicTeacher.share_gradients`.
        method: what a step trains: ``'joint'``, or with other ratios that the dynamic teacher holds, see
            :mod:`timm_gpd.task.nested`, ``'sandwich'``, or ``'netaug'``, whose T is a random one and which has no
            L_GPD and no static teacher.
        between: how many ratios between a step of ``'sandwich'`` has, at most; each adds its L_GPD(<- T).
        seed: of the ratios that are drawn.
        gap_control: what keeps the dynamic teacher near its student, a :class:`timm_gpd.task.gap_control.Switch` or
            ``GapTarget``; None for nothing.
        token_distill_type: see :class:`timm_gpd.DistillationTask`.
        student_feature_dim: the same.
        teacher_feature_dim: the same.

    Raises:
        ValueError: if an argument is out of range, or the static teacher has other classes than the student or not the
            features that a loss needs.
        UnsupportedModelError: if the student cannot be widened.
    """

    def __init__(
        self,
        student: nn.Module,
        static_teacher: Optional[GivenTeacher] = None,
        criterion: Optional[Callable[..., torch.Tensor]] = None,
        ratio: int = 2,
        num_branches: int = 1,
        noise: Optional[float] = None,
        scale: str = 'student',
        gpd_loss: str = 'sce',
        gpd_weight: float = 3.0,
        distill_type: str = 'logit',
        distill_args: Optional[Mapping[str, Any]] = None,
        distill_loss_weight: Optional[float] = None,
        task_loss_weight: Optional[float] = None,
        temperature: float = 4.0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        verbose: bool = True,
        branches: Optional[Sequence[str]] = None,
        classifier: Union[str, Sequence[str], None] = None,
        gpd_loss_args: Optional[Mapping[str, Any]] = None,
        gpd_weight_schedule: str = 'constant',
        gpd_weight_end: float = 0.0,
        share_weight: float = 1.0,
        method: str = 'joint',
        between: int = 2,
        seed: int = 0,
        gap_control: Optional[GapControl] = None,
        token_distill_type: str = 'soft',
        student_feature_dim: Optional[int] = None,
        teacher_feature_dim: Optional[int] = None,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        student = unwrap_student(student)
        check_number('share_weight', share_weight)
        if not 0 <= share_weight <= 1:
            raise InputError(f'share_weight must be from 0 to 1, but is {share_weight!r}')
        self.ratios = draw_ratios_for(method, ratio, between, seed)
        if method == 'netaug' and static_teacher is not None:
            raise InputError('method netaug distils nothing: leave out the static teacher, or take another method')
        is_distilled, classes = method != 'netaug', getattr(student, 'num_classes', None)
        self.gap_control = resolve_gap_control(gap_control, method, classes).to(self.device)
        self.gpd_loss = GpdLoss(gpd_loss, gpd_loss_args, classes) if is_distilled else None
        self.gpd_weight, self.gpd_weights = gpd_weight, WeightSchedule(gpd_weight_schedule, gpd_weight, gpd_weight_end)
        self.task_loss_weight, self.distill_loss_weight = loss_weights(task_loss_weight, distill_loss_weight)
        self.criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
        self.settings = dict(ratio=ratio, branches=list(branch_kinds(num_branches, branches)), scale=scale)
        distillers = distill_settings(
            distill_type, distill_args, temperature, token_distill_type, count_static_teachers(static_teacher)
        )

        self.static_teacher = None
        if static_teacher is not None:
            self.static_teacher = create_static_teacher(static_teacher, student, distillers, self.device, self.dtype)
            student = with_reused_classifier(student, self.static_teacher, distillers, in_place=False)
        if noise is None and self.ratios is not None:
            noise = 0.0  # ratios between start exact without it, and tell replicas apart themselves
        dynamic_teacher = expand(student, ratio, num_branches, noise, scale, branches, classifier)
        dynamic_teacher.share_weight = share_weight
        step_loss = StepLoss(self.criterion, self.task_loss_weight, self.distill_loss_weight)
        if self.static_teacher is None:
            self.trainable_module = create_learners(method, dynamic_teacher, {}, step_loss, self.gpd_loss)
        else:
            self.settings['distillers'] = distillers
            shape, widths = dynamic_teacher.plan.input_shape, (student_feature_dim, teacher_feature_dim)
            example = example_batch(student, self.static_teacher, distillers, shape, *widths)
            self.trainable_module = create_learners(method, dynamic_teacher, distillers, step_loss, self.gpd_loss)
            self.trainable_module.add_distillers(distillers, self.static_teacher, *example)
        self.eval_model = StudentView(dynamic_teacher)
        if verbose:
            _log(self, student)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Joint forward pass and loss.

        Args:
            input: images, shape (B, in_chans, H, W), normalised for the student.
            target: class indices, shape (B,), or whatever else the criterion takes.

        Returns:
            ``loss``; ``output`` and ``teacher_output``, logits of student and dynamic teacher, shape (B, num_classes),
            and every term without a, b and w: ``task_loss``, ``teacher_task_loss``, ``gpd_loss``, and with a static
            teacher ``kd/<loss>`` and ``teacher_kd/<loss>`` for every distillation loss. What is the dynamic teacher's
            is there to be read: its backward pass has run, and a loss on it raises a RuntimeError in ``backward()``.
        """
        static_output = None if self.static_teacher is None else self.static_teacher(input, in_views=True)
        drawn = () if self.ratios is None else (self.ratios.draw(),)
        control = self.gap_control
        student, teacher = self.trainable_module(input, target, static_output, *drawn, **control.arguments())
        loss = student.pop('loss') + teacher.pop('loss')
        if self.gpd_loss is not None:
            student['gpd_loss'] = self.gpd_loss.of_step(student, teacher, target)
            loss = loss + self.gpd_weight * control.distillation_factor() * student['gpd_loss']
        student.update(control.observe(student, teacher))
        loss = loss + teacher.pop('gradients')
        return {
            'loss': loss,
            **student,
            **{f'teacher_{name}': refuse_gradients(term) for name, term in teacher.items()},
        }

    def begin_update(self, update: int, progress: float) -> None:
        """Sets the weight w, and the ratios that are drawn.

        Args:
            update: see :meth:`BaseTask.begin_update`.
            progress: the same.
        """
        super().begin_update(update, progress)
        self.gpd_weight = self.gpd_weights.at(progress)
        if self.ratios is not None:
            self.ratios.begin_update(update)

    def get_dynamic_teacher(self, ema: bool = False) -> DynamicTeacher:
        """The dynamic teacher itself, without wrappers: calling it gives the teacher's logits.

        Args:
            ema: take the averaged one.

        Returns:
            The module that is trained, no copy.

        Raises:
            AttributeError: if the averaged one is asked for before :meth:`setup_ema`.
        """
        return self.get_learners(ema).model

    def get_student(self, ema: bool = False) -> nn.Module:
        """The student as a plain timm model.

        Args:
            ema: take the averaged one.

        Returns:
            A copy, which shares no memory with what is trained.

        Raises:
            AttributeError: if the averaged one is asked for before :meth:`setup_ema`.
        """
        return self.get_dynamic_teacher(ema).extract_student()

    def get_validation_models(self, ema: bool = False) -> Dict[str, nn.Module]:
        """Plain models whose accuracy tells how training goes: copies of student and dynamic teacher.

        The two inside the dynamic teacher would compute their parameters anew for every batch.

        Args:
            ema: take them from the moving average.

        Returns:
            Models by the prefix of their metrics: ``''`` is the student's, ``'teacher_'`` the dynamic teacher's.

        Raises:
            AttributeError: if the averaged ones are asked for before :meth:`setup_ema`.
        """
        return {'': self.get_student(ema), 'teacher_': self.get_dynamic_teacher(ema).extract_teacher()}

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Tracks a moving average of what is trained; the averaged student is the one inside it.

        Args:
            *args: those of timm's ``TrainingTask.setup_ema``: decay, whether it warms up, device.
            **kwargs: the same.

        Returns:
            The moving average, timm's ``ModelEmaV3``.
        """
        ema = super().setup_ema(*args, **kwargs)
        self.eval_model_ema = StudentView(self.get_dynamic_teacher(ema=True))
        return ema

    def compile(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Compiles the training forward pass, see :meth:`BaseTask.compile`.

        Args:
            *args: those of :meth:`BaseTask.compile`.
            **kwargs: the same.

        Returns:
            The model that is validated, which is not compiled.
        """
        self.gap_control.check_compilation()
        learners = self.get_learners()
        parameter = next(learners.model.parameters())
        learners.look_for_other_sources(parameter.new_zeros(1, *learners.model.plan.input_shape))
        return super().compile(*args, **kwargs)

    def get_state_modules(self, ema: bool = False) -> Dict[str, nn.Module]:
        modules = {'dynamic_teacher': self.get_dynamic_teacher(ema), **super().get_state_modules(ema)}
        return {**modules, 'gap_control': self.gap_control} if self.gap_control.state_dict() else modules


def _log(task: GapPreservingTask, student: nn.Module) -> None:
    count = sum(p.numel() for p in task.get_dynamic_teacher().parameters())
    _logger.info(
        f'GapPreservingTask: ratio={task.settings["ratio"]}, branches={task.settings["branches"]}, '
        f'scale={task.settings["scale"]}, gpd_loss={task.gpd_loss}, gpd_weight={task.gpd_weight}, '
        f'task_loss_weight={task.task_loss_weight}, distill_loss_weight={task.distill_loss_weight}, '
        f'distillers={task.settings.get("distillers")}; dynamic teacher of {count} parameters, '
        f'student of {sum(p.numel() for p in student.parameters())}'
    )
