"""How alike two networks are that need not be trained: DisWOT's measures (arXiv 2303.15678), as distances.

Both are functions of what a network makes of one batch. Nothing is trained, and no graph is built: the gradient of a
linear classifier is a product of what it receives with the residual of the probabilities.
"""

import contextlib
from typing import Iterator, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..distillers import Tap, evaluation_mode
from ..distillers.feature_tap import model_name
from ..errors import InputError
from ..private_torch import BatchNorm
from ..teacher import DynamicTeacher

__all__ = ['Fingerprint', 'Similarity', 'compare_fingerprints', 'compare_networks', 'take_fingerprint']


class Fingerprint(NamedTuple):
    """What of a network is compared, in float64 on the CPU.

    Attributes:
        gram: products of the batch's last feature maps, rows of unit length, shape (B, B).
        gradient: of the mean cross-entropy by the classifier's weight, shape (num_classes, C).
    """

    gram: torch.Tensor
    gradient: torch.Tensor


class Similarity(NamedTuple):
    """How far two networks are apart: two numbers that are 0 where they are one function.

    Attributes:
        relation: of the relations among the images of a batch.
        semantic: of what each class asks of the channels.
    """

    relation: float
    semantic: float

    @property
    def score(self) -> float:
        """Minus the sum: higher is more alike, and 0 is the most."""
        return -(self.relation + self.semantic)


def compare_networks(teacher: nn.Module, student: nn.Module, images: torch.Tensor, target: torch.Tensor) -> Similarity:
    """Compares two networks with the weights that they have. Neither is changed.

    Norms of batches use the batch's own statistics, as in training; dropout and its like are off.

    Args:
        teacher: timm model with a classifier, or a dynamic teacher.
        student: the same. Exchanging the two gives the same result.
        images: a batch of B >= 2 images, shape (B, in_chans, H, W), normalised.
        target: class indices, shape (B,).

    Returns:
        Their distances.

    Raises:
        InputError: if a model has no feature maps or no embedding, gives numbers that are not finite, or the two have
            different numbers of classes.
    """
    return compare_fingerprints(*(take_fingerprint(model, images, target) for model in (teacher, student)))


@torch.no_grad()
def take_fingerprint(model: nn.Module, images: torch.Tensor, target: torch.Tensor) -> Fingerprint:
    """What of a network is compared, see :func:`compare_networks`."""
    if len(images) < 2:
        raise InputError(f'networks are compared by relations among images: give at least 2, not {len(images)}')
    if isinstance(model, DynamicTeacher):
        model = model.extract_teacher()
    tap = Tap(model, {'stages': 'relation', 'embedding': 'semantic'})
    with _batch_statistics(model):
        output = tap(images)
    features, embedding, logits = (
        tensor.cpu().double() for tensor in (output.stages[-1].flatten(1), output.embedding, output.logits)
    )
    residual = (logits.softmax(-1) - F.one_hot(target.cpu(), logits.shape[-1])) / len(images)
    fingerprint = Fingerprint(F.normalize(features @ features.T), residual.T @ embedding)
    if not all(tensor.isfinite().all() for tensor in fingerprint):
        raise InputError(f'{model_name(model)} gives numbers that are not finite with these weights: leave it out')
    return fingerprint


def compare_fingerprints(teacher: Fingerprint, student: Fingerprint) -> Similarity:
    """Compares two networks by what they made of the same batch.

    With G the matrix of products of a batch's feature maps, rows of unit length, the relation part is
    ``|G_T - G_S|^2 / B^2``. With g the gradient of one class's weights, the semantic part is the mean over classes of
    ``|H_T - H_S|^2 / C``, where H = g g' has rows of unit length. The published code pairs the channels of both
    networks by their numbers, which mean nothing across networks, and needs as many of both. Here every class orders
    them by its gradient, of which H knows no sign, so that of both directions the one that fits better counts. Where
    widths differ, neighbours in that order are averaged to as many as the narrower network has: of replicated channels
    these are the replicas.
    """
    if len(teacher.gradient) != len(student.gradient):
        raise InputError(
            f'networks of {len(teacher.gradient)} and of {len(student.gradient)} classes cannot be compared: give both '
            'the same classes'
        )
    relation = (teacher.gram - student.gram).square().sum() / len(teacher.gram) ** 2
    width = min(teacher.gradient.shape[1], student.gradient.shape[1])
    of_student = _order_channels(student.gradient, width)
    both_ways = [_rank_one_distance(_order_channels(sign * teacher.gradient, width), of_student) for sign in (1, -1)]
    semantic = torch.minimum(*both_ways) / width
    return Similarity(relation.item(), semantic.mean().item())


def _order_channels(gradient: torch.Tensor, width: int) -> torch.Tensor:
    """Every row in order, neighbours averaged to that width."""
    return F.adaptive_avg_pool1d(gradient.sort(dim=1).values.unsqueeze(0), width)[0]


def _rank_one_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``|H_1 - H_2|^2`` for every row g of two matrices, where H = g g' with rows of unit length.

    Row i of H is the sign of g_i times g's direction: no matrix of channels by channels is built.
    """
    signs, directions = ([function(g) for g in (first, second)] for function in (torch.sign, F.normalize))
    sizes = [sign.square().sum(1) * direction.square().sum(1) for sign, direction in zip(signs, directions)]
    product = (signs[0] * signs[1]).sum(1) * (directions[0] * directions[1]).sum(1)
    return (sizes[0] + sizes[1] - 2 * product).clamp(min=0)


@contextlib.contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for norms of batches, which use a batch's statistics and keep their own as they are."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    with evaluation_mode(model):
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        try:
            yield
        finally:
            for norm, was_tracked in zip(norms, tracked):
                norm.track_running_stats = was_tracked
