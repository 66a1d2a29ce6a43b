"""Gap Preserving Distillation as one more of timm's training tasks."""
import logging
from typing import Any, Dict, Optional, Union

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model

from .dynamic_teacher import DynamicTeacher, StudentView, expand
from .losses import GPD_LOSSES, kd_loss
from .static_teacher import resolve_static_teacher

__all__ = ['GapPreservingTask']

_logger = logging.getLogger(__name__)


class GapPreservingTask(TrainingTask):
    """Trains a student and its dynamic teacher together (Sec. 3 and Eq. 3 of arXiv 2410.04140).

    The loss, with S the student, T the dynamic teacher, and the second terms only where there is a static teacher::

        a * L_task(T) + b * L_KD(T <- static)
      + a * L_task(S) + b * L_KD(S <- static) + w * L_GPD(S <- T)

    The evaluation model is the student: a checkpoint's ``state_dict`` is a plain student's, which timm loads, and its
    ``task_state`` is the dynamic teacher.

    Args:
        student: timm model with a classifier. Not modified; its weights are where the dynamic teacher starts.
        static_teacher: timm model name (created with pretrained weights), module, timm DistillationTeacher, or None.
        criterion: task loss of logits and targets (default: cross-entropy).
        ratio: expansion ratio r.
        num_branches: branches per convolution.
        noise: function-preserving noise, see :func:`timm_gpd.expand`.
        scale: ``'student'`` or ``'teacher'``, see :func:`timm_gpd.expand`.
        gpd_loss: how the student learns from the dynamic teacher, a key of ``timm_gpd.losses.GPD_LOSSES``.
        gpd_weight: weight w of that loss.
        distill_loss_weight: weight b (the paper's lambda) of the static teacher, as in timm's distillation tasks.
        task_loss_weight: weight a of the task loss. Given alone, b = 1 - a.
        temperature: temperature of the static teacher's loss.
        device: device of the task.
        dtype: dtype of the task.
        verbose: log what was built.

    Raises:
        ValueError: if an argument is out of range, or the static teacher has other classes than the student.
        UnsupportedModelError: if the student cannot be widened.
    """

    def __init__(
            self,
            student: nn.Module,
            static_teacher: Union[str, nn.Module, None] = None,
            criterion: Optional[nn.Module] = None,
            ratio: int = 2,
            num_branches: int = 1,
            noise: float = 0.0,
            scale: str = 'student',
            gpd_loss: str = 'sce',
            gpd_weight: float = 3.0,
            distill_loss_weight: Optional[float] = None,
            task_loss_weight: Optional[float] = None,
            temperature: float = 4.0,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if gpd_loss not in GPD_LOSSES:
            raise ValueError(f'gpd_loss must be one of {", ".join(GPD_LOSSES)}, but is {gpd_loss!r}')
        self.gpd_loss = GPD_LOSSES[gpd_loss]
        self.gpd_weight = gpd_weight
        self.task_loss_weight = 1.0 if task_loss_weight is None else task_loss_weight
        if distill_loss_weight is None:
            distill_loss_weight = 1.0 if task_loss_weight is None else 1.0 - task_loss_weight
        self.distill_loss_weight = distill_loss_weight
        self.temperature = temperature
        self.criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
        self.settings = dict(ratio=ratio, num_branches=num_branches, scale=scale)

        # Under the name that timm's distillation tasks use.
        self.teacher = None if static_teacher is None else (
            resolve_static_teacher(static_teacher, student, self.device, self.dtype))
        cfg = getattr(student, 'pretrained_cfg', None) or {}
        for key, default in (('mean', (0.485, 0.456, 0.406)), ('std', (0.229, 0.224, 0.225))):
            value = torch.tensor(cfg.get(key, default), device=self.device, dtype=self.dtype).view(1, -1, 1, 1)
            self.register_buffer(f'student_{key}', value, persistent=False)
        self.trainable_module = expand(student, ratio, num_branches, noise, scale)
        self.eval_model = StudentView(self.trainable_module)
        if verbose:
            count = sum(p.numel() for p in self.trainable_module.parameters())
            _logger.info(
                f'GapPreservingTask: ratio={ratio}, num_branches={num_branches}, scale={scale}, gpd_loss={gpd_loss}, '
                f'gpd_weight={gpd_weight}, task_loss_weight={self.task_loss_weight}, '
                f'distill_loss_weight={self.distill_loss_weight if static_teacher is not None else None}; '
                f'dynamic teacher of {count} parameters over a student of '
                f'{sum(p.numel() for p in student.parameters())}')

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Joint forward pass and loss.

        Args:
            input: images, shape (B, in_chans, H, W), normalised for the student.
            target: class indices, shape (B,), or whatever else the criterion takes.

        Returns:
            ``loss``; ``output`` and ``teacher_output``, logits of student and dynamic teacher, shape (B, num_classes);
            and every unweighted term: ``task_loss``, ``teacher_task_loss``, ``gpd_loss``, and with a static teacher
            ``kd_loss`` and ``teacher_kd_loss``.
        """
        output, teacher_output = self.trainable_module(input, joint=True)
        terms = {
            'task_loss': self.criterion(output, target),
            'teacher_task_loss': self.criterion(teacher_output, target),
            'gpd_loss': self.gpd_loss(output, teacher_output),
        }
        loss = self.task_loss_weight * (terms['task_loss'] + terms['teacher_task_loss'])
        loss = loss + self.gpd_weight * terms['gpd_loss']
        if self.teacher is not None:
            with torch.no_grad():
                static_output = self.teacher(
                    self.teacher.normalize_input(input, self.student_mean, self.student_std))
            terms['kd_loss'] = kd_loss(output, static_output, self.temperature)
            terms['teacher_kd_loss'] = kd_loss(teacher_output, static_output, self.temperature)
            loss = loss + self.distill_loss_weight * (terms['kd_loss'] + terms['teacher_kd_loss'])
        return {'loss': loss, 'output': output, 'teacher_output': teacher_output, **terms}

    def train(self, mode: bool = True) -> 'GapPreservingTask':
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def get_dynamic_teacher(self, ema: bool = False) -> DynamicTeacher:
        """The dynamic teacher itself, without wrappers: calling it gives the teacher's logits."""
        return unwrap_model(self.get_trainable_module(ema=ema))

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'GapPreservingTask':
        """Wraps the dynamic teacher in DistributedDataParallel; the static teacher stays as it is."""
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Tracks a moving average of the dynamic teacher; the averaged student is the one inside it."""
        ema = super().setup_ema(*args, **kwargs)
        self.eval_model_ema = StudentView(ema.module)
        return ema

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """The dynamic teacher's tensors, and the settings that they were made with."""
        return {'settings': dict(self.settings), 'dynamic_teacher': self.get_dynamic_teacher(ema).state_dict()}

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        """Restores the dynamic teacher. Without a state it stays as expanded from the student that was loaded.

        Raises:
            ValueError: if the state was made with other settings.
        """
        if not state:
            return
        if state['settings'] != self.settings:
            raise ValueError(f'the checkpoint was made with {state["settings"]}, and this run has {self.settings}: '
                             'resume with the settings of the checkpoint')
        self.get_dynamic_teacher(ema).load_state_dict(state['dynamic_teacher'], strict=strict)
