"""Running a module on parameters that it does not own."""
import contextlib
import threading
from typing import Any, Dict, Iterator, Mapping

import torch
import torch.nn as nn
from torch.func import functional_call

from ..private_torch import run_after_backward

__all__ = ['call_with_parameters', 'memory_format_of']

_threads: Dict[int, int] = {}  # which thread a module runs in, by its id, while it runs


def call_with_parameters(model: nn.Module, parameters: Mapping[str, torch.Tensor], x: torch.Tensor) -> Any:
    """The model's output for ``x`` with other tensors in the place of its parameters.

    Unlike :func:`torch.func.functional_call` alone, it allows gradient checkpointing in the model: what is recomputed
    in the backward pass sees these tensors again.

    Args:
        model: any module; its own parameters are back in their places afterwards.
        parameters: tensors by parameter name, tied ones under every name.
        x: images, shape (B, in_chans, H, W).

    Returns:
        What the model returns for ``x``.

    Raises:
        RuntimeError: if another thread runs the model; and in a backward pass through two such calls of one model that
            uses gradient checkpointing.
    """
    with _alone_in(model):
        output = functional_call(model, parameters, (x,), tie_weights=False)
    recomputes = not torch.compiler.is_compiling() and torch.is_grad_enabled() and any(
        getattr(module, 'grad_checkpointing', False) for module in model.modules())
    # Of several outputs the first, the logits, is computed last, so its hook runs before anything is recomputed.
    last = output if isinstance(output, torch.Tensor) else output[0]
    if recomputes and last.requires_grad:
        last.register_hook(lambda grad: _lend_until_backward_ends(model, parameters))
    return output


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """What convolutions of images (B, in_chans, H, W) take kernels in without reordering them."""
    is_channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


@contextlib.contextmanager
def _claim(model: nn.Module) -> Iterator[None]:
    thread = threading.get_ident()
    if _threads.setdefault(id(model), thread) != thread:
        raise RuntimeError(f'{type(model).__name__} runs in another thread, and its parameters are lent to one call at '
                           'a time: give every thread a copy of its own (copy.deepcopy, or extract_student())')
    try:
        yield
    finally:
        _threads.pop(id(model), None)


def _alone_in(model: nn.Module) -> contextlib.AbstractContextManager:
    """Refuses a second thread: it would run on the first one's tensors. What is compiled cannot ask."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _claim(model)


def _lend_until_backward_ends(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> None:
    owned = {}
    for name in parameters:
        path, _, key = name.rpartition('.')
        slots = model.get_submodule(path)._parameters
        owned[name] = slots, key, slots[key]
    if any(isinstance(tensor, torch.Tensor) and not tensor.is_leaf for _, _, tensor in owned.values()):
        raise RuntimeError('gradient checkpointing needs a backward pass for every joint forward pass: '
                           'call backward() on each loss before the next batch')
    for name, (slots, key, _) in owned.items():
        slots[key] = parameters[name]

    def give_back() -> None:
        for slots, key, tensor in owned.values():
            slots[key] = tensor

    run_after_backward(give_back)
