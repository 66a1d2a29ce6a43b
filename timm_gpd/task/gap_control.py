"""Keeping the dynamic teacher near its student: by pausing its loss, or by weights that hold its lead at a target."""

from typing import Any, Dict, Mapping, Optional, Sequence, Union

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from ..errors import InputError, check_number
from ..losses.targets import are_indices

__all__ = ['GAP_SCALES', 'GapControl', 'GapTarget', 'Switch', 'resolve_gap_control']

GAP_SCALES = ('teacher', 'distillation')
SMOOTHING = 0.02  # share of the newest batch in the average lead
RATE = 0.02  # octaves that a batch moves the factor by, where the lead is nothing or twice the target
OCTAVES = 5.0  # below 1 (and for distillation above) that the factor may go


class GapControl(nn.Module):
    """What a step does about the gap; this one nothing."""

    def check_compilation(self) -> None:
        """Refuses a compiler of learners, where it could not follow their arguments.

        Raises:
            InputError: if it could not.
        """

    def arguments(self) -> Dict[str, Any]:
        """What learners are called with, besides the batch.

        Returns:
            Keyword arguments of :meth:`JointLearners.forward`.
        """
        return {}

    def distillation_factor(self) -> Union[float, torch.Tensor]:
        """What the weight of the student's loss from the dynamic teacher is multiplied by.

        Returns:
            A number, or a scalar.
        """
        return 1.0

    def observe(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
    ) -> Dict[str, torch.Tensor]:
        """Takes down what a batch gave.

        Args:
            student: terms of the student's loss, and its ``output``, shape (B, num_classes).
            teacher: terms of the dynamic teacher's.

        Returns:
            Scalars to log.
        """
        return {}


class Switch(GapControl):
    """Pauses the dynamic teacher's loss while its distance from the student is large (SwitOKD, ECCV 2022).

    With p_S and p_T the probabilities of student and dynamic teacher, y the target's, and every distance a mean over
    the images of all processes::

        D = |p_S - p_T|_1    s = |p_S - y|_1    t = |p_T - y|_1
        paused if D > s - exp(-t / (s + t)) * t and t < s

    Each batch decides for itself, also where several make an update. In a paused one the dynamic teacher's loss has no
    part in the loss, and its backward pass does not run.
    """

    def check_compilation(self) -> None:
        raise InputError('a switch decides at every step, which a compiler cannot follow: leave out compile()')

    def arguments(self) -> Dict[str, Any]:
        """Lets learners ask the switch.

        Returns:
            See :meth:`GapControl.arguments`.
        """
        return {'switch': self}

    @torch.no_grad()
    def decide(self, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Decides about a batch, alike in all processes of the default group, each of which must ask.

        Args:
            student: the student's logits, shape (B, num_classes).
            teacher: the dynamic teacher's, of the same shape.
            target: class indices, shape (B,), or class probabilities, shape (B, num_classes).

        Returns:
            Scalars: ``distance`` D and ``threshold``, and ``paused``, 1 or 0.

        Raises:
            ValueError: if the target is neither.
        """
        dtype = torch.promote_types(student.dtype, torch.float32)
        p_student, p_teacher = (logits.softmax(-1, dtype) for logits in (student, teacher))
        labels = F.one_hot(target, student.shape[1]) if are_indices(target, *student.shape) else target
        pairs = ((p_student, p_teacher), (p_student, labels), (p_teacher, labels))
        distances = torch.stack([(one - other).abs().sum(-1).mean() for one, other in pairs])
        distance, s, t = _mean_over_processes(distances, len(student))
        share = t / (s + t).clamp(min=torch.finfo(dtype).tiny)  # both are 0 where all is learned
        threshold = s - torch.exp(-share) * t
        return {
            'distance': distance,
            'threshold': threshold,
            'paused': ((distance > threshold) & (t < s)).to(dtype),
        }


class GapTarget(GapControl):
    """Holds the dynamic teacher's lead at a target, by a factor of its loss or of the student's loss from it.

    The lead of a batch is the student's task loss minus the dynamic teacher's, on the images of all processes: of one
    batch and in the loss, it is far less noisy than a difference of accuracies. Its average a over batches and the
    factor 2^u follow::

        a += 0.02 * (lead - a)
        u -= 0.02 * clip(a / target - 1, -1, 1)    of the teacher's loss, -5 <= u <= 0
        u += 0.02 * clip(a / target - 1, -1, 1)    of distillation, -5 <= u <= 5

    Both start at 0, where the lead starts too. A step uses the factor that those before it have left.

    Args:
        target: the lead to hold, above 0, in the unit of the task loss (nats for cross-entropy).
        scales: what the factor is of: ``'teacher'``, the dynamic teacher's loss, also in the entries that it shares
            with the student, or ``'distillation'``, the weight w of the student's loss from it.

    Raises:
        InputError: if the target is no number above 0, or there is nothing of this name to scale.
    """

    def __init__(self, target: float, scales: str = 'teacher') -> None:
        super().__init__()
        check_number('gap target', target)
        if target <= 0:
            raise InputError(f'gap target must be above 0, but is {target!r}: a teacher without a lead teaches nothing')
        if scales not in GAP_SCALES:
            raise InputError(f'a gap target scales one of {", ".join(GAP_SCALES)}, but not {scales!r}')
        self.target, self.scales = target, scales
        self.register_buffer('average', torch.zeros(()))
        self.register_buffer('exponent', torch.zeros(()))

    def arguments(self) -> Dict[str, Any]:
        """The factor, where it is of the dynamic teacher's loss.

        Returns:
            See :meth:`GapControl.arguments`.
        """
        return {'teacher_weight': self.factor()} if self.scales == 'teacher' else {}

    def distillation_factor(self) -> Union[float, torch.Tensor]:
        """The factor, where it is of distillation.

        Returns:
            A scalar, or 1.
        """
        return self.factor() if self.scales == 'distillation' else 1.0

    def factor(self) -> torch.Tensor:
        """The factor as those steps have left it that were observed.

        Returns:
            A scalar that does not change with what is observed later.
        """
        return torch.exp2(self.exponent)

    @torch.no_grad()
    def observe(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: Mapping[str, torch.Tensor],
    ) -> Dict[str, torch.Tensor]:
        """Takes down the lead of a batch, alike in all processes of the default group, each of which must call.

        Args:
            student: see :meth:`GapControl.observe`.
            teacher: the same.

        Returns:
            Scalars: ``lead``, and the ``gap_factor`` that the batch had.
        """
        factor = self.factor()
        lead = (student['task_loss'] - teacher['task_loss']).detach().to(self.average.dtype)
        (lead,) = _mean_over_processes(lead[None], len(student['output']))
        average = torch.lerp(self.average, lead, SMOOTHING)
        move = RATE * (average / self.target - 1).clamp(-1, 1)
        low, high, move = (-OCTAVES, 0.0, -move) if self.scales == 'teacher' else (-OCTAVES, OCTAVES, move)
        if_finite = lead.isfinite()  # the loop skips others, or ends
        self.average.copy_(torch.where(if_finite, average, self.average))
        self.exponent.copy_(torch.where(if_finite, (self.exponent + move).clamp(low, high), self.exponent))
        return {'lead': lead, 'gap_factor': factor}


def resolve_gap_control(control: Optional[GapControl], method: str, num_classes: Optional[int]) -> GapControl:
    """Checks that a gap can be controlled.

    Args:
        control: how; None where it is not.
        method: one of ``timm_gpd.task.nested.METHODS``.
        num_classes: of the student, where that is known.

    Returns:
        The control; one that does nothing where there is none.

    Raises:
        InputError: if there is no gap, or it is always 0.
    """
    if control is None:
        return GapControl()
    if not isinstance(control, GapControl):
        raise InputError(f'gap_control must be a Switch or a GapTarget, but is {control!r}')
    if method == 'netaug':
        raise InputError('method netaug trains another wider model each time, whose gap is none to control')
    if isinstance(control, Switch) and num_classes == 1:
        raise InputError('a switch compares probabilities of classes, and the student has one: take a GapTarget')
    return control


def _mean_over_processes(values: torch.Tensor, images: int) -> Sequence[torch.Tensor]:
    """Means over images, shape (N,), of the images of all processes; bit for bit the same in each."""
    sums = torch.cat([values * images, values.new_tensor([images])])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        parts = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, sums)  # added up here, in the order of ranks
        sums = torch.stack(parts).sum(0)
    return (sums[:-1] / sums[-1]).unbind()
