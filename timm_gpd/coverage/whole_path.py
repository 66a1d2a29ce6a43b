"""What a user does with a student, from its expansion to the checkpoint that is resumed, with every value checked."""

import copy
import io
import pickle
from typing import Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from ..expansion.verify import InFloat64, agreement, disable_randomness_, reference_model
from ..plan import ExpansionPlan
from ..task import GapPreservingTask
from ..teacher import DynamicTeacher
from ..teacher.rehearsal import gradient_pairs, gradients_of

__all__ = ['CHECKS', 'PathError', 'WholePath']

CHECKS = ('gradient', 'steps', 'extraction', 'state', 'copies', 'noise')
IMAGES = 2
SMALL_IMAGE = 32  # pixels; half the height of the smallest that a plan is compared with
STEPS = 3
NOISE = 0.1
ROUNDING = 1e-9  # gradients below it are rounding: a shift in front of batch norm has none


class PathError(AssertionError):
    """Something on the path is not what it should be."""


class WholePath:
    """One student's path, in float64, with randomised weights, running statistics from data and no stochastic layer.

    Its methods, named in ``CHECKS``, go the path in that order. Each raises a :class:`PathError` that says what is
    wrong, or whatever error stops it.

    What is compared is equal bit for bit: on a CPU, without branches and with what is stored at the student's scale,
    the same kernels run on the same numbers. Elsewhere there is rounding: at the teacher's scale a divisor that is no
    power of two is multiplied with, branches are summed, a compiler and a GPU choose kernels that add up in another
    order. So does noise in the wide model, whose function is kept up to that.

    Args:
        create: creates the student, the same architecture every time.
        ratio: expansion ratio.

    Attributes:
        student: what the task was made from; it stays as it was.
        task: the task, which :meth:`steps` trains.
    """

    def __init__(self, create: Callable[[], nn.Module], ratio: int = 2) -> None:
        self.create, self.ratio = create, ratio
        self.student = disable_randomness_(create())
        self.task = GapPreservingTask(self.student, ratio=ratio, noise=0.0, verbose=False)
        self.plan = self.teacher.plan
        self.reference, self.x = _reference(self.student, self.plan)
        self.task.double()
        self.teacher.load_student(self.reference.state_dict())

    @property
    def teacher(self) -> DynamicTeacher:
        return self.task.get_dynamic_teacher()

    def gradient(self) -> None:
        """The student's loss has the plain student's gradient in replica 0; statistics move as the plain student's."""
        plain = copy.deepcopy(self.reference).train()
        twin = copy.deepcopy(self.teacher).train()
        with InFloat64():
            expected = gradients_of(plain(self.x), dict(plain.named_parameters()))
            pairs = list(gradient_pairs(twin, twin.joint(self.x).student, expected))
        _expect(any(gradient is not None for gradient in expected.values()), 'the plain student has no gradient')
        _expect([name for name, _, _ in pairs] == list(expected), 'tensors have other names')
        for name, of_stored, gradient in pairs:
            _expect(
                _is_zero(of_stored) if gradient is None else of_stored is not None and torch.equal(of_stored, gradient),
                f"the gradient of {name} is not the plain student's",
            )
        _expect_equal(dict(twin.student.named_buffers()), dict(plain.named_buffers()))

    def steps(self) -> None:
        """Joint steps: losses are finite, and every tensor that has a gradient is trained."""
        before = copy.deepcopy(self.teacher.state_dict())
        self.task.train()
        optimizer = torch.optim.SGD(self.task.get_trainable_module().parameters(), lr=0.01)
        target = torch.arange(len(self.x))
        for _ in range(STEPS):
            optimizer.zero_grad()
            with InFloat64():
                loss = self.task(self.x, target)['loss']
            loss.backward()
            _expect(bool(loss.isfinite()), f'a step has the loss {loss.item()}')
            nn.utils.clip_grad_norm_(self.task.get_clip_parameters(), 1.0)
            optimizer.step()
        self.task.eval()
        for name, parameter in self.teacher.named_parameters():
            _expect(bool(parameter.isfinite().all()), f'{name} is not finite after some steps')
            is_idle = parameter.grad is None or parameter.grad.abs().max() < ROUNDING
            _expect(is_idle or not torch.equal(parameter, before[name]), f'{name} has not been trained')
        optimizer.zero_grad()  # the memory of a teacher

    def extraction(self) -> None:
        """Extracted models, and a new timm model that loads the student, have the functions of those inside."""
        student, teacher = self._logits(self.teacher)
        extracted = self.task.get_student()
        loaded = self.create().double().eval()
        loaded.load_state_dict(extracted.state_dict(), strict=True)
        for what, plain, logits in (
            ('the extracted student', extracted, student),
            ("a new model with the student's state", loaded, student),
            ('the extracted teacher', self.teacher.extract_teacher(), teacher),
        ):
            with InFloat64():
                _expect(torch.equal(plain(self.x), logits), f'{what} has other logits')

    def state(self) -> None:
        """A checkpoint that went through a file makes a new task the same."""
        other = GapPreservingTask(self.create(), ratio=self.ratio, noise=0.0, verbose=False).double().eval()
        with io.BytesIO() as file:
            torch.save(self.task.get_checkpoint_state(), file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other.load_checkpoint_state(state['state_dict'], state['task_state'])
        _expect_equal(other.get_dynamic_teacher().state_dict(), self.teacher.state_dict())
        self._expect_same_functions(other.get_dynamic_teacher(), 'the task that was resumed')

    def copies(self) -> None:
        """Deep copies and pickled ones are the same functions, on memory of their own."""
        memory = {tensor.data_ptr() for tensor in self.teacher.state_dict().values() if tensor.numel()}
        for what, copied in (
            ('the deep copy', lambda: copy.deepcopy(self.task).get_dynamic_teacher()),
            ('the pickled copy', lambda: pickle.loads(pickle.dumps(self.teacher))),
        ):
            other = copied()
            self._expect_same_functions(other, what)
            _expect(
                all(tensor.data_ptr() not in memory for tensor in other.state_dict().values()), f'{what} shares memory'
            )

    def noise(self) -> int:
        """Noise tells replicas apart wherever such noise exists, and changes neither function nor student.

        Returns:
            The number of tensors whose replicas differ.
        """
        noisy = DynamicTeacher(self.reference, self.plan, noise=NOISE).eval()
        with torch.no_grad():
            agreed = agreement(noisy, self.reference, self.x)
        _expect(agreed.is_exact, f'with noise the teacher differs from the student by {agreed.error:.1e}')
        _expect_equal(noisy.extract_student().state_dict(), self.reference.state_dict())
        told_apart: List[str] = []
        for name, parameter in self.reference.named_parameters():
            tensor_map = self.plan.tensors.get(name)
            differs = tensor_map is not None and not torch.equal(
                tensor_map.replicate(parameter), noisy.wide.get_parameter(name)
            )
            # The replicas of an input must cancel out, and one of them is the student's where outputs have no replicas.
            exists = (
                tensor_map is not None
                and tensor_map.divisor > 1
                and (tensor_map.divisor > 2 or len(tensor_map.axes) > 1)
            )
            _expect(differs == exists, f'noise {"does not tell" if exists else "tells"} replicas of {name} apart')
            told_apart += [name] * differs
        return len(told_apart)

    def _logits(self, teacher: DynamicTeacher) -> List[torch.Tensor]:
        """Of student and teacher, with gradients: torch chooses kernels by whether weights want theirs."""
        with InFloat64():
            return [logits.detach() for logits in teacher.joint(self.x)]

    def _expect_same_functions(self, other: DynamicTeacher, what: str) -> None:
        pairs = zip(self._logits(other), self._logits(self.teacher))
        _expect(all(torch.equal(*pair) for pair in pairs), f'{what} has other logits')


def _reference(student: nn.Module, plan: ExpansionPlan) -> Tuple[nn.Module, torch.Tensor]:
    """What :func:`reference_model` returns, with images that are smaller than its own where the student takes them."""
    images = torch.randn(
        IMAGES, plan.input_shape[0], SMALL_IMAGE, SMALL_IMAGE, generator=torch.Generator().manual_seed(0)
    )
    try:
        return reference_model(student, plan, images.double())
    except Exception:
        return reference_model(student, plan)


def _is_zero(gradient: Optional[torch.Tensor]) -> bool:
    return gradient is None or not gradient.any()


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise PathError(message)


def _expect_equal(actual: Dict[str, torch.Tensor], expected: Dict[str, torch.Tensor]) -> None:
    _expect(list(actual) == list(expected), 'tensors have other names')
    for name, tensor in expected.items():
        _expect(torch.equal(actual[name], tensor), f'{name} differs')
