"""Glyphs of a machine's fonts as a dataset that is read, and augmented, a batch at a time."""

from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ...data.glyphs import SPLITS, Glyphs, augment, read_description
from ...errors import UsageError

__all__ = ['GlyphImages', 'find_glyphs']


class GlyphImages(Dataset):
    """One split, with an augmentation of its own in place of timm's.

    In training an image looks different every time. In validation it looks like one of training, and every time the
    same: what is measured is how well fonts that were not trained on are read under what training shows.

    Args:
        glyphs: the split.
        is_training: whether it is trained on.
        is_augmented: whether images are augmented, or shown as they were drawn.

    Attributes:
        class_to_idx: index of each class, by its character.
        transform: what timm's loader sets, and nothing uses; so is ``target_transform``.
    """

    def __init__(self, glyphs: Glyphs, is_training: bool, is_augmented: bool = True) -> None:
        self.images = torch.from_numpy(glyphs.images)
        self.targets: List[int] = glyphs.targets.tolist()
        self.numbers: List[int] = glyphs.numbers.tolist()
        self.is_training, self.is_augmented = is_training, is_augmented
        self.class_to_idx = {name: index for index, name in enumerate(glyphs.classes)}
        self.transform: Any = None
        self.target_transform: Any = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Tuple[np.ndarray, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: List[int]) -> List[Tuple[np.ndarray, int]]:
        if self.is_training:
            return self.read_batch(indices, torch.randint(2**62, (len(indices),)).tolist())
        return self.read_batch(indices, [self.numbers[index] for index in indices])

    def read_batch(self, indices: Sequence[int], seeds: Sequence[int]) -> List[Tuple[np.ndarray, int]]:
        """Images as timm's loader puts them together.

        Args:
            indices: which ones.
            seeds: says for each how it is augmented.

        Returns:
            For each the image (1, size, size), uint8, and the index of its class.
        """
        images = self.images[list(indices)]
        if self.is_augmented:
            images = augment(images, seeds)
        return list(zip(images[:, None].numpy(), [self.targets[index] for index in indices]))


def find_glyphs(folder: str, splits: Sequence[str]) -> Dict[str, Any]:
    """Checks that a folder holds glyphs, and tells what a model of them is like.

    Args:
        folder: what ``python -m timm_gpd.data.glyphs`` wrote.
        splits: names of the splits that are read.

    Returns:
        Values of arguments that a command may leave open: the number of classes and the input.

    Raises:
        UsageError: if there are no glyphs, or no such split.
    """
    for split in splits:
        if split not in SPLITS:
            raise UsageError(f'glyphs have no split {split!r}: choose of {", ".join(SPLITS)}')
    description = read_description(folder)
    size = description['settings']['size']
    return dict(
        num_classes=len(description['classes']), input_size=[1, size, size], mean=[0.5], std=[0.5], crop_pct=1.0
    )
