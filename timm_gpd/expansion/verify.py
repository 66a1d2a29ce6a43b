"""The numeric check: no dynamic teacher is handed out that is not exactly its student."""

import contextlib
import math
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModelError
from ..plan import ExpansionPlan
from ..private_torch import BatchNorm
from .copies import first_input, plain_copy, wide_copy
from .images import run_on_small_images

__all__ = [
    'Agreement',
    'InFloat64',
    'agreement',
    'compare',
    'disable_randomness_',
    'outputs_of',
    'randomize_',
    'read_back_error',
    'reference_model',
    'relative_error',
    'verify_plan',
]

MODES = ('evaluation', 'training')
ROUNDING = 1e-12  # relative; what float64 is expected to lose in a deep model
METHOD = 1e-9  # relative; errors of method are far above it, so nothing above is called rounding
MARGIN = 10  # times a student's own response to rounding is still rounding
MOVES = 8  # tries to see that response: in one alone much may cancel out
BATCH = 4  # images whose statistics batch norm shares
RANDOM_RATES = ('p', 'prob', 'drop_prob', 'drop_rate', 'attn_drop_p', 'patch_drop_rate', 'dropout')
RANDOM_SWITCHES = ('mix_token', 'aug_active')


class Agreement(NamedTuple):
    """How well a teacher agrees with its student.

    Attributes:
        error: max |T(x) - S(x)| / max |S(x)|, the largest of all outputs.
        sensitivity: what rounding does to the student itself: the same for its output after every parameter and pixel
            moved by 2^-52, relative, up or down at random; the largest of a few tries, as many as the error needs.
            Batch statistics of a few samples can make it exceed 1e-12. 0 where not measured, infinite where a student
            draws random numbers of its own in training mode, and nothing can be told.
    """

    error: float
    sensitivity: float

    @property
    def is_exact(self) -> bool:
        """Whether the error is rounding: at most 1e-12, or ten times the student's own response, never above 1e-9.

        Also of a student that is random, as nothing speaks against it.
        """
        return math.isinf(self.sensitivity) or self.error <= min(METHOD, max(ROUNDING, MARGIN * self.sensitivity))


class InFloat64(TorchFunctionMode):
    """Makes casts to float32 inside a forward casts to float64: the rounding of the former would hide errors."""

    def __torch_function__(self, func: Callable, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(_in_float64, args), **{name: _in_float64(value) for name, value in (kwargs or {}).items()})


def _in_float64(argument: Any) -> Any:
    """float64 instead of float32; a dtype is an argument itself, not a part of one."""
    return torch.float64 if argument is torch.float32 else argument


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Adds noise to every parameter and running statistic, in place.

    Zero-initialised norms, layer scales of 1e-6 and biases of 0 would hide errors of the layers that they switch off.

    Args:
        model: a model of any kind; integer buffers stay.
        seed: seed of the noise.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        fan_in = fan_in if fan_in > 1 else 25  # a scale or a shift of each output
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise.to(parameter) / fan_in**0.5)
    for name, buffer in model.named_buffers():
        noise = torch.rand(buffer.shape, generator=generator)
        if name.endswith('running_mean'):
            buffer += (noise - 0.5).to(buffer)
        elif name.endswith('running_var'):
            buffer += noise.to(buffer)
    return model


@contextlib.contextmanager
def _statistics_from_data(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Within it, whatever the model runs on sets the running statistics on the way, up to random factors.

    Statistics that are random alone let the activations of a deep model grow or vanish layer by layer, and with them
    what rounding does to its logits: to 1e-7 in EfficientNet-B4.
    """
    generator = torch.Generator().manual_seed(seed)

    def set_statistics(norm: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        x = first_input(args, kwargs).transpose(0, 1).flatten(1)
        var, mean = torch.var_mean(x, dim=1, correction=0)
        var = var + var.mean()  # a channel may be the same everywhere
        shift, stretch = torch.rand(2, len(var), generator=generator, dtype=var.dtype)
        norm.running_mean.copy_(mean + (shift - 0.5) * var.sqrt())
        norm.running_var.copy_(var * (stretch + 0.5))

    hooks = [
        module.register_forward_pre_hook(set_statistics, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.running_var is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def disable_randomness_(model: nn.Module) -> nn.Module:
    """Sets every rate of dropout and the like to 0, in place: training mode becomes a function.

    Args:
        model: a model of any kind.

    Returns:
        The same model.
    """
    for module in model.modules():
        for name in RANDOM_RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        for name in RANDOM_SWITCHES:
            if hasattr(module, name):
                setattr(module, name, False)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """How far a tensor is from another.

    Args:
        actual: a tensor.
        expected: a tensor of the same shape.

    Returns:
        max |actual - expected| / max |expected|; infinite where that is not a number.
    """
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float('inf')


@torch.no_grad()
def compare(
    student: nn.Module,
    plan: ExpansionPlan,
    modes: Sequence[str] = MODES,
    images: Optional[torch.Tensor] = None,
) -> Dict[str, Agreement]:
    """Runs student and planned teacher on images, in float64 with randomised weights and no stochastic layer.

    Args:
        student: the model that was planned for. It is not modified.
        plan: its plan.
        modes: ``'evaluation'``, ``'training'`` (batch statistics and auxiliary outputs) or both.
        images: shape (B, in_chans, H, W) (default: random ones, as few and small as tell an error).

    Returns:
        For each mode the error, and the student's sensitivity to rounding where the error exceeds 1e-12.

    Raises:
        UnsupportedModelError: if the planned teacher does not run.
    """
    reference, x = reference_model(student, plan, images)
    teacher = wide_copy(reference, plan, plan.expand_tensor)

    def run_teacher(x: torch.Tensor) -> Any:
        try:
            return teacher(x)
        except Exception as failure:
            raise UnsupportedModelError(
                f'{type(student).__name__} cannot be widened: the planned teacher does not run '
                f'({type(failure).__name__}: {str(failure).splitlines()[0]}); a rule for one of its modules is missing'
            )

    agreements = {}
    for mode in modes:
        reference.train(mode == 'training'), teacher.train(mode == 'training')
        agreements[mode] = agreement(run_teacher, reference, x)
    return agreements


@torch.no_grad()
def reference_model(
    student: nn.Module,
    plan: ExpansionPlan,
    images: Optional[torch.Tensor] = None,
) -> Tuple[nn.Module, torch.Tensor]:
    """What a check runs: the student in float64 on the CPU, randomised, in evaluation mode, without stochastic layers.

    Args:
        student: the model that was planned for. It is not modified.
        plan: its plan.
        images: shape (B, in_chans, H, W) (default: random ones, as few and small as tell an error).

    Returns:
        A copy of the student, and the images that its running statistics were set from.
    """
    reference = disable_randomness_(randomize_(plain_copy(student).to('cpu', torch.float64))).eval()
    return reference, _set_statistics_(reference, images, plan.input_shape)


@torch.no_grad()
def agreement(run: Callable[[torch.Tensor], Any], reference: nn.Module, x: torch.Tensor) -> Agreement:
    """How well a function agrees with a model.

    Args:
        run: turns images into logits, shape (B, num_classes), or several tensors of them.
        reference: the model, in float64 and in the mode to compare in.
        x: images, shape (B, in_chans, H, W).

    Returns:
        The error, and the model's sensitivity to rounding where the error exceeds 1e-12.
    """
    given = x.clone()
    expected = _run(reference, x)
    if not torch.equal(x, given):
        raise UnsupportedModelError(
            f'{type(reference).__name__} changes the images that it is given, in place, and two models see them: let '
            'its first operation make a new tensor'
        )
    actual = _run(run, x)
    for output, wanted in zip(outputs_of(actual), outputs_of(expected)):
        if output.shape != wanted.shape:
            raise UnsupportedModelError(
                f'{type(reference).__name__} has logits of shape {tuple(output.shape)} when it is wider, instead of '
                f'{tuple(wanted.shape)}: name the modules that give them, as in classifier="fc"'
            )
    error = _largest_error(actual, expected)
    if error > METHOD and reference.training and _largest_error(_run(reference, x), expected) > METHOD:
        return Agreement(error, math.inf)  # it draws random numbers
    agreed = Agreement(error, 0.0)
    for seed in range(MOVES):
        if agreed.is_exact or seed and error > METHOD:
            break
        agreed = Agreement(error, max(agreed.sensitivity, _sensitivity(reference, x, expected, seed)))
    return agreed


def verify_plan(student: nn.Module, plan: ExpansionPlan) -> float:
    """Checks that the planned teacher is the student's function, in evaluation mode and in training mode.

    A student that draws random numbers of its own in training mode is compared in evaluation mode alone.

    Args:
        student: the model that was planned for. It is not modified.
        plan: its plan.

    Returns:
        The relative error in evaluation mode, max |T(x) - S(x)| / max |S(x)|.

    Raises:
        UnsupportedModelError: if the error is more than rounding, or the planned teacher does not run.
    """
    agreements = compare(student, plan)
    for mode, agreement in agreements.items():
        if not agreement.is_exact:
            raise UnsupportedModelError(
                f'{type(student).__name__} cannot be widened exactly: the planned teacher differs from the student by '
                f'{agreement.error:.1e}, relative, in {mode} mode; a rule for one of its modules is missing or wrong'
            )
    return agreements['evaluation'].error


@torch.no_grad()
def read_back_error(student: nn.Module, plan: ExpansionPlan) -> float:
    """Expands every tensor of the student, and extracts it again.

    Args:
        student: the model that was planned for. It is not modified.
        plan: its plan.

    Returns:
        The largest relative error of a tensor: the rounding of its divisor, 0 where that is a power of two.
    """
    tensors = dict([*student.named_parameters(), *student.named_buffers()])
    back = plan.extract(plan.expand(tensors))
    return max(
        (
            0.0 if torch.equal(back[name], tensor) else relative_error(back[name], tensor)
            for name, tensor in tensors.items()
            if tensor.numel()
        ),
        default=0.0,
    )


def _run(model: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
    with InFloat64():
        return model(x)


def _set_statistics_(
    model: nn.Module,
    images: Optional[torch.Tensor],
    shape: Optional[Tuple[int, int, int]],
) -> torch.Tensor:
    """Sets running statistics from images: those given, or random ones as small as the model accepts. Returns them."""

    def run(x: torch.Tensor) -> torch.Tensor:
        with _statistics_from_data(model):
            _run(model, x)
        return x

    if images is not None:
        return run(images.to('cpu', torch.float64))
    return run_on_small_images(run, model, shape, BATCH)[0]


def _sensitivity(model: nn.Module, x: torch.Tensor, output: Any, seed: int) -> float:
    """Relative change of the output for images when they and the parameters move by 2^-52."""
    generator = torch.Generator().manual_seed(seed)
    moved, moved_x = plain_copy(model), x.clone()
    for tensor in (moved_x, *moved.parameters()):
        signs = torch.randint(0, 2, tensor.shape, generator=generator, dtype=tensor.dtype) * 2 - 1
        tensor *= 1 + signs * torch.finfo(tensor.dtype).eps
    return _largest_error(_run(moved, moved_x), output)


def _largest_error(actual: Any, expected: Any) -> float:
    return max(relative_error(a, e) for a, e in zip(outputs_of(actual), outputs_of(expected)))


def outputs_of(output: Any) -> List[torch.Tensor]:
    """The tensors that a model returned: some return more than one of logits in training mode.

    Raises:
        UnsupportedModelError: if it returned anything else.
    """
    if isinstance(output, torch.Tensor):
        return [output]
    if not isinstance(output, (tuple, list)):
        raise UnsupportedModelError(
            f'the student returns a {type(output).__name__}: its forward must return logits, shape (B, num_classes)'
        )
    return [tensor for item in output for tensor in outputs_of(item)]
