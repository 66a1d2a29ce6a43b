"""Running a module on parameters that it does not own."""
import contextlib
import threading
from typing import Any, Dict, Iterator, Mapping

import torch
import torch.nn as nn
from torch.func import functional_call

__all__ = ['call_with_parameters', 'memory_format_of']

_threads: Dict[int, int] = {}  # which thread a module runs in, by its id, while it runs


def call_with_parameters(model: nn.Module, parameters: Mapping[str, torch.Tensor], x: torch.Tensor) -> Any:
    """The model's output for ``x`` with other tensors in the place of its parameters.

    Unlike :func:`torch.func.functional_call` alone, it allows gradient checkpointing in the model: what is recomputed
    in the backward pass sees these tensors again.

    Args:
        model: any module; its own parameters stay as they are.
        parameters: tensors by parameter name, tied ones under every name.
        x: images, shape (B, in_chans, H, W).

    Returns:
        What the model returns for ``x``.

    Raises:
        RuntimeError: if another thread runs the model.
    """
    recomputes = not torch.compiler.is_compiling() and torch.is_grad_enabled() and any(
        getattr(module, 'grad_checkpointing', False) for module in model.modules())
    if recomputes:
        return _twin(model, parameters)(x)
    with _alone_in(model):
        return functional_call(model, parameters, (x,), tie_weights=False)


def _twin(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> nn.Module:
    """A model that shares everything with another but its parameters. The graph keeps it for what is recomputed."""
    twins: Dict[int, nn.Module] = {}

    def share(module: nn.Module) -> nn.Module:
        if id(module) not in twins:
            twin = twins[id(module)] = object.__new__(type(module))
            twin.__dict__ = {**module.__dict__, '_parameters': dict(module._parameters), '_modules': {}}
            twin._modules.update({
                key: child if child is None else share(child) for key, child in module._modules.items()})
        return twins[id(module)]

    share(model)
    owners = {name: twins[id(module)] for name, module in model.named_modules(remove_duplicate=False)}
    for name, tensor in parameters.items():
        path, _, key = name.rpartition('.')
        owners[path]._parameters[key] = tensor
    return owners['']


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
