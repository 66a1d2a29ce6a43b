"""Distillation losses between logits: each a mean over the batch, with no parameters of its own."""
from functools import partial
from typing import Callable, Dict

import torch
import torch.nn.functional as F

__all__ = ['GPD_LOSSES', 'kd_loss', 'soft_target_cross_entropy']


def soft_target_cross_entropy(
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        smoothing: float = 0.1,
) -> torch.Tensor:
    """Cross-entropy with the teacher's softened probabilities as labels.

    The loss between dynamic teacher and student of the authors' recipes (Eq. 3 of arXiv 2410.04140, with L_KD a
    label-smoothed cross-entropy).

    Args:
        student_logits: shape (B, num_classes).
        teacher_logits: shape (B, num_classes). Gradients do not flow into them.
        smoothing: share of the uniform distribution in the labels, in [0, 1].

    Returns:
        A scalar, at least the entropy of the labels.
    """
    labels = teacher_logits.detach().softmax(-1) * (1 - smoothing) + smoothing / teacher_logits.shape[-1]
    return F.cross_entropy(student_logits, labels)


def kd_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 4.0) -> torch.Tensor:
    """Kullback-Leibler divergence of softened probabilities, times temperature squared (arXiv 1503.02531, Sec. 2).

    Args:
        student_logits: shape (B, num_classes).
        teacher_logits: shape (B, num_classes). Gradients do not flow into them.
        temperature: divides both logits.

    Returns:
        A scalar of at least 0.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction='batchmean', log_target=True) * temperature ** 2


def _mse_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(student_logits, teacher_logits.detach())


def _l1_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    return F.l1_loss(student_logits, teacher_logits.detach())


# What the student may learn from the dynamic teacher by, under the names of ``--gpd-loss``.
GPD_LOSSES: Dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    'sce': soft_target_cross_entropy,
    'ce': partial(soft_target_cross_entropy, smoothing=0.0),
    'kl': partial(kd_loss, temperature=1.0),
    'mse': _mse_loss,
    'l1': _l1_loss,
}
