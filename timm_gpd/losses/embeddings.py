"""Losses of what classifiers receive."""

import torch
import torch.nn.functional as F

from .precision import in_whole_precision
from .targets import are_indices

__all__ = ['embed_loss', 'nd_loss', 'rkd_loss', 'rsd_loss']


def embed_loss(
    student_embedding: torch.Tensor,
    teacher_embedding: torch.Tensor,
    distance_weight: float = 1.0,
) -> torch.Tensor:
    """Embeddings where the teacher's are, and as far from each other, after EmbedDistill (arXiv 2301.12005).

    With s and t the embeddings of student and teacher, the mean over images of ``|s_i - t_i|``, which is the paper's,
    and ``distance_weight`` times the mean over pairs of ``| |s_i - s_j| - |t_i - t_j| |``. Norms are Euclidean and not
    squared. The second part is at most twice the first, and does not change as all embeddings are moved or turned.

    Args:
        student_embedding: shape (B, D), projected to the teacher's width.
        teacher_embedding: shape (B, D). Gradients do not flow into it.
        distance_weight: weight of the part that compares distances.

    Returns:
        A scalar of at least 0.

    Raises:
        ValueError: if widths differ, or there is only one image, which has no distance.
    """
    _check_pair(student_embedding, teacher_embedding, 'embed_loss', 'embeddings', 'compares the distances of a batch')
    with torch.autocast(student_embedding.device.type, enabled=False):
        student, teacher = (in_whole_precision(e) for e in (student_embedding, teacher_embedding.detach()))
        places = torch.linalg.vector_norm(student - teacher, dim=-1).mean()
        gaps = (_distances(student) - _distances(teacher)).abs().sum() / (len(student) * (len(student) - 1))
    return places + distance_weight * gaps


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
    if are_indices(target, len(student_embedding), len(centers)):
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
        student, teacher = (in_whole_precision(e).flatten(1) for e in (student_embedding, teacher_embedding.detach()))
        distance = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))
        angle = F.smooth_l1_loss(_angles(student), _angles(teacher))
    return distance_weight * distance + angle_weight * angle


def rsd_loss(student_features: torch.Tensor, teacher_features: torch.Tensor, kappa: float = 0.01) -> torch.Tensor:
    """Redundancy suppression (arXiv 2507.21844, Eq. 3): every feature like the teacher's, and unlike its others.

    Features are normalised over the batch, by 1e-5 more than their deviation. Of their cross-correlations those of a
    feature with its own counterpart are drawn to 1, and ``kappa`` times as hard those with others to 0. Summed over all
    D ** 2 of them, the loss is large: give it a weight that suits the task loss.

    Args:
        student_features: shape (B, D), projected to the teacher's width.
        teacher_features: shape (B, D). Gradients do not flow into them.
        kappa: weight of what is off the diagonal.

    Returns:
        A scalar of at least 0.

    Raises:
        ValueError: if widths differ, or there is only one image, which has no deviation.
    """
    _check_pair(student_features, teacher_features, 'rsd_loss', 'features', 'normalises over the images of a batch')
    with torch.autocast(student_features.device.type, enabled=False):
        student, teacher = (
            _normalise_over_batch(in_whole_precision(features))
            for features in (student_features, teacher_features.detach())
        )
        correlation_DD = teacher.T @ student / len(student)
        diagonal_D = correlation_DD.diagonal()
        others = correlation_DD.square().sum() - diagonal_D.square().sum()
        return (diagonal_D - 1).square().sum() + kappa * others


def _normalise_over_batch(features: torch.Tensor) -> torch.Tensor:
    std, mean = torch.std_mean(features, 0, unbiased=False)
    return (features - mean) / (std + 1e-5)


def _relative_distances(embedding: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of all pairs, shape (B, B), in units of the mean of those that are not 0."""
    distances = _distances(embedding)
    return distances * (distances > 0).sum() / distances.sum()


def _distances(embedding: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of all pairs, shape (B, B)."""
    return torch.cdist(embedding, embedding, compute_mode='donot_use_mm_for_euclid_dist')


def _angles(embedding: torch.Tensor) -> torch.Tensor:
    """Cosines of the angles at i between the directions to j and to k, shape (B, B, B)."""
    directions = F.normalize(embedding.unsqueeze(0) - embedding.unsqueeze(1), dim=2)
    return directions @ directions.transpose(1, 2)


def _check_pair(student: torch.Tensor, teacher: torch.Tensor, loss: str, what: str, needs_several: str) -> None:
    """Refuses other widths, and a batch of one image, in the words of a loss."""
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f'{loss} compares {what} of one width, but they have {student.shape[-1]} (student) and '
            f"{teacher.shape[-1]} (teacher): project the student's"
        )
    if len(student) < 2:
        raise ValueError(f'{loss} {needs_several}: give it at least 2')
