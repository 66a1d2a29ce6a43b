"""Losses of an adversarial step, which compare what two models make of several views of the same images.

Logits come by view: of the ``'clean'`` images x, of the ``'perturbed'`` ones x + d, and of the ``'mirrored'`` ones
x - d, with d what an attack has added. Teachers receive no gradient.
"""

from typing import Callable, Dict, Mapping, Tuple

import torch
import torch.nn.functional as F

from .logits import kd_loss
from .targets import target_classes

__all__ = ['ADVERSARIAL_LOSSES', 'VIEWS', 'VIEWS_OF', 'adaad_loss', 'dgad_loss', 'igdm_loss', 'swap_logits']

VIEWS = ('clean', 'perturbed', 'mirrored')

# Logits by view, each of shape (B, num_classes).
Views = Mapping[str, torch.Tensor]


def adaad_loss(student: Views, teacher: Views) -> torch.Tensor:
    """Kullback-Leibler divergence on the perturbed images (AdaAD, CVPR 2023, Eq. 7 with its weight alpha = 1).

    Args:
        student: logits by view, of which ``'perturbed'`` is read.
        teacher: the same of the teacher.

    Returns:
        A scalar of at least 0.
    """
    return kd_loss(student['perturbed'], teacher['perturbed'], temperature=1.0)


def dgad_loss(student: Views, teacher: Views, target: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Dynamic guidance (arXiv 2409.01627): each image is learned from where the teacher is worth it.

    Images that the teacher misclassifies take the divergence on the clean image, the others that on the perturbed one.
    Their two means, each weighted by the share of such images, add up to one mean over the batch. Where the teacher
    errs, on whichever image is compared, its logits are those of :func:`swap_logits`. Plus ``beta`` times the mean
    squared error between the student's probabilities on both images.

    Args:
        student: logits by view, of which ``'clean'`` and ``'perturbed'`` are read.
        teacher: the same of the teacher.
        target: class indices, shape (B,), or class probabilities, shape (B, num_classes), for their largest.
        beta: weight of the squared error.

    Returns:
        A scalar of at least 0.

    Raises:
        ValueError: if the target's shape is neither.
    """
    errs = teacher['clean'].argmax(1) != target_classes(target, teacher['clean'])
    compared = [torch.where(errs.unsqueeze(1), views['clean'], views['perturbed']) for views in (student, teacher)]
    divergence = kd_loss(compared[0], swap_logits(compared[1], target), temperature=1.0)
    return divergence + beta * F.mse_loss(student['perturbed'].softmax(-1), student['clean'].softmax(-1))


def igdm_loss(student: Views, teacher: Views) -> torch.Tensor:
    """Indirect gradient matching (arXiv 2312.03286): how logits change along the perturbation.

    The divergence between softmaxed differences T(x + d) - T(x - d) and S(x + d) - S(x - d), in which biases of the
    classifiers cancel. The paper adds it to another loss, such as :func:`adaad_loss`.

    Args:
        student: logits by view, of which ``'perturbed'`` and ``'mirrored'`` are read.
        teacher: the same of the teacher.

    Returns:
        A scalar of at least 0.
    """
    differences = [views['perturbed'] - views['mirrored'] for views in (student, teacher)]
    return kd_loss(*differences, temperature=1.0)


def swap_logits(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Logits whose largest is the target's: where it is another class's, the two change places.

    The error-corrective label swapping of arXiv 2409.01627.

    Args:
        logits: shape (B, num_classes).
        target: class indices, shape (B,), or class probabilities, shape (B, num_classes), for their largest.

    Returns:
        A tensor of the same shape; every row holds the same numbers.

    Raises:
        ValueError: if the target's shape is neither.
    """
    index = target_classes(target, logits).unsqueeze(1)
    largest, position = logits.max(1, keepdim=True)
    return logits.scatter(1, position, logits.gather(1, index)).scatter(1, index, largest)


# Under the names of ``--kd-distill-type`` and ``--gpd-loss``: functions of the student's and the teacher's logits by
# view, some also of the target, and of hyperparameters that have defaults.
ADVERSARIAL_LOSSES: Dict[str, Callable[..., torch.Tensor]] = {
    'adaad': adaad_loss,
    'dgad': dgad_loss,
    'igdm': igdm_loss,
}
# The views that each of them reads.
VIEWS_OF: Dict[str, Tuple[str, ...]] = {
    'adaad': ('perturbed',),
    'dgad': ('clean', 'perturbed'),
    'igdm': ('perturbed', 'mirrored'),
}
