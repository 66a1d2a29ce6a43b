"""What a target says: one class of each image, or a probability for every class."""

import torch

__all__ = ['are_indices', 'target_classes']


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
    return target if are_indices(target, *logits.shape) else target.argmax(-1)


def are_indices(target: torch.Tensor, batch_size: int, num_classes: int) -> bool:
    """Tells class indices, shape (B,), from class probabilities, shape (B, num_classes).

    Args:
        target: either.
        batch_size: B.
        num_classes: number of classes.

    Returns:
        Whether they are indices.

    Raises:
        ValueError: if the shape is neither.
    """
    if target.shape == (batch_size,) and not target.is_floating_point():
        return True
    if target.shape != (batch_size, num_classes):
        raise ValueError(
            f'target must hold class indices, shape ({batch_size},), or class probabilities, shape ({batch_size}, '
            f'{num_classes}), but is {target.dtype} of shape {tuple(target.shape)}'
        )
    return False
