"""How a student learns from its dynamic teacher."""

import inspect
from functools import partial
from typing import Callable, Dict

import torch
import torch.nn.functional as F

from .logits import dist_loss, dkd_loss, kd_loss, nkd_loss, ofa_loss, rld_loss, soft_target_cross_entropy, wttm_loss

__all__ = ['GPD_LOSSES', 'needs_target']


def _mse_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(student_logits, teacher_logits.detach())


def _l1_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    return F.l1_loss(student_logits, teacher_logits.detach())


# Under the names of ``--gpd-loss``: functions of student_logits and teacher_logits, some also of target, and of
# hyperparameters that have defaults.
GPD_LOSSES: Dict[str, Callable[..., torch.Tensor]] = {
    'sce': soft_target_cross_entropy,
    'ce': partial(soft_target_cross_entropy, smoothing=0.0),
    'kl': partial(kd_loss, temperature=1.0),
    'dkd': dkd_loss,
    'rld': rld_loss,
    'nkd': nkd_loss,
    'wttm': wttm_loss,
    'dist': dist_loss,
    'ofa': ofa_loss,
    'mse': _mse_loss,
    'l1': _l1_loss,
}


def needs_target(loss: Callable[..., torch.Tensor]) -> bool:
    """Whether a loss of logits asks for the target, too.

    Args:
        loss: one of :data:`GPD_LOSSES`.

    Returns:
        Whether ``target`` is its third argument.
    """
    return 'target' in inspect.signature(loss).parameters
