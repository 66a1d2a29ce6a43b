"""Batches of training images as files, to look at what augmentation makes of them."""

import os

import torch
from torchvision.utils import save_image

__all__ = ['ImageLog']


class ImageLog:
    """Saves the images of every so many batches, as timm's script does.

    Args:
        folder: where ``train-batch-<index>.jpg`` is written; an epoch overwrites those of the one before.
        interval: updates between two.
    """

    def __init__(self, folder: str, interval: int) -> None:
        self.folder, self.interval = folder, interval

    def save(self, update: int, batch: int, images: torch.Tensor) -> None:
        """Saves a batch, if it is one of those.

        Args:
            update: index of its update in the epoch.
            batch: index of the batch in the epoch.
            images: shape (B, in_chans, H, W), of any range.
        """
        if update % self.interval:
            return
        save_image(images.float(), os.path.join(self.folder, f'train-batch-{batch}.jpg'), padding=0, normalize=True)
