"""From joint training to plain training of the student and back, between two steps, with all that was gathered."""

import logging
from typing import Any, Dict, Optional, cast

import torch
import torch.nn as nn
from timm.optim import SGDW, Adafactor, AdafactorBigVision, Lamb, Lion, NAdamW
from timm.optim.kron import Kron
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..errors import InputError
from ..teacher import DynamicTeacher
from ..teacher.optimizer_state import State, replicate_states, slice_states
from .gap_preserving import GapPreservingTask
from .learners import Learners

__all__ = ['hand_over']

# Optimizers that remember averages of gradients and of their squares under these keys; others use the keys otherwise.
_AVERAGING = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam),
    *(SGDW, NAdamW, Lamb, Lion),
)
# Optimizers whose states have another form for a larger tensor.
_BY_SHAPE = (Adafactor, AdafactorBigVision, torch.optim.Adafactor, Kron)
_POWERS = {'momentum_buffer': 1, 'exp_avg': 1, 'exp_avg_sq': 2, 'max_exp_avg_sq': 2}

_logger = logging.getLogger(__name__)


@torch.no_grad()
def hand_over(
    before: TrainingTask,
    optimizer_before: torch.optim.Optimizer,
    after: TrainingTask,
    optimizer_after: torch.optim.Optimizer,
) -> None:
    """Lets a task go on where another one is: joint training where the student was trained alone, or the reverse.

    The student is the same, and so is its next step. ``after`` is made of its weights before; what goes over is what
    the optimizer remembers, groups with their learning rates, the losses from a static teacher, and the average::

        plain = ClassificationTask(task.get_student())
        plain_optimizer = create_optimizer_v2(plain.get_trainable_module(), opt='sgd', lr=0.1)
        hand_over(task, optimizer, plain, plain_optimizer)

    With ``scale='student'`` or ``'balanced'`` and one branch the step after it is, but for rounding, the one that joint
    training would take without the teacher's losses: with SGD, Lion and the Adam family, momentum, weight decay and
    clipping by norm. By nature it is another one

    - with ``scale='teacher'``, where joint training moves the student by the square of a weight's divisor times as much
      with SGD, and by the divisor times as much with Adam: what goes over are averages of the student's gradients;
    - with branches: all of them move the merged kernel, and alone it has a momentum of its own, that of its first
      branch;
    - with optimizers that look at a whole tensor (LAMB's trust ratio, Adafactor), and with clipping ``agc``.

    What is remembered of a tensor that widens starts anew, and the log says so, where it is not one number for each
    entry (Adafactor, Kron), and where it must be scaled and the optimizer is not SGD, LAMB, Lion or of the Adam family:
    to plain training for ``scale='teacher'`` or branches, and always to joint training.

    From plain to joint training replica 0 gets the student's state, and other replicas what they would have gathered,
    see :func:`timm_gpd.teacher.optimizer_state.replicate_states`.

    Args:
        before: what was trained: a :class:`GapPreservingTask`, or a task of the student alone.
        optimizer_before: over all that it trains.
        after: what is trained from now on, of the other kind, made of ``before``'s student as it is now. It has a
            moving average where ``before`` has one. A criterion's own parameters go over to joint training only if a
            static teacher is there before and after.
        optimizer_after: over all that it trains, of the same class.

    Raises:
        InputError: if the two are of one kind, the student or the optimizer's class is another one, or there is no
            average to go on with.
    """
    joint = [isinstance(task, GapPreservingTask) for task in (before, after)]
    if joint[0] == joint[1]:
        raise InputError('a hand-over is from a GapPreservingTask to a task of the student alone, or the reverse')
    kinds = [type(optimizer).__name__ for optimizer in (optimizer_before, optimizer_after)]
    if type(optimizer_before) is not type(optimizer_after):
        raise InputError(f'{kinds[1]} cannot go on with what {kinds[0]} remembers: make an optimizer of the same class')
    if before.has_ema() and not after.has_ema():
        raise InputError('the task before has a moving average: call setup_ema of the one after it first')
    _check_same_student(before, after)
    _load_losses(before, after)
    if before.has_ema():
        _load_average(before, after)
    _hand_over_optimizer(_Side(before, optimizer_before), _Side(after, optimizer_after))


# -- models -----------------------------------------------------------------------------------------------------------


def _student(task: TrainingTask, ema: bool = False) -> nn.Module:
    return cast(nn.Module, unwrap_model(task.get_eval_model(ema=ema)))


def _check_same_student(before: TrainingTask, after: TrainingTask) -> None:
    old, new = _student(before).state_dict(), _student(after).state_dict()
    if old.keys() != new.keys() or not all(_agree(tensor, new[name].to(tensor)) for name, tensor in old.items()):
        raise InputError('the task after has another student: make it of task.get_student() as it is now')


def _agree(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Equal, but for the rounding of what is stored divided by 3."""
    if not old.is_floating_point():
        return torch.equal(old, new)
    return torch.allclose(old, new, rtol=4 * torch.finfo(old.dtype).eps, atol=0.0, equal_nan=True)


def _load_losses(before: TrainingTask, after: TrainingTask) -> None:
    """Distillers of the student, and a criterion's tensors, where both tasks train them."""
    for ema in (False, True)[: 1 + before.has_ema()]:
        old, new = (_trained(task, ema).state_dict() for task in (before, after))
        for name in old.keys() & new.keys():
            if name.startswith('step_loss.'):
                new[name].copy_(old[name])


def _load_average(before: TrainingTask, after: TrainingTask) -> None:
    averaged = _student(before, ema=True).state_dict()
    _student(after, ema=True).load_state_dict(averaged)


def _trained(task: TrainingTask, ema: bool = False) -> nn.Module:
    return cast(nn.Module, unwrap_model(task.get_trainable_module(ema=ema)))


# -- optimizers -------------------------------------------------------------------------------------------------------


class _Side:
    """A task and its optimizer, whose state has names instead of numbers.

    Args:
        task: the task.
        optimizer: over all that it trains.

    Attributes:
        named: of every group the parameters and their names: ``model.<name>`` and ``step_loss.<name>``.
    """

    def __init__(self, task: TrainingTask, optimizer: torch.optim.Optimizer) -> None:
        self.task, self.optimizer = task, optimizer
        self.teacher = task.get_dynamic_teacher() if isinstance(task, GapPreservingTask) else None
        trained = _trained(task)
        prefix = '' if isinstance(trained, Learners) else 'model.'
        names = {id(parameter): f'{prefix}{name}' for name, parameter in trained.named_parameters()}
        try:
            self.named = [[(names[id(p)], p) for p in group['params']] for group in optimizer.param_groups]
        except KeyError:
            raise InputError('an optimizer holds parameters that its task does not train: give each task its own')

    def states(self) -> Dict[str, State]:
        """What the optimizer remembers of each parameter, by its name."""
        found = self.optimizer.state_dict()['state']
        names = [name for group in self.named for name, _ in group]
        return {name: found[number] for number, name in enumerate(names) if number in found}

    def common_name(self, name: str) -> str:
        """A parameter's name on both sides: a kernel that has branches is called as the convolution's weight."""
        if self.teacher is None:
            return name
        if name.startswith('model.branches.') and name.endswith('.kernel'):
            return f'model.{name.removeprefix("model.branches.").removesuffix("kernel")}weight'
        return f'model.{name.removeprefix("model.wide.")}' if name.startswith('model.wide.') else name

    def settings(self) -> Dict[str, Dict[str, Any]]:
        """The settings of the group that each parameter is in, by its common name."""
        return {
            self.common_name(name): {key: value for key, value in group.items() if key not in ('params', 'param_names')}
            for group, named in zip(self.optimizer.param_groups, self.named)
            for name, _ in named
        }

    def shapes(self) -> Dict[str, torch.Size]:
        """Shapes of parameters, by their common names."""
        return {self.common_name(name): parameter.shape for named in self.named for name, parameter in named}


def _hand_over_optimizer(before: _Side, after: _Side) -> None:
    """Gives an optimizer the state of another, and its groups the settings of those that their parameters were in."""
    states, settings = _convert_states(before, after), before.settings()
    found: Dict[int, State] = {}
    groups, anew, count = [], [], 0
    for group, named in zip(after.optimizer.param_groups, after.named):
        numbers = range(count, count + len(named))
        count += len(named)
        for number, (name, parameter) in zip(numbers, named):
            state = states.get(name, {})
            if state is None:
                anew.append(after.common_name(name).removeprefix('model.'))
            elif state:
                found[number] = {key: _laid_out(value, parameter) for key, value in state.items()}
        known = [settings[common] for common in (after.common_name(name) for name, _ in named) if common in settings]
        groups.append({**group, **(known[0] if known else {}), 'params': list(numbers)})
    after.optimizer.load_state_dict({**before.optimizer.state_dict(), 'state': found, 'param_groups': groups})
    if anew:
        _logger.warning(
            f'the optimizer starts anew for {len(anew)} of {count} parameters, whose state it cannot take over: '
            f'{", ".join(anew[:3])}{", ..." if len(anew) > 3 else ""}'
        )


def _convert_states(before: _Side, after: _Side) -> Dict[str, Optional[State]]:
    """States by the names of the side after; None where one starts anew although there was one."""
    states = before.states()
    powers = _POWERS if isinstance(before.optimizer, _AVERAGING) else {}
    models = {name.removeprefix('model.'): state for name, state in states.items() if name.startswith('model.')}
    if before.teacher is not None:
        converted = slice_states(before.teacher, models, powers)
    else:
        converted = replicate_states(cast(DynamicTeacher, after.teacher), models, powers)
    if isinstance(before.optimizer, _BY_SHAPE):
        old, new = before.shapes(), after.shapes()
        same = {name: old[name] == new[name] for name in old.keys() & new.keys()}
        converted = {n: s if same[after.common_name(f'model.{n}')] else None for n, s in converted.items()}
    losses = {name: state for name, state in states.items() if name.startswith('step_loss.')}
    return {**losses, **{f'model.{name}': state for name, state in converted.items()}}


def _laid_out(value: Any, parameter: nn.Parameter) -> Any:
    """A tensor of a parameter's shape in the order in memory that the parameter has."""
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
