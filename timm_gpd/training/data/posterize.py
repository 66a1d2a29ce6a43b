"""timm's posterizing, which may keep no bit of a pixel, with a Pillow that refuses to do that."""

from contextlib import contextmanager
from typing import Any, Iterator

from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, posterize

__all__ = ['posterize_to_black']


def _posterize(image: Image.Image, bits_to_keep: int, **settings: Any) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)  # what it is without Pillow's check: black
    return posterize(image, bits_to_keep, **settings)


@contextmanager
def posterize_to_black() -> Iterator[None]:
    """Policies of augmentation that are created in it give a black image where no bit is kept, in every Pillow.

    ``rand-m9-mstd0.5-inc1`` and others of timm's policies ask for that now and then, and Pillow 13 raises an error.
    """
    replaced = {name: _posterize for name, function in NAME_TO_OP.items() if function is posterize}
    before = {name: NAME_TO_OP[name] for name in replaced}
    NAME_TO_OP.update(replaced)
    try:
        yield
    finally:
        NAME_TO_OP.update(before)
