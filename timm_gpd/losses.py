"""Distillation losses: each a mean over the batch, with no parameters of its own. Teachers receive no gradient.

Targets are class indices of shape (B,) or class probabilities of shape (B, num_classes), as smoothing and mixup make
them. DKD and OFA single out one target class: for them probabilities stand for their most probable class, which is what
the code published with OFA-KD does for both.
"""

from functools import partial
from typing import Callable, Dict, Iterator, Mapping, Sequence, Tuple

import torch
import torch.nn.functional as F

__all__ = [
    'GPD_LOSSES',
    'at_loss',
    'check_finite',
    'dist_loss',
    'dkd_loss',
    'hcl_loss',
    'kd_loss',
    'nd_loss',
    'ofa_loss',
    'rkd_loss',
    'soft_target_cross_entropy',
    'target_classes',
]


# -- logits -----------------------------------------------------------------------------------------------------------


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
    return _kl_divergence(student, teacher) * temperature**2


def dkd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    target: torch.Tensor,
    alpha: float = 1.0,
    beta: float = 0.5,
    temperature: float = 1.0,
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

    Returns:
        A scalar of at least 0 for weights of at least 0.

    Raises:
        ValueError: if the target's shape is neither.
    """
    index = target_classes(target, student_logits).unsqueeze(1)

    def split(logits: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        log_probabilities = F.log_softmax(logits / temperature, dim=-1)
        others = log_probabilities.scatter(1, index, float('-inf'))
        rest = others.logsumexp(-1, keepdim=True)
        # log 1 instead of log 0 at the target: both sides' are the same and add nothing to the divergence
        return torch.cat([log_probabilities.gather(1, index), rest], 1), (others - rest).scatter(1, index, 0.0)

    student_binary, student_others = split(student_logits)
    teacher_binary, teacher_others = split(teacher_logits.detach())
    target_part = _kl_divergence(student_binary, teacher_binary)
    other_part = _kl_divergence(student_others, teacher_others)
    return (alpha * target_part + beta * other_part) * temperature**2


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
    student = (student_logits / temperature).softmax(-1)
    teacher = (teacher_logits.detach() / temperature).softmax(-1)
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


# -- embeddings -------------------------------------------------------------------------------------------------------


def nd_loss(
    student_embedding: torch.Tensor,
    teacher_embedding: torch.Tensor,
    class_centers: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """Norm and direction of KD++ (arXiv 2305.17007, Eq. 8): a long embedding along the centre of its class.

    With e the unit vector of the teacher's class centre: ``1 - <s, e> / max(|s|, |t|)``. Probabilities as targets mix
    the centres, as the code published with KD++ does for mixup.

    Args:
        student_embedding: shape (B, D).
        teacher_embedding: shape (B, D). Gradients do not flow into it.
        class_centers: the teacher's mean embedding of every class, shape (num_classes, D). A class without one is 0.
        target: class indices, shape (B,), or class probabilities, shape (B, num_classes).

    Returns:
        A scalar in [0, 2].

    Raises:
        ValueError: if the shapes do not fit.
    """
    if not student_embedding.shape[-1] == teacher_embedding.shape[-1] == class_centers.shape[-1]:
        raise ValueError(
            f'nd_loss compares embeddings of one width, but they have {student_embedding.shape[-1]} (student), '
            f"{teacher_embedding.shape[-1]} (teacher) and {class_centers.shape[-1]} (centres): project the student's"
        )
    centers = class_centers.detach()
    if _is_indices(target, len(student_embedding), len(centers)):
        center = centers[target]
    else:
        center = target.to(centers.dtype) @ centers
    longest = torch.maximum(student_embedding.norm(dim=-1), teacher_embedding.detach().norm(dim=-1))
    along = (student_embedding * F.normalize(center, dim=-1)).sum(-1)
    return (1 - along / longest.clamp(min=1e-12)).mean()


def rkd_loss(
    student_embedding: torch.Tensor,
    teacher_embedding: torch.Tensor,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> torch.Tensor:
    """Relational knowledge distillation (arXiv 1904.05068, Eq. 7 and 10): distances of pairs and angles of triplets.

    Widths may differ. Memory grows with B ** 2 * D and B ** 3. Default weights as in mdistiller.

    Args:
        student_embedding: shape (B, D) or (B, ...).
        teacher_embedding: shape (B, E) or (B, ...). Gradients do not flow into it.
        distance_weight: weight of the distance part.
        angle_weight: weight of the angle part.

    Returns:
        A scalar of at least 0.

    Raises:
        ValueError: if there is only one image, which has no relations.
    """
    if len(student_embedding) < 2:
        raise ValueError('rkd_loss compares the images of a batch: give it at least 2')
    # dot products of unit vectors need more than half precision to tell small angles
    with torch.autocast(student_embedding.device.type, enabled=False):
        student, teacher = (
            (e.float() if e.dtype in (torch.float16, torch.bfloat16) else e).flatten(1)
            for e in (student_embedding, teacher_embedding.detach())
        )
        distance = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))
        angle = F.smooth_l1_loss(_angles(student), _angles(teacher))
    return distance_weight * distance + angle_weight * angle


# -- feature maps -----------------------------------------------------------------------------------------------------


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


# -- what the losses share --------------------------------------------------------------------------------------------


def target_classes(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """One class per image: the target's indices, or the largest of its probabilities.

    Args:
        target: class indices, shape (B,), or class probabilities, shape (B, num_classes).
        logits: shape (B, num_classes); only the shape counts.

    Returns:
        Class indices, shape (B,).

    Raises:
        ValueError: if the target's shape is neither (B,) nor that of the logits, (B, num_classes).
    """
    return target if _is_indices(target, *logits.shape) else target.argmax(-1)


def check_finite(terms: Mapping[str, torch.Tensor]) -> None:
    """Waits for scalar loss terms and names those that are not finite. One synchronisation with the device.

    Args:
        terms: scalar tensors by name.

    Raises:
        FloatingPointError: if a term is NaN or infinite.
    """
    values = dict(zip(terms, torch.stack([term.detach().float() for term in terms.values()]).tolist()))
    broken = [f'{name} is {value}' for name, value in values.items() if not abs(value) < float('inf')]
    if broken:
        raise FloatingPointError(
            f'{", ".join(broken)}: lower the learning rate or the weight of that loss, or clip gradients'
        )


def _is_indices(target: torch.Tensor, batch_size: int, num_classes: int) -> bool:
    if target.shape == (batch_size,) and not target.is_floating_point():
        return True
    if target.shape != (batch_size, num_classes):
        raise ValueError(
            f'target must hold class indices, shape ({batch_size},), or class probabilities, shape ({batch_size}, '
            f'{num_classes}), but is {target.dtype} of shape {tuple(target.shape)}'
        )
    return False


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


def _kl_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div(student, teacher, reduction='batchmean', log_target=True)


def _pearson_distance(a: torch.Tensor, b: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """1 - correlation, a mean over rows. ``eps`` matters: the product of two columns' norms is often as small."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)).mean()


def _relative_distances(embedding: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of all pairs, shape (B, B), in units of the mean of those that are not 0."""
    distances = torch.cdist(embedding, embedding, compute_mode='donot_use_mm_for_euclid_dist')
    return distances * (distances > 0).sum() / distances.sum()


def _angles(embedding: torch.Tensor) -> torch.Tensor:
    """Cosines of the angles at i between the directions to j and to k, shape (B, B, B)."""
    directions = F.normalize(embedding.unsqueeze(0) - embedding.unsqueeze(1), dim=2)
    return directions @ directions.transpose(1, 2)


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
