"""Images that cannot be read and labels that a model lacks: found while they are loaded, and said in one line."""

import logging
import os
import struct
import zlib
from typing import Any, List, Optional, Tuple

import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data.target_transforms import MultiLabelTarget

from ...errors import DataError, one_line
from ..processes import Processes

__all__ = ['CheckedImages', 'LabelRange', 'LabelSet', 'report_bad_images']

_logger = logging.getLogger('train')

# What PIL raises, beside OSError, of a file whose bytes are not what its format says.
_BROKEN = (
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    KeyError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_MAX_RETRIES = int(os.environ.get('TIMM_DATASET_MAX_RETRIES') or 10)  # timm's switch and default


class LabelRange:
    """Passes labels that a model has a class for: a target transform.

    Args:
        num_classes: the model's classes.
        split: name of the split.
    """

    def __init__(self, num_classes: int, split: str) -> None:
        self.num_classes, self.split = num_classes, split

    def __call__(self, label: Any) -> Any:
        try:
            index = int(label)
        except (TypeError, ValueError):
            raise DataError(f'{label!r}, a label of the {self.split} split, is no index of a class: check --task')
        if not 0 <= index < self.num_classes:
            raise DataError(
                f'the {self.split} split has the label {index} and the model {self.num_classes} classes, from 0 '
                'on: set --num-classes, or --class-map'
            )
        return label


class LabelSet:
    """Makes multi-hot targets of several labels: a target transform.

    Args:
        num_classes: the model's classes.
        split: name of the split.
        dense: whether a target has a number for every class, not the indices of those that it is in.
    """

    def __init__(self, num_classes: int, split: str, dense: bool) -> None:
        self.encode, self.split = MultiLabelTarget(num_classes, dense=dense), split

    def __call__(self, labels: Any) -> torch.Tensor:
        try:
            return self.encode(labels)
        except (ValueError, TypeError) as error:
            raise DataError(f'a target of the {self.split} split is wrong: {one_line(error)} (check --num-classes)')


class CheckedImages(ImageDataset):
    """timm's dataset of images; remembers which could not be read.

    As in timm the next image is loaded in place of one that cannot be read. Processes that load images share one
    memory of them, which :meth:`report` reads and clears.

    Args:
        dataset: timm's dataset.
        split: its name.
        max_bad: share of unreadable images that ends the run.
    """

    def __init__(self, dataset: ImageDataset, split: str, max_bad: float) -> None:
        super().__init__(
            None,
            reader=dataset.reader,
            load_bytes=dataset.load_bytes,
            input_img_mode=dataset.input_img_mode,
            target_transform=dataset.target_transform,
        )
        self.split, self.max_bad = split, max_bad
        # A mark for each image: writing one twice, from whichever process, changes nothing.
        self.marks = torch.zeros(len(self), dtype=torch.uint8).share_memory_()

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        for _ in range(_MAX_RETRIES):
            try:
                image, label = self.read(index)
                break
            except OSError as error:
                self.marks[index] = 1
                self._check_share([index], one_line(error))
                index = (index + 1) % len(self)
        else:
            raise DataError(f'{_MAX_RETRIES} images in a row cannot be read, up to {self.name(index - 1)}')
        if label is None:
            raise DataError(f'{self.name(index)} of the {self.split} split has no label')
        if self.transform is not None:
            image = self.transform(image)
        return image, label if self.target_transform is None else self.target_transform(label)

    def read(self, index: int) -> Tuple[Any, Any]:
        """An image, or its undecoded bytes, and its label, as they are stored.

        Raises:
            OSError: if it cannot be read.
        """
        file, label = self.reader[index]
        with file:
            if self.load_bytes:
                return file.read(), label
            try:
                image = Image.open(file)
                return image.convert(self.input_img_mode) if self.input_img_mode else image.copy(), label
            except _BROKEN as error:
                raise OSError(one_line(error)) from error

    def name(self, index: int) -> str:
        """What an image is called: its file where there is one."""
        return str(self.filename(index) or f'image {index}')

    def take_bad(self) -> List[int]:
        """Indices of the images that this process and its workers could not read since it was asked last."""
        bad = self.marks.nonzero().flatten().tolist()
        self.marks.zero_()
        return bad

    def report(self, bad: List[int], epoch: Optional[int] = None) -> None:
        """Logs how many images could not be read, and which was the first, on one line.

        Args:
            bad: their indices, in order.
            epoch: index of the epoch that has ended, if any.

        Raises:
            DataError: if their share is too large.
        """
        if not bad:
            return
        try:
            self.read(bad[0])
            reason = 'it can be read now'
        except OSError as error:
            reason = one_line(error)
        _logger.warning(
            f'{"" if epoch is None else f"Epoch {epoch}: "}{len(bad)} of {len(self)} images of the {self.split} '
            f'split could not be read, and others took their places: the first is {self.name(bad[0])} ({reason})'
        )
        self._check_share(bad, reason)

    def _check_share(self, bad: List[int], reason: str) -> None:
        count = max(len(bad), int(self.marks.sum()))
        if count > self.max_bad * len(self):
            raise DataError(
                f'{count} of {len(self)} images of the {self.split} split cannot be read, which is more than '
                f'--max-bad-images {self.max_bad:g} allows: one is {self.name(bad[0])} ({reason})'
            )


def report_bad_images(processes: Processes, epoch: Optional[int], *loaders: Any) -> None:
    """Logs what could not be read in an epoch, a line for each split. Every process has to call it.

    Args:
        processes: those that share the images.
        epoch: index of the epoch, None where there are no epochs.
        *loaders: timm's loaders of the splits, or None.

    Raises:
        DataError: if a split has more unreadable images than ``--max-bad-images`` allows.
    """
    for loader in loaders:
        if loader is None:
            continue
        dataset = loader.dataset
        while not isinstance(dataset, CheckedImages) and hasattr(dataset, 'dataset'):
            dataset = dataset.dataset  # of what augments one image in several ways
        if isinstance(dataset, CheckedImages):
            parts = processes.gather_everywhere(dataset.take_bad())
            dataset.report(sorted({index for part in parts for index in part}), epoch)
