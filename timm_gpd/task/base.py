"""What the tasks of this package share: weights of the losses, checkpoints, DDP, clipping."""
from copy import deepcopy
from typing import Any, Dict, List, Optional, Tuple

import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..private_torch import trace_backward
from .learners import Learners

__all__ = ['BaseTask', 'loss_weights']


def loss_weights(task_loss_weight: Optional[float], distill_loss_weight: Optional[float]) -> Tuple[float, float]:
    """Weights a of the task loss and b of the distillation loss, from what was given, as timm's tasks do."""
    if distill_loss_weight is None:
        distill_loss_weight = 1.0 if task_loss_weight is None else 1.0 - task_loss_weight
    return 1.0 if task_loss_weight is None else task_loss_weight, distill_loss_weight


class BaseTask(TrainingTask):
    """A task whose state, beyond the student, is some modules and the settings that they were made with."""

    settings: Dict[str, Any]

    def get_state_modules(self, ema: bool = False) -> Dict[str, nn.Module]:
        """What a checkpoint's ``task_state`` holds, by name."""
        trained = unwrap_model(self.get_trainable_module(ema=ema))
        return {'distillers': trained.distillers} if isinstance(trained, Learners) else {}

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """Tensors of the modules, and the settings."""
        state = {name: module.state_dict() for name, module in self.get_state_modules(ema).items()}
        return {'settings': deepcopy(self.settings), **state}

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        """Restores the modules. Without a state they stay as they are.

        Raises:
            ValueError: if the state was made with other settings.
        """
        if not state:
            return
        if state['settings'] != self.settings:
            raise ValueError(f'the checkpoint was made with {state["settings"]}, and this run has {self.settings}: '
                             'resume with the settings of the checkpoint')
        for name, module in self.get_state_modules(ema).items():
            module.load_state_dict(state[name], strict=strict)

    def get_student(self, ema: bool = False) -> nn.Module:
        """The student as a plain model, the averaged one with ``ema``."""
        return unwrap_model(self.get_eval_model(ema=ema))

    def get_validation_models(self, ema: bool = False) -> Dict[str, nn.Module]:
        """Plain models to validate, by the prefix of their metrics: ``''`` the student, ``'teacher_'`` its teacher."""
        return {'': self.get_student(ema)}

    def get_clip_parameters(self, exclude_head: bool = False) -> List[nn.Parameter]:
        """Parameters whose gradients are clipped; the student's head is the last two of its model."""
        trained = unwrap_model(self.get_trainable_module())
        model, others = (trained.model, trained.distillers.parameters()) if isinstance(trained, Learners) \
            else (trained, ())
        parameters = list(model.parameters())
        return [*(parameters[:-2] if exclude_head else parameters), *others]

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs: Any) -> nn.Module:
        """Compiles the training forward pass, in place, and the static teacher's. Validation runs uncompiled."""
        trace_backward()
        self.get_trainable_module().compile(backend=backend, mode=mode, **compile_kwargs)
        if getattr(self, 'teacher', None) is not None:
            self.teacher.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.get_eval_model()

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'BaseTask':
        """Wraps what is trained in DistributedDataParallel; a static teacher stays as it is."""
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self
