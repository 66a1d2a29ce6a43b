"""Networks of random weights, and what they cost."""

import math
import time
from dataclasses import dataclass
from statistics import median
from typing import Iterable, Iterator, Tuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from ..distillers import evaluation_mode
from ..teacher import DynamicTeacher
from ..teacher.branches import BranchedKernel

__all__ = ['Cost', 'measure_cost', 'random_networks']

TIMED_PASSES = 5


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: how many are trained and stored; of a dynamic teacher with all branches.
        macs: multiply-accumulates of convolutions, matrix products and attention for one image.
        milliseconds: for one image of a batch, forward.
    """

    parameters: int
    macs: int
    milliseconds: float


def random_networks(model: nn.Module, seeds: Iterable[int]) -> Iterator[nn.Module]:
    """One network after another, of the model's shape and fresh weights.

    Weights of convolutions and linear layers are normal, their deviation one over the root of what they sum over:
    behind a norm that is the unit normal of the published code. Biases are 0, and all that multiplies channels is 1,
    also where a model starts it at 0, as the last norm of a residual block or LayerScale: or no block would be seen.
    Tables and tokens stay as they are. A dynamic teacher's branches have equal shares of their kernel's variance.

    Args:
        model: timm model, or a dynamic teacher, which is run merged. Its weights are overwritten.
        seeds: one for each network.

    Yields:
        The model itself, or the dynamic teacher as a plain model. Its weights are others once the next is asked for.
    """
    for seed in seeds:
        _draw_(model, torch.Generator().manual_seed(seed))
        yield model.extract_teacher() if isinstance(model, DynamicTeacher) else model


def measure_cost(model: nn.Module, network: nn.Module, images: torch.Tensor) -> Cost:
    """What a network costs where it is.

    Args:
        model: what is stored.
        network: what is run; the same, but of a dynamic teacher.
        images: a batch, shape (B, in_chans, H, W).

    Returns:
        Its cost; the time is the median of a few passes.
    """
    with torch.no_grad(), evaluation_mode(network):
        with FlopCounterMode(display=False) as counter:
            network(images[:1])
        times = [_time(network, images) for _ in range(1 + TIMED_PASSES)][1:]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, counter.get_total_flops() // 2, 1000 * median(times) / len(images))


def _time(network: nn.Module, images: torch.Tensor) -> float:
    """Seconds of a pass."""
    start = time.perf_counter()
    network(images)[0].sum().item()  # waits for the device
    return time.perf_counter() - start


@torch.no_grad()
def _draw_(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, BranchedKernel):
            _draw_branches_(module, generator)
            continue
        is_layer = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
        for name, parameter in module.named_parameters(recurse=False):
            if is_layer and name == 'weight':
                _draw_normal_(parameter, parameter[0].numel(), generator)
            elif name.endswith('bias') and parameter.dim() == 1:
                parameter.zero_()
            elif parameter.dim() <= 1:
                parameter.fill_(1)


def _draw_branches_(kernel: BranchedKernel, generator: torch.Generator) -> None:
    """Weights of every branch, and gammas that give each its share of the variance."""
    _, inputs, height, width = kernel.shape
    fan_in = inputs * height * width
    for name, parameter in kernel.named_parameters():
        if name != 'gamma':
            _draw_normal_(parameter, fan_in, generator)
    gamma = torch.zeros_like(kernel.gamma)
    for index in range(len(kernel.kinds)):
        kernel.gamma.zero_()
        kernel.gamma[index] = 1
        alone = kernel()[0].square().mean().sqrt()
        gamma[index] = 1 / (alone * math.sqrt(fan_in * len(kernel.kinds)))
    kernel.gamma.copy_(gamma)


def _draw_normal_(parameter: torch.Tensor, fan_in: int, generator: torch.Generator) -> None:
    shape: Tuple[int, ...] = tuple(parameter.shape)
    parameter.copy_(torch.randn(shape, generator=generator) / math.sqrt(fan_in))
