"""The numeric check: no dynamic teacher is handed out that is not exactly its student."""
import copy
from typing import Tuple

import torch
import torch.nn as nn

from .errors import UnsupportedModelError
from .inputs import accepted_input_shape, input_shape
from .model_copy import wide_copy
from .plan import ExpansionPlan

__all__ = ['randomize_', 'relative_error', 'verify_plan']

TOLERANCE = 1e-9  # relative, in float64; errors of method start near 1e-6, rounding stays below 1e-12
SMALL_IMAGE = 64  # pixels: enough for a check wherever a model accepts it


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
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter += noise.to(parameter.device) / max(fan_in, 1) ** 0.5
    for name, buffer in model.named_buffers():
        noise = torch.rand(buffer.shape, generator=generator)
        if name.endswith('running_mean'):
            buffer += (noise - 0.5).to(buffer)
        elif name.endswith('running_var'):
            buffer += noise.to(buffer)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| / max |expected|, as a float; infinite where a value is not finite."""
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float('inf')


@torch.no_grad()
def verify_plan(student: nn.Module, plan: ExpansionPlan) -> float:
    """Checks on random images, in float64 with randomised weights, that the planned teacher is the student's function.

    Args:
        student: the model that was planned for. It is not modified.
        plan: its plan.

    Returns:
        The relative error, max |T(x) - S(x)| / max |S(x)|.

    Raises:
        UnsupportedModelError: if the error exceeds 1e-9, or the planned teacher does not run.
    """
    reference = randomize_(copy.deepcopy(student).to('cpu', torch.float64)).eval()
    teacher = wide_copy(reference, plan, plan.expand_tensor)
    x, expected = _sample(reference)
    try:
        error = relative_error(teacher(x), expected)
    except Exception as failure:
        raise UnsupportedModelError(
            f'{type(student).__name__} cannot be widened: the planned teacher does not run '
            f'({type(failure).__name__}: {str(failure).splitlines()[0]}); a rule for one of its modules is missing')
    if error > TOLERANCE:
        raise UnsupportedModelError(
            f'{type(student).__name__} cannot be widened exactly: the planned teacher differs from the student by '
            f'{error:.1e}, relative; a rule for one of its modules is missing or wrong')
    return error


def _sample(model: nn.Module) -> Tuple[torch.Tensor, torch.Tensor]:
    """A random image that the model accepts, as small as that allows, and its logits."""
    channels, height, width = input_shape(model)
    for size in ((min(SMALL_IMAGE, height), min(SMALL_IMAGE, width)), (height, width), None):
        size = size or accepted_input_shape(model)[1:]
        x = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        try:
            return x, model(x)
        except Exception as failure:
            error = failure
    raise error
