"""The dynamic teacher: one set of parameters that runs as a wide teacher and as the student inside it."""

from functools import partial
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..errors import InputError, check_number
from ..expansion.copies import (
    copy_detached,
    copy_model,
    forget_computed_tensors_,
    parameterless_copy,
    plain_copy,
    wide_copy,
)
from ..expansion.student import unwrap_student
from ..plan import ExpansionPlan
from .branches import branch_kinds
from .branching import branch_convolutions
from .early_backward import EarlyBackward
from .functional import call_with_parameters, memory_format_of
from .nested import NestedRatios, RatioView
from .parameter_layout import ParameterLayout
from .shared_tensors import SharedTensors
from .timm_model import TimmModel

__all__ = ['SCALES', 'DynamicTeacher', 'JointOutput', 'check_storage']

SCALES = ('student', 'teacher', 'balanced')
NOISE = 0.1  # where there are replicas besides the student's that would receive equal gradients for ever

# Runs a model: from parameters, by the model's names, and images to its output.
ModelRun = Callable[[Mapping[str, torch.Tensor], torch.Tensor], Any]


class JointOutput(NamedTuple):
    """What student and dynamic teacher made of one batch, see :meth:`DynamicTeacher.joint`.

    Attributes:
        student: the student's logits, shape (B, num_classes), or what its tap returned.
        teacher: the same of the dynamic teacher, or what its loss returned.
    """

    student: Any
    teacher: Any


class DynamicTeacher(NestedRatios, TimmModel):
    """A student's wide, multi-branch copy, with the student inside it.

    The only parameters are those of ``wide`` and ``branches``; the student's are computed from them whenever it runs.
    ``student`` owns nothing but its own buffers, such as BatchNorm statistics. Build it with :func:`expand`, which
    checks the plan.

    Args:
        student: the model that was planned for. It is not modified.
        plan: how it widens, from :func:`timm_gpd.plan_expansion`.
        noise: see :func:`expand`.
        scale: see :func:`expand`.
        branches: kinds of branch, from :func:`timm_gpd.teacher.branches.branch_kinds`.

    Raises:
        ValueError: if ``noise``, ``scale`` or ``branches`` is out of range, or the plan is of another student.

    Attributes:
        wide: the student's class with wider tensors. Under ``scale='student'`` its weights are stored times the
            divisor of the plan, and divided when it runs.
        branches: kernels of ``wide`` that have branches, under the names of their convolutions, which have none of
            their own. They merge, in the convention of ``wide``, into the teacher's kernel, which both models read.
        student: the student's class without parameters.
        plan: how one maps to the other.
        scale: ``'student'``, ``'teacher'`` or ``'balanced'``, see :func:`expand`.
        share_weight: factor of the gradient that the teacher gives in :meth:`joint` to entries that are the student's.
        branch_kinds: the kinds of branch that every convolution with a square odd kernel larger than 1 has.
    """

    def __init__(
        self,
        student: nn.Module,
        plan: ExpansionPlan,
        noise: Optional[float] = None,
        scale: str = 'student',
        branches: Sequence[str] = ('kxk',),
    ) -> None:
        super().__init__()
        check_storage(scale, noise, branches)
        student = unwrap_student(student)
        tensors = dict(student.named_parameters(remove_duplicate=False))
        tensors.update(student.named_buffers(remove_duplicate=False))
        for name, tensor_map in plan.tensors.items():
            if name not in tensors or tensors[name].shape != tensor_map.shape:
                raise InputError(f'the plan is of another student: {name} is not there, or has another shape')
        self.plan = plan
        self.scale = scale
        self.share_weight = 1.0
        self.branch_kinds = branch_kinds(1, branches)
        self._divisors = {
            name: tensor_map.divisor for name, tensor_map in plan.tensors.items() if tensor_map.divisor > 1
        }
        self._layout = ParameterLayout.of(student)
        self.branches = nn.Module()  # before the wide model, whose head is the last of all parameters, as of any model
        self.wide = wide_copy(student, plan, self._stored)
        self.student = parameterless_copy(student)
        if noise is None:
            noise = NOISE if plan.ratio > 2 else 0.0
        if noise:
            _add_noise_(self.wide, plan, noise, scale)
        self.branches, self._branched = branch_convolutions(
            self.wide, plan.tensors, self._layout.is_trained, self.branch_kinds, scale
        )
        inverse = {name: 1 / divisor for name, divisor in self._divisors.items()}
        self._teacher_multipliers = inverse if scale == 'student' else {}
        self._shared = SharedTensors(
            {
                name: plan.tensors[name]
                for name in self._layout.names
                if name in plan.tensors and name not in self._branched
            },
            self._teacher_multipliers,
            self._divisors if scale == 'teacher' else {},
            inverse if scale == 'balanced' else {},
        )
        self._nested = {}
        self._record_config()
        self.train(student.training)

    # -- the two models ---------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the dynamic teacher alone.

        Args:
            x: images, shape (B, in_chans, H, W).

        Returns:
            Its logits, shape (B, num_classes).

        Raises:
            RuntimeError: in a replica of ``nn.DataParallel``, or if parameters are shards.
        """
        return call_with_parameters(self.wide, self.teacher_parameters(memory_format_of(x)), x)

    def joint(
        self,
        x: torch.Tensor,
        student_tap: Optional[ModelRun] = None,
        teacher_tap: Optional[ModelRun] = None,
        teacher_loss: Optional[Callable[[Any], Dict[str, torch.Tensor]]] = None,
        loss_parameters: Iterable[torch.Tensor] = (),
        are_all: bool = True,
        wider: Optional[RatioView] = None,
        pauses: Optional[Callable[[Any, Dict[str, torch.Tensor]], bool]] = None,
    ) -> 'JointOutput':
        """Student and dynamic teacher on one batch, from one shared set of parameters.

        Args:
            x: images, shape (B, in_chans, H, W).
            student_tap: runs the student, if more than its logits is wanted: a function of parameters, by the
                student's names, and images.
            teacher_tap: the same for the dynamic teacher.
            teacher_loss: turns what the dynamic teacher gave into named tensors, its scalar ``'loss'`` among them.
                Given, the teacher's backward pass runs before the student's forward pass, see
                :class:`timm_gpd.teacher.early_backward.EarlyBackward`.
            loss_parameters: tensors besides the parameters and ``x`` that ``teacher_loss`` computes with and that want
                gradients.
            are_all: whether these are all, as far as anybody knows.
            wider: a ratio between, from :meth:`at_ratio`, that runs in the dynamic teacher's place.
            pauses: decides, by the student's output and what ``teacher_loss`` returned, whether the dynamic teacher's
                loss is left out: it is 0 then and gives no gradient. Given, the teacher's backward pass is after the
                student's forward pass, or nowhere, and activations of both are held at once.

        Returns:
            Logits of both, each of shape (B, num_classes), or what the taps return. With ``teacher_loss`` the second is
            what that returned, detached, and ``'gradients'``: a scalar 0 that adds its gradients to the student's loss.

        Raises:
            RuntimeError: in a replica of ``nn.DataParallel``, or if parameters are shards.
        """
        teacher, student = (self if wider is None else wider).parameters_of_both(memory_format_of(x))
        run_student = partial(call_with_parameters, self.student) if student_tap is None else student_tap
        run_wide = partial(call_with_parameters, self.wide) if wider is None else wider.run
        run_teacher = run_wide if teacher_tap is None else teacher_tap
        if teacher_loss is None:
            teacher_output = run_teacher(teacher, x)
            return JointOutput(run_student(student, x), teacher_output)
        loss_parameters = tuple(loss_parameters)
        early = EarlyBackward((*teacher.values(), *loss_parameters, x), are_all)
        result = teacher_loss(run_teacher(teacher, x))
        del teacher  # merged kernels are freed as soon as the backward pass has used them
        if pauses is None:
            result = early.run(result)
        student_output = run_student(student, x)
        if pauses is not None:
            is_paused = pauses(student_output, result)
            result = early.leave_out(result, loss_parameters) if is_paused else early.run(result)
        return JointOutput(student_output, {**result, 'gradients': early.join()})

    def forward_student(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the student alone.

        Args:
            x: images, shape (B, in_chans, H, W).

        Returns:
            Its logits, shape (B, num_classes).

        Raises:
            RuntimeError: in a replica of ``nn.DataParallel``, or if parameters are shards.
        """
        return call_with_parameters(self.student, self.student_parameters(memory_format_of(x)), x)

    # -- from a student and back ------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_student(self, state_dict: Dict[str, torch.Tensor], strict: bool = True) -> Any:
        """Starts again from a student's weights: the teacher becomes exactly that student's function.

        They become the kernels that branches stand beside, and the branches' gammas start again; what else the
        branches have learned is kept.

        Args:
            state_dict: a plain student's ``state_dict``.
            strict: whether all keys must match.

        Returns:
            What ``load_state_dict`` of a student returns: missing and unexpected keys.

        Raises:
            RuntimeError: if a tensor has another shape than the student's or, with ``strict``, keys do not match. The
                teacher then stays as it was.
        """
        _forget_computed_tensors(self)
        plain = self.extract_student()
        result = plain.load_state_dict(state_dict, strict=strict)
        wide = dict(_named_tensors(self.wide))
        buffers = dict(self.student.named_buffers())
        for name, tensor in _named_tensors(plain):
            stored = self._stored(name, tensor)
            if name in self._branched:
                self._branched[name].restart(stored)
            else:
                wide[name].copy_(stored)
            if name in buffers:
                buffers[name].copy_(tensor)
        return result

    @torch.no_grad()
    def extract_student(self) -> nn.Module:
        """The student as an ordinary model of its class, with its own BatchNorm statistics (Sec. 3.3).

        Returns:
            A new model, in this module's mode, that shares no memory with it.

        Raises:
            RuntimeError: in a replica of ``nn.DataParallel``, or if parameters are shards.
        """
        return self._layout.fill_slots(plain_copy(self.student), self.student_parameters())

    @torch.no_grad()
    def extract_teacher(self) -> nn.Module:
        """The dynamic teacher as an ordinary model, branches merged: what to run it often on fixed parameters.

        Returns:
            A new model of the student's class, in this module's mode, that shares no memory with it.

        Raises:
            RuntimeError: in a replica of ``nn.DataParallel``, or if parameters are shards.
        """
        parameters = self.teacher_parameters()
        teacher = copy_model(self.wide, lambda name, tensor: parameters.get(name, tensor).detach().clone())
        return self._layout.fill_slots(teacher, {name: parameters[name] for name in self._branched})

    def __getstate__(self) -> Dict[str, Any]:
        """What copies and pickles are made from."""
        _forget_computed_tensors(self)
        return self.__dict__

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'DynamicTeacher':
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy_detached(self.__getstate__(), memo))
        return copied

    def extra_repr(self) -> str:
        return f'ratio={self.plan.ratio}, scale={self.scale}, branches={self.branch_kinds}'


@torch.no_grad()
def _add_noise_(wide: nn.Module, plan: ExpansionPlan, noise: float, scale: str) -> None:
    for name, parameter in wide.named_parameters():
        tensor_map = plan.tensors.get(name)
        if tensor_map is not None and tensor_map.divisor > 1:
            own = parameter
            if scale == 'balanced':  # the entries that get noise are the teacher's
                own = tensor_map.first_replica(parameter) / tensor_map.divisor
            parameter += tensor_map.noise_like(parameter, noise * own.std().item())


def _forget_computed_tensors(dynamic_teacher: DynamicTeacher) -> None:
    """A compiler runs the models themselves, not twins of them, and what their modules keep of such a run stays."""
    forget_computed_tensors_(dynamic_teacher.wide)
    forget_computed_tensors_(dynamic_teacher.student)


def check_storage(scale: str, noise: Optional[float], branches: Sequence[str]) -> None:
    if scale not in SCALES:
        raise InputError(f'scale must be one of {", ".join(SCALES)}, but is {scale!r}')
    if scale == 'balanced' and len(branches) > 1:
        raise InputError(
            "scale balanced stores a kernel's entries by whose they are, and branches of it are both models': take one "
            'branch, or another scale'
        )
    if noise is None:
        return
    check_number('noise', noise)
    if noise < 0:
        raise InputError(f'noise must be a number of at least 0, but is {noise!r}')


def _named_tensors(model: nn.Module) -> List[Tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
