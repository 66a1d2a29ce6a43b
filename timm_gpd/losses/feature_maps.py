"""Losses of feature maps, stage by stage."""

from typing import Iterator, Sequence, Tuple

import torch
import torch.nn.functional as F

__all__ = ['at_loss', 'hcl_loss']


def hcl_loss(student_features: Sequence[torch.Tensor], teacher_features: Sequence[torch.Tensor]) -> torch.Tensor:
    """ReviewKD's hierarchical context loss (arXiv 2104.09044, Sec. 3.3), summed over the stages.

    A weighted mean of the squared error of the maps (weight 1) and of their averages in 4x4, 2x2 and 1x1 cells (each
    half the weight of the one before), as far as the map has more rows than that.

    Args:
        student_features: maps, each of shape (B, C, H, W).
        teacher_features: as many maps of the same shapes. Gradients do not flow into them.

    Returns:
        A scalar of at least 0.

    Raises:
        ValueError: if numbers or shapes differ.
    """
    loss = 0.0
    for student, teacher in _pairs('hcl_loss', student_features, teacher_features):
        if student.shape != teacher.shape:
            raise ValueError(
                f'hcl_loss compares maps of one shape, but they have {tuple(student.shape)} (student) and '
                f"{tuple(teacher.shape)} (teacher): project and resize the student's"
            )
        error, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
        for size in (4, 2, 1):
            if size < student.shape[-2]:
                weight /= 2
                total += weight
                error = error + weight * F.mse_loss(
                    F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
                )
        loss = loss + error / total
    return loss


def at_loss(
    student_features: Sequence[torch.Tensor],
    teacher_features: Sequence[torch.Tensor],
    p: float = 2.0,
) -> torch.Tensor:
    """Activation-based attention transfer (arXiv 1612.03928, Eq. 2), summed over the stages.

    The mean squared difference of unit attention maps, each the channel mean of ``|features| ** p``. Channels may
    differ; where sizes do, features are averaged to the smaller one.

    Args:
        student_features: maps, each of shape (B, C, H, W).
        teacher_features: as many maps of shape (B, C', H', W'). Gradients do not flow into them.
        p: power of the activations.

    Returns:
        A scalar of at least 0.

    Raises:
        ValueError: if the numbers of maps differ.
    """
    loss = 0.0
    for student, teacher in _pairs('at_loss', student_features, teacher_features):
        size = [min(lengths) for lengths in zip(student.shape[-2:], teacher.shape[-2:])]
        student, teacher = (
            F.normalize(F.adaptive_avg_pool2d(x, size).abs().pow(p).mean(1).flatten(1)) for x in (student, teacher)
        )
        loss = loss + F.mse_loss(student, teacher)
    return loss


def _pairs(
    name: str,
    student_features: Sequence[torch.Tensor],
    teacher_features: Sequence[torch.Tensor],
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    if len(student_features) != len(teacher_features) or not student_features:
        raise ValueError(
            f'{name} compares maps in pairs, but there are {len(student_features)} of the student and '
            f'{len(teacher_features)} of the teacher: give as many of both'
        )
    return ((student, teacher.detach()) for student, teacher in zip(student_features, teacher_features))
