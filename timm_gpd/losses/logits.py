"""Losses of logits."""

import torch
import torch.nn.functional as F

from .precision import in_whole_precision
from .targets import target_classes

__all__ = [
    'dist_loss',
    'dkd_loss',
    'kd_loss',
    'nkd_loss',
    'ofa_loss',
    'rld_loss',
    'soft_target_cross_entropy',
    'standardize_logits',
    'wttm_loss',
]


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


def standardize_logits(logits: torch.Tensor) -> torch.Tensor:
    """Each image's logits minus their mean, over their standard deviation plus 1e-7 (arXiv 2403.01427).

    The student then learns the relations of logits, not their size, which is the teacher's.

    Args:
        logits: shape (B, num_classes), of at least two classes.

    Returns:
        A tensor of the same shape; every row has mean 0 and deviation 1.
    """
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)


def kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 4.0,
    standardize: bool = False,
) -> torch.Tensor:
    """Kullback-Leibler divergence of softened probabilities, times temperature squared (arXiv 1503.02531, Sec. 2).

    Args:
        student_logits: shape (B, num_classes).
        teacher_logits: shape (B, num_classes). Gradients do not flow into them.
        temperature: divides both logits.
        standardize: compare standardised logits, see :func:`standardize_logits`.

    Returns:
        A scalar of at least 0.
    """
    if standardize:
        student_logits, teacher_logits = standardize_logits(student_logits), standardize_logits(teacher_logits)
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    return _kl_divergence(student, teacher) * temperature**2


def dkd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    target: torch.Tensor,
    alpha: float = 1.0,
    beta: float = 0.5,
    temperature: float = 1.0,
    standardize: bool = False,
) -> torch.Tensor:
    """Decoupled knowledge distillation (arXiv 2203.08679, Eq. 7): target class and other classes apart.

    ``alpha`` times the divergence of (target, rest) plus ``beta`` times that of the other classes among themselves,
    times temperature squared. Evaluated in log space, so that a saturated softmax stays finite.

    Args:
        student_logits: shape (B, num_classes).
        teacher_logits: shape (B, num_classes). Gradients do not flow into them.
        target: class indices, shape (B,), or class probabilities, shape (B, num_classes), for their largest.
        alpha: weight of the target class part.
        beta: weight of the non-target class part.
        temperature: divides both logits.
        standardize: compare standardised logits, see :func:`standardize_logits`.

    Returns:
        A scalar of at least 0 for weights of at least 0.

    Raises:
        ValueError: if the target's shape is neither.
    """
    if standardize:
        student_logits, teacher_logits = standardize_logits(student_logits), standardize_logits(teacher_logits)
    index = target_classes(target, student_logits).unsqueeze(1)
    is_target = torch.zeros_like(student_logits, dtype=torch.bool).scatter(1, index, True)
    logits = student_logits, teacher_logits.detach()
    target_part = _divergence_of_one(*logits, index, index, temperature)
    return alpha * target_part + beta * _divergence_without(*logits, is_target, temperature)


def rld_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    target: torch.Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    alpha_temperature: float = 1.0,
    standardize: bool = False,
) -> torch.Tensor:
    """Refined logit distillation (arXiv 2408.07703, Eq. 6 to 11): a teacher that errs teaches no error.

    ``alpha`` times the divergence of (target, rest) of the student from (most probable class, rest) of the teacher, as
    sure as it is, whatever of; plus ``beta`` times that of the classes among themselves to which the teacher gives less
    than to the target; each times its temperature squared. Where the teacher is right and both temperatures are equal
    that is :func:`dkd_loss`. An image to whose target the teacher gives the least adds nothing to the second part.

    Defaults are those of the code for CIFAR-100, which raises the loss to its weight over the first 20 epochs; that is
    left out here. For ImageNet it has a ``temperature`` of 1 and a ``beta`` of 0.5 (ResNet-34 to ResNet-18) or 2
    (ResNet-50 to MobileNetV1).

    Args:
        student_logits: shape (B, num_classes).
        teacher_logits: shape (B, num_classes). Gradients do not flow into them.
        target: class indices, shape (B,), or class probabilities, shape (B, num_classes), for their largest.
        alpha: weight of the first part.
        beta: weight of the second part.
        temperature: divides both logits in the second part.
        alpha_temperature: divides both logits in the first part.
        standardize: compare standardised logits, see :func:`standardize_logits`.

    Returns:
        A scalar of at least 0 for weights of at least 0.

    Raises:
        ValueError: if the target's shape is neither.
    """
    if standardize:
        student_logits, teacher_logits = standardize_logits(student_logits), standardize_logits(teacher_logits)
    index, teacher_logits = target_classes(target, student_logits).unsqueeze(1), teacher_logits.detach()
    most_probable = teacher_logits.argmax(1, keepdim=True)
    sure = _divergence_of_one(student_logits, teacher_logits, index, most_probable, alpha_temperature)
    left_out = teacher_logits >= teacher_logits.gather(1, index)
    return alpha * sure + beta * _divergence_without(student_logits, teacher_logits, left_out, temperature)


def nkd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    target: torch.Tensor,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Normalised knowledge distillation (arXiv 2303.13005) without the task loss.

    Cross-entropy of the target class weighted by the teacher's probability of it, plus ``gamma`` times temperature
    squared times the cross-entropy of the other classes, whose probabilities sum to one in both models.

    Args:
        student_logits: shape (B, num_classes), of at least two classes.
        teacher_logits: shape (B, num_classes). Gradients do not flow into them.
        target: class indices, shape (B,), or class probabilities, shape (B, num_classes), for their largest.
        gamma: weight of the other classes.
        temperature: divides both logits where the other classes are compared.

    Returns:
        A scalar of at least 0.

    Raises:
        ValueError: if the target's shape is neither.
    """
    index = target_classes(target, student_logits).unsqueeze(1)
    student_logits, teacher_logits = in_whole_precision(student_logits), in_whole_precision(teacher_logits.detach())
    of_target = teacher_logits.softmax(-1).gather(1, index) * F.log_softmax(student_logits, -1).gather(1, index)
    is_target = torch.zeros_like(teacher_logits, dtype=torch.bool).scatter(1, index, True)
    student, teacher = (  # masked and not taken out, as a compiler knows no shape of what a mask takes out
        F.log_softmax((logits / temperature).masked_fill(is_target, float('-inf')), -1)
        for logits in (student_logits, teacher_logits)
    )
    of_others = (teacher.exp() * student.masked_fill(is_target, 0.0)).sum(-1)
    return -of_target.mean() - gamma * temperature**2 * of_others.mean()


def wttm_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, gamma: float = 0.2) -> torch.Tensor:
    """Weighted transformed teacher matching (arXiv 2402.11148): only the teacher is softened.

    The teacher's probabilities to the power ``gamma``, renormalised, against the student's untempered ones. An image
    counts as much as what the powers summed to, which is more where the teacher is less sure.

    Args:
        student_logits: shape (B, num_classes).
        teacher_logits: shape (B, num_classes). Gradients do not flow into them.
        gamma: the power, 1 over a temperature of the teacher's logits.

    Returns:
        A scalar of at least 0.
    """
    powers = gamma * F.log_softmax(teacher_logits.detach(), dim=-1)
    normaliser = powers.logsumexp(-1, keepdim=True)
    teacher, student = powers - normaliser, F.log_softmax(student_logits, dim=-1)
    divergence = F.kl_div(student, teacher, reduction='none', log_target=True).sum(-1)
    return (normaliser.exp().squeeze(-1) * divergence).mean()


def dist_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """DIST (arXiv 2205.10536, Eq. 10): Pearson distance of probabilities within images and within classes.

    Args:
        student_logits: shape (B, num_classes).
        teacher_logits: shape (B, num_classes). Gradients do not flow into them.
        beta: weight of the inter-class part, the distance between two rows.
        gamma: weight of the intra-class part, the distance between two columns.
        temperature: divides both logits; the loss is multiplied by its square.

    Returns:
        A scalar in [0, 2 * (beta + gamma) * temperature ** 2].
    """
    student = (in_whole_precision(student_logits) / temperature).softmax(-1)
    teacher = (in_whole_precision(teacher_logits.detach()) / temperature).softmax(-1)
    inter = _pearson_distance(student, teacher)
    intra = _pearson_distance(student.T, teacher.T)
    return (beta * inter + gamma * intra) * temperature**2


def ofa_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    target: torch.Tensor,
    eps: float = 1.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """OFA-KD (arXiv 2310.19444, Eq. 6) without its hard-label part, which the task loss is.

    Cross-entropy with the teacher's probabilities p as labels, where that of the target class is ``(1 + p) ** eps - 1``
    and that of another class ``p ** eps``. For ``eps`` of 1 these are p.

    Args:
        student_logits: shape (B, num_classes).
        teacher_logits: shape (B, num_classes). Gradients do not flow into them.
        target: class indices, shape (B,), or class probabilities, shape (B, num_classes), for their largest.
        eps: how much more a confident teacher counts.
        temperature: divides both logits. The loss is not multiplied by its square.

    Returns:
        A scalar of at least 0.

    Raises:
        ValueError: if the target's shape is neither.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = (teacher_logits.detach() / temperature).softmax(-1)
    mask = torch.zeros_like(teacher).scatter(1, target_classes(target, student_logits).unsqueeze(1), 1.0)
    return -(((teacher + mask) ** eps - mask) * student).sum(-1).mean()


def _divergence_of_one(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    of_student: torch.Tensor,
    of_teacher: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Divergence of (a class, all others together), of indices (B, 1) in each model, times temperature squared."""

    def split(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        log_probabilities = F.log_softmax(logits / temperature, dim=-1)
        rest = log_probabilities.scatter(1, index, float('-inf')).logsumexp(-1, keepdim=True)
        return torch.cat([log_probabilities.gather(1, index), rest], 1)

    return _kl_divergence(split(student_logits, of_student), split(teacher_logits, of_teacher)) * temperature**2


def _divergence_without(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    left_out: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Divergence among the classes that are not left out, times temperature squared; 0 where none is left."""
    infinite = left_out & ~left_out.all(1, keepdim=True)

    def among(logits: torch.Tensor) -> torch.Tensor:
        log_probabilities = F.log_softmax((logits / temperature).masked_fill(infinite, float('-inf')), dim=-1)
        # Log 1 instead of log 0 of what is left out: both sides' are the same and add nothing to the divergence.
        return log_probabilities.masked_fill(left_out, 0.0)

    return _kl_divergence(among(student_logits), among(teacher_logits)) * temperature**2


def _kl_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div(student, teacher, reduction='batchmean', log_target=True)


def _pearson_distance(a: torch.Tensor, b: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """1 - correlation, a mean over rows. ``eps`` matters: the product of two columns' norms is often as small."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)).mean()
