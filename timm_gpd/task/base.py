"""What the tasks of this package share: checkpoints, validation, DDP, clipping, compilation."""

from copy import deepcopy
from typing import Any, Dict, List, Optional

import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..errors import InputError
from ..private_torch import trace_backward
from .ema_teacher import EmaTeacher
from .learners import Learners
from .static_teacher import StaticTeacher, StaticTeachers
from .stored_teacher import AnyStaticTeacher

__all__ = ['BaseTask']


class BaseTask(TrainingTask):
    """A task whose state, beyond the student, is some modules and the settings that they were made with.

    Attributes:
        trainable_module: the :class:`Learners`, in the end also wrapped in DDP.
        static_teacher: the static teacher, or several as one, or None.
        settings: what a checkpoint's modules must have been made with to be loaded.
    """

    static_teacher: Optional[AnyStaticTeacher]
    settings: Dict[str, Any]

    @property
    def teacher(self) -> Optional[AnyStaticTeacher]:
        """The static teacher, under the name that timm's distillation tasks use."""
        return self.static_teacher

    @property
    def ema_teacher(self) -> Optional[EmaTeacher]:
        """The teacher that follows the student, if there is one: it, or one of several."""
        teachers = [] if self.static_teacher is None else self.static_teacher.members
        return next((teacher for teacher in teachers if isinstance(teacher, EmaTeacher)), None)

    def begin_update(self, update: int, progress: float) -> None:
        """Where training stands, for what depends on it. The training loop says so before every batch.

        Args:
            update: number of the update that the batch is of, from 0 over the whole run, resumed or not.
            progress: the share of the schedule that is done, from 0 to 1.
        """
        if self.ema_teacher is not None:
            self.ema_teacher.begin_update(update, progress)

    def update_ema(self, step: Optional[int] = None) -> None:
        """What follows the optimizer's step: the moving average and the EMA teacher move. timm's loop calls it.

        Args:
            step: number of the update that was made, from 1, by which the moving average warms up.
        """
        super().update_ema(step)
        if self.ema_teacher is not None:
            self.ema_teacher.follow(self.get_student())

    def get_learners(self, ema: bool = False) -> Learners:
        """What is trained, without wrappers.

        Args:
            ema: take the moving average.

        Returns:
            Model and losses, no copy; None for the moving average where there is none.
        """
        return unwrap_model(self.get_trainable_module(ema=ema))

    def get_student(self, ema: bool = False) -> nn.Module:
        """The student as a plain timm model, without wrappers.

        Args:
            ema: take the averaged one.

        Returns:
            The model itself where it is trained alone, and a copy where it is part of a dynamic teacher; None for the
            averaged one where there is none.
        """
        return unwrap_model(self.get_eval_model(ema=ema))

    def get_validation_models(self, ema: bool = False) -> Dict[str, nn.Module]:
        """Plain models whose accuracy tells how training goes.

        Args:
            ema: take them from the moving average.

        Returns:
            Models by the prefix of their metrics: ``''`` is the student's.
        """
        return {'': self.get_student(ema)}

    def get_teachers(self) -> Dict[str, AnyStaticTeacher]:
        """The static teachers and the EMA teacher, whose accuracy tells what the student learns from.

        Returns:
            Teachers by the prefix of their metrics; several static ones as one.
        """
        members = [] if self.static_teacher is None else self.static_teacher.members
        static = [teacher for teacher in members if teacher.prefix == StaticTeacher.prefix]
        found: Dict[str, AnyStaticTeacher] = {teacher.prefix: teacher for teacher in members}
        return {**found, StaticTeacher.prefix: StaticTeachers(static)} if len(static) > 1 else found

    def get_state_modules(self, ema: bool = False) -> Dict[str, nn.Module]:
        """What a checkpoint's ``task_state`` holds besides the settings.

        Args:
            ema: take it from the moving average.

        Returns:
            Modules by name: those that are trained, or follow what is, and are no part of the student.

        Raises:
            AttributeError: if the moving average is asked for before :meth:`setup_ema`.
        """
        step_loss = self.get_learners(ema).step_loss
        modules = {'distillers': step_loss.distillers} if self.static_teacher is not None else {}
        if isinstance(step_loss.criterion, nn.Module) and any(True for _ in step_loss.criterion.parameters()):
            modules['criterion'] = step_loss.criterion
        if step_loss.online_modules:
            modules['online_modules'] = step_loss.online_modules
        if self.ema_teacher is not None and not ema:
            modules['ema_teacher'] = self.ema_teacher.model
        return modules

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """A checkpoint's ``task_state``.

        Args:
            module: not used; timm's tasks have it.
            ema: take it from the moving average.

        Returns:
            The settings, under ``'settings'``, and the ``state_dict`` of every module of :meth:`get_state_modules`,
            under its name.

        Raises:
            AttributeError: if the moving average is asked for before :meth:`setup_ema`.
        """
        state = {name: module.state_dict() for name, module in self.get_state_modules(ema).items()}
        return {'settings': deepcopy(self.settings), **state}

    def load_task_state(
        self,
        state: Optional[Dict[str, Any]],
        strict: bool = True,
        module: Optional[nn.Module] = None,
        ema: bool = False,
    ) -> None:
        """Restores the modules.

        Args:
            state: from :meth:`get_task_state`. None or an empty one leaves the modules as they are.
            strict: whether all keys must match.
            module: not used; timm's tasks have it.
            ema: restore the moving average.

        Raises:
            InputError: if the state was made with other settings, or lacks a module.
            RuntimeError: if a tensor has another shape or, with ``strict``, keys do not match.
            AttributeError: if the moving average is asked for before :meth:`setup_ema`.
        """
        if not state:
            return
        if state['settings'] != self.settings:
            raise InputError(
                f'the checkpoint was made with {state["settings"]}, and this run has {self.settings}: '
                'resume with the settings of the checkpoint'
            )
        for name, module in self.get_state_modules(ema).items():
            if name not in state:
                raise InputError(f'the checkpoint holds no {name}, which this run has')
            module.load_state_dict(state[name], strict=strict)

    def get_clip_parameters(self, exclude_head: bool = False) -> List[nn.Parameter]:
        """Parameters whose gradients are clipped.

        Args:
            exclude_head: leave out the last two of the model, which are its head.

        Returns:
            Those of the model and of the losses.
        """
        learners = self.get_learners()
        parameters = list(learners.model.parameters())
        return [*(parameters[:-2] if exclude_head else parameters), *learners.step_loss.parameters()]

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs: Any) -> nn.Module:
        """Compiles the training forward pass, in place, and the static teacher's. Validation runs uncompiled.

        It lets ``torch.compile`` trace backward passes, in the whole process and for good.

        Args:
            backend: see ``torch.compile``.
            mode: the same.
            **compile_kwargs: its other arguments.

        Returns:
            The model that is validated, which is not compiled.

        Raises:
            InputError: if a static teacher has online modules.
        """
        if self.get_learners().step_loss.online_modules:
            raise InputError(
                'online modules are hooked into a static teacher, which a compiler cannot follow: leave out compile(), '
                'or the modules'
            )
        trace_backward()
        self.get_trainable_module().compile(backend=backend, mode=mode, **compile_kwargs)
        if self.static_teacher is not None:
            self.static_teacher.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.get_eval_model()

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'BaseTask':
        """Wraps what is trained in DistributedDataParallel; a static teacher stays as it is.

        Args:
            device_ids: the GPU of this process, in a list; None for a CPU.
            **ddp_kwargs: other arguments of DistributedDataParallel.

        Returns:
            This task.

        Raises:
            ValueError: if ``torch.distributed`` has no process group yet.
        """
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self
