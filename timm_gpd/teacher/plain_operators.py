"""When the fast operators of this package give way to plain ones.

:class:`~timm_gpd.teacher.shared_tensors.SharedTensors` and the merge of branches have gradients of their own, written
for first derivatives in reverse mode, with operators of their own. Everything else that autograd can do, and compilers
that lose such operators, are left to plain operators, which are slower and need more memory.
"""

import torch

from ..private_torch import compiles_writing_operators, has_active_transforms, has_forward_mode

__all__ = ['has_second_derivatives', 'needs_plain_operators']


def needs_plain_operators() -> bool:
    """Whether a forward pass runs in forward mode, in a transform of ``torch.func`` or under an old compiler."""
    if torch.compiler.is_compiling():
        return not compiles_writing_operators()
    return has_active_transforms() or has_forward_mode()


def has_second_derivatives() -> bool:
    """Whether a backward pass is itself to be differentiated: within it, as with ``create_graph=True``."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled()
