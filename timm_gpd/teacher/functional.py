"""Running a module on parameters that it does not own."""
from typing import Any, Mapping

import torch
import torch.nn as nn
from torch.func import functional_call

from ..private_torch import run_after_backward

__all__ = ['call_with_parameters']


def call_with_parameters(model: nn.Module, parameters: Mapping[str, torch.Tensor], x: torch.Tensor) -> Any:
    """The model's output for ``x`` with other tensors in the place of its parameters, tied ones under every name.

    Unlike :func:`torch.func.functional_call` alone, it allows gradient checkpointing in the model: what is recomputed
    in the backward pass sees these tensors again.

    Raises:
        RuntimeError: in a backward pass through two such calls of one model that uses gradient checkpointing.
    """
    output = functional_call(model, parameters, (x,), tie_weights=False)
    recomputes = not torch.compiler.is_compiling() and torch.is_grad_enabled() and any(
        getattr(module, 'grad_checkpointing', False) for module in model.modules())
    # Of several outputs the first, the logits, is computed last, so its hook runs before anything is recomputed.
    last = output if isinstance(output, torch.Tensor) else output[0]
    if recomputes and last.requires_grad:
        last.register_hook(lambda grad: _lend_until_backward_ends(model, parameters))
    return output


def _lend_until_backward_ends(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> None:
    owned = {}
    for name, tensor in parameters.items():
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
