"""The dynamic teacher: one set of parameters that runs as a wide teacher and as the student inside it."""
import copy
import re
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .functional import call_with_parameters
from .branches import BranchedKernel, branch_kinds, cosine_prior, is_branchable
from .early_backward import backward_early
from ..expansion.copies import copy_model, parameterless_copy, wide_copy
from ..plan import ExpansionPlan
from ..expansion.planner import plan_expansion
from .shared_tensors import SharedTensors
from ..expansion.verify import verify_plan

__all__ = ['DynamicTeacher', 'StudentView', 'TeacherLoss', 'expand', 'SCALES']

SCALES = ('student', 'teacher')

# From the dynamic teacher's output to named tensors, the scalar 'loss' among them.
TeacherLoss = Callable[[Any], Dict[str, torch.Tensor]]


def expand(
        student: nn.Module,
        ratio: int = 2,
        num_branches: int = 1,
        noise: float = 0.0,
        scale: str = 'student',
        branches: Optional[Sequence[str]] = None,
) -> 'DynamicTeacher':
    """Builds the dynamic teacher of a student by inverse reparameterization (Sec. 3.2 of arXiv 2410.04140).

    The teacher starts as exactly the student's function. This is checked on a random batch in float64, with randomised
    weights, before anything is returned.

    Args:
        student: a timm model with a classifier. It is not modified.
        ratio: expansion ratio r of the channels.
        num_branches: branches per convolution, 1 to 6 (the paper's); 1 is a plain convolution.
        noise: standard deviation, relative to each weight's own, of noise that tells replicas apart without changing
            the teacher's function or the student. Exact replicas of everything but replica 0 receive equal gradients.
        scale: what is stored. ``'student'`` stores the student's own weights in replica 0, and the student's learning
            rate and weight decay mean what they mean in plain training. ``'teacher'`` (the authors') stores the
            teacher's weights, and the student's are r times a slice of them.
        branches: names the kinds of branch instead of their number, see ``timm_gpd.teacher.branches.BRANCH_KINDS``.

    Returns:
        The dynamic teacher, on the student's device, in its dtype and mode.

    Raises:
        ValueError: if an argument is out of range.
        UnsupportedModelError: if a module cannot be widened exactly.
    """
    kinds = branch_kinds(num_branches, branches)
    if not noise >= 0:
        raise ValueError(f'noise must be a number of at least 0, but is {noise!r}')
    if scale not in SCALES:
        raise ValueError(f'scale must be one of {", ".join(SCALES)}, but is {scale!r}')
    plan = plan_expansion(student, ratio)
    verify_plan(student, plan)
    return DynamicTeacher(student, plan, noise=noise, scale=scale, branches=kinds)


class DynamicTeacher(nn.Module):
    """A student's wide, multi-branch copy, with the student inside it.

    The only parameters are those of ``wide`` and ``branches``; the student's are computed from them whenever it runs.
    ``student`` owns nothing but its own buffers, such as BatchNorm statistics. Build it with :func:`expand`.

    Attributes:
        wide: the student's class with wider tensors. Under ``scale='student'`` its weights are stored times the
            divisor of the plan, and divided when it runs.
        branches: kernels of ``wide`` that have branches, under the names of their convolutions, which have none of
            their own. They merge, in the convention of ``wide``, into the teacher's kernel, which both models read.
        student: the student's class without parameters.
        plan: how one maps to the other.
        scale: ``'student'`` or ``'teacher'``, see :func:`expand`.
        branch_kinds: the kinds of branch that every convolution with a square odd kernel larger than 1 has.
    """

    def __init__(
            self,
            student: nn.Module,
            plan: ExpansionPlan,
            noise: float = 0.0,
            scale: str = 'student',
            branches: Sequence[str] = ('kxk',),
    ) -> None:
        super().__init__()
        self.plan = plan
        self.scale = scale
        self.branch_kinds = tuple(branches)
        self._divisors = {name: tensor_map.divisor for name, tensor_map in plan.tensors.items() if tensor_map.divisor > 1}
        self._tied, self._requires_grad = _parameter_layout(student)
        self.branches = nn.Module()  # before the wide model, whose head is the last of all parameters, as of any model
        self.wide = wide_copy(student, plan, self._stored)
        self.student = parameterless_copy(student)
        if noise:
            self._add_noise(noise)
        self._branched: Dict[str, BranchedKernel] = {}  # by name of the weight
        if len(self.branch_kinds) > 1:
            self._add_branches()
        is_student = scale == 'student'
        self._teacher_scales = {name: 1 / divisor for name, divisor in self._divisors.items()} if is_student else {}
        self._shared = SharedTensors(
            {name: plan.tensors[name] for name in self._tied if name in plan.tensors and name not in self._branched},
            self._teacher_scales,
            {} if is_student else self._divisors)
        self.train(student.training)

    # -- the two models ---------------------------------------------------------------------------------------------

    def forward(
            self,
            x: torch.Tensor,
            joint: bool = False,
            teacher_loss: Optional[TeacherLoss] = None,
    ) -> Union[torch.Tensor, Tuple[Any, ...]]:
        """Dynamic teacher's logits, or with ``joint`` those of student and teacher.

        Args:
            x: images, shape (B, in_chans, H, W).
            joint: whether to run the student too; a flag, so that wrappers such as DDP see one forward.
            teacher_loss: turns the teacher's logits into named tensors, its scalar ``'loss'`` among them. Given, both
                run, and the teacher's backward pass before the student's forward pass, see
                :func:`timm_gpd.teacher.early_backward.backward_early`.

        Returns:
            Teacher logits, shape (B, num_classes); or student logits and teacher logits; or with ``teacher_loss``
            student logits, what it returned, detached, and a scalar 0 that adds its gradients to the student's loss.
        """
        if joint or teacher_loss is not None:
            return self._run_both(x, self.student, self.wide, '', teacher_loss)
        return call_with_parameters(self.wide, self._parameters_of_both(_memory_format(x))[0], x)

    def joint(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Student and dynamic teacher on one batch, from one shared set of parameters.

        Args:
            x: images, shape (B, in_chans, H, W).

        Returns:
            Student logits and dynamic teacher logits, each of shape (B, num_classes).
        """
        return self(x, joint=True)

    def joint_tapped(
            self,
            x: torch.Tensor,
            student_tap: nn.Module,
            teacher_tap: nn.Module,
            teacher_loss: Optional[TeacherLoss] = None,
            loss_parameters: Iterable[nn.Parameter] = (),
    ) -> Tuple[Any, ...]:
        """What :meth:`forward` runs jointly, each model through a module that holds it as ``model`` and is not its own.

        Args:
            x: images, shape (B, in_chans, H, W).
            student_tap: holds ``student``.
            teacher_tap: holds ``wide``.
            teacher_loss: takes what ``teacher_tap`` returns.
            loss_parameters: those that ``teacher_loss`` computes with.

        Returns:
            What the two modules return; in the place of the second :meth:`forward`'s two things of ``teacher_loss``.
        """
        return self._run_both(x, student_tap, teacher_tap, 'model.', teacher_loss, loss_parameters)

    def _run_both(
            self,
            x: torch.Tensor,
            student_module: nn.Module,
            teacher_module: nn.Module,
            prefix: str,
            teacher_loss: Optional[TeacherLoss],
            loss_parameters: Iterable[nn.Parameter] = (),
    ) -> Tuple[Any, ...]:
        teacher, student = (
            {prefix + name: tensor for name, tensor in parameters.items()}
            for parameters in self._parameters_of_both(_memory_format(x)))
        if teacher_loss is None:
            teacher_output = call_with_parameters(teacher_module, teacher, x)
            return call_with_parameters(student_module, student, x), teacher_output
        result, gradients = backward_early(
            lambda parameters: teacher_loss(call_with_parameters(teacher_module, parameters, x)),
            teacher, loss_parameters)
        student_output = call_with_parameters(student_module, student, x)
        return student_output, result, gradients()

    def forward_student(self, x: torch.Tensor) -> torch.Tensor:
        """Student's logits, shape (B, num_classes), for images of shape (B, in_chans, H, W)."""
        return call_with_parameters(self.student, self._parameters_of_both(_memory_format(x))[1], x)

    # -- parameters -------------------------------------------------------------------------------------------------

    def _stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is stored for a tensor of the student: shape of the teacher's, in the convention of ``scale``."""
        tensor_map = self.plan.tensors.get(name)
        if tensor_map is None:
            return tensor.clone()
        divides = self.scale == 'teacher' and tensor_map.divisor > 1
        return tensor_map.replicate(tensor / tensor_map.divisor if divides else tensor)

    def _parameters_of_both(
            self,
            memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
        """What teacher and student run on, from kernels that are merged once (Sec. 3.3). Differentiable.

        Args:
            memory_format: of merged kernels.
        """
        teacher, student = self._shared(dict(self.wide.named_parameters()))
        for name, branched in self._branched.items():
            teacher[name], student[name] = branched(
                self._teacher_scales.get(name, 1.0), self.plan.tensors.get(name), memory_format)
        teacher, student = (
            {alias: tensors[name] for name, aliases in self._tied.items() for alias in aliases}
            for tensors in (teacher, student))
        return teacher, student

    def teacher_parameters(self) -> Dict[str, torch.Tensor]:
        """What the teacher runs on, branches merged, by the student's parameter names. Differentiable."""
        return self._parameters_of_both()[0]

    def student_parameters(self) -> Dict[str, torch.Tensor]:
        """The student's parameters, computed from the stored ones: merged, then sliced. Differentiable (Sec. 3.3)."""
        return self._parameters_of_both()[1]

    @torch.no_grad()
    def load_student(self, state_dict: Dict[str, torch.Tensor], strict: bool = True):
        """Starts again from a student's weights: the teacher becomes exactly that student's function.

        They become the kernels that branches stand beside, and the branches' scales start again; what else the
        branches have learned is kept.

        Args:
            state_dict: a plain student's ``state_dict``.
            strict: whether all keys must match.

        Returns:
            What ``load_state_dict`` of a student returns: missing and unexpected keys.
        """
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
        """
        return self._fill_slots(copy.deepcopy(self.student), self.student_parameters())

    @torch.no_grad()
    def extract_teacher(self) -> nn.Module:
        """The dynamic teacher as an ordinary model, branches merged: what to run it often on fixed parameters.

        Returns:
            A new model of the student's class, in this module's mode, that shares no memory with it.
        """
        parameters = self.teacher_parameters()
        teacher = copy_model(self.wide, lambda name, tensor: parameters.get(name, tensor).detach().clone())
        return self._fill_slots(teacher, {name: parameters[name] for name in self._branched})

    def _fill_slots(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """Puts copies of tensors into a model as its parameters, tied as the student's are."""
        owners = dict(model.named_modules())
        for name, aliases in self._tied.items():
            if name not in tensors:
                continue
            parameter = nn.Parameter(
                tensors[name].detach().clone(memory_format=torch.contiguous_format), self._requires_grad[name])
            for alias in aliases:
                owner, _, key = alias.rpartition('.')
                owners[owner]._parameters[key] = parameter
        return model

    @torch.no_grad()
    def _add_noise(self, noise: float) -> None:
        for name, parameter in self.wide.named_parameters():
            if name in self._divisors:
                parameter += self.plan.tensors[name].noise_like(parameter, noise * parameter.std().item())

    def _add_branches(self) -> None:
        for name, module in self.wide.named_modules():
            weight = f'{name}.weight' if name else 'weight'
            if not (is_branchable(module) and self._requires_grad.get(weight)):
                continue
            outputs, _, size, _ = module.weight.shape
            tensor_map = self.plan.tensors.get(weight)
            axes = {} if tensor_map is None else dict(tensor_map.axes)
            if 0 in axes:
                # Replicas share the student's channel's pattern, or its slice would hold only every r-th frequency.
                prior = axes[0].replicate(cosine_prior(axes[0].size, size), 0)
            else:
                prior = cosine_prior(outputs, size)
            # Other weights than the prior are drawn for every replica, which tells replicas apart as scales move.
            # Their size is that of a student's, divided by the divisor as inverse reparameterization does.
            divisor = self._divisors.get(weight, 1)
            gain = divisor ** (0.5 if self.scale == 'student' else -0.5)
            branched = BranchedKernel(module.weight, module.groups, self.branch_kinds, prior, gain)
            _add_submodule(self.branches, name, branched)
            self._branched[weight] = branched
            module._parameters['weight'] = None

    # -- what timm's optimizer factory asks a model -----------------------------------------------------------------

    def no_weight_decay(self) -> set:
        """Names of parameters that the student's class exempts from weight decay."""
        exempt = self.wide.no_weight_decay() if hasattr(self.wide, 'no_weight_decay') else set()
        return {f'wide.{name}' for name in exempt}

    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """The student's layer groups, for layer-wise learning rate decay."""
        def prefixed(pattern):
            if isinstance(pattern, str):  # matched from the start of a name, every alternative of it
                return r'^(?:wide|branches)\.(?:' + re.sub(r'(^|[|(])\^', r'\1', pattern) + ')'
            return [(prefixed(p[0]), *p[1:]) if isinstance(p, tuple) else prefixed(p) for p in pattern]

        return {group: prefixed(pattern) for group, pattern in self.wide.group_matcher(coarse=coarse).items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass, in both models."""
        self.wide.set_grad_checkpointing(enable)
        self.student.set_grad_checkpointing(enable)

    def extra_repr(self) -> str:
        return f'ratio={self.plan.ratio}, scale={self.scale}, branches={self.branch_kinds}'


class StudentView(nn.Module):
    """The student inside a dynamic teacher, as a model of its own that is always up to date.

    ``forward`` gives the student's logits, ``state_dict`` a plain student's, and ``load_state_dict`` expands one into
    the dynamic teacher. It owns nothing.
    """

    def __init__(self, dynamic_teacher: DynamicTeacher) -> None:
        super().__init__()
        object.__setattr__(self, 'dynamic_teacher', dynamic_teacher)  # a reference, not a submodule
        self.training = dynamic_teacher.student.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Student's logits, shape (B, num_classes)."""
        return self.dynamic_teacher.forward_student(x)

    def train(self, mode: bool = True) -> 'StudentView':
        self.dynamic_teacher.student.train(mode)
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Dict[str, torch.Tensor]:
        """A plain student's ``state_dict``."""
        return self.dynamic_teacher.extract_student().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Dict[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """Expands a plain student's ``state_dict`` into the dynamic teacher."""
        return self.dynamic_teacher.load_student(state_dict, strict=strict)


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    """What convolutions of these images take kernels in without reordering them."""
    is_channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


def _named_tensors(model: nn.Module) -> List[Tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _add_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    """Adds a module under a dotted name, with empty modules on the way."""
    *path, key = name.split('.')
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    root.add_module(key, module)


def _parameter_layout(model: nn.Module) -> Tuple[Dict[str, List[str]], Dict[str, bool]]:
    """All names of every parameter, and whether it is trained, by its first name."""
    first: Dict[int, str] = {}
    tied: Dict[str, List[str]] = {}
    requires_grad: Dict[str, bool] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(first.setdefault(id(parameter), name), []).append(name)
        requires_grad.setdefault(first[id(parameter)], parameter.requires_grad)
    return tied, requires_grad
