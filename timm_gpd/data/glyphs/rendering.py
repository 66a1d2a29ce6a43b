"""Glyphs as small images."""

from typing import Dict, Optional, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .classes import CLASSES
from .fonts import Face

__all__ = ['render_face']

_SUPERSAMPLING = 4  # pixels of the font's em for each of the image's side
_MARGIN = 1 / 7  # share of the side on either side of a glyph, which augmentation moves it into
_NEVER_A_CHARACTER = '\U0010ffff'


def render_face(face: Face, size: int) -> Dict[int, np.ndarray]:
    """Draws all characters that a face has.

    Each is scaled so that its longer side fills the box, and centred: fonts differ in size for the same number of
    points, and what is left is the shape.

    Args:
        face: the face.
        size: side of an image in pixels.

    Returns:
        Images (size, size), uint8, white on black, by index of the class. Of a character that the font lacks, for
        which it draws nothing or its sign for missing ones, there is none.
    """
    font = ImageFont.truetype(face.path, _SUPERSAMPLING * size, face.index, layout_engine=ImageFont.Layout.BASIC)
    missing = _key(_draw(font, _NEVER_A_CHARACTER))
    images = {}
    for target, character in enumerate(CLASSES):
        drawn = _draw(font, character)
        if drawn is not None and _key(drawn) != missing:
            images[target] = _fit(drawn, size)
    return images


def _draw(font: ImageFont.FreeTypeFont, character: str) -> Optional[Image.Image]:
    """A character, cropped to its ink; None where there is none."""
    try:
        left, top, right, bottom = font.getbbox(character)
        width, height = round(right - left), round(bottom - top)
        if not 0 < width * height < (32 * font.size) ** 2:
            return None
        image = Image.new('L', (width, height))
        ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=font)
    except (OSError, ValueError):  # a broken outline
        return None
    ink = image.getbbox()
    return None if ink is None else image.crop(ink)


def _key(image: Optional[Image.Image]) -> Optional[Tuple[Tuple[int, int], bytes]]:
    return None if image is None else (image.size, image.tobytes())


def _fit(image: Image.Image, size: int) -> np.ndarray:
    box = size - 2 * round(size * _MARGIN)
    scale = box / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    fitted = Image.new('L', (size, size))
    fitted.paste(image.resize((width, height), Image.Resampling.BILINEAR), ((size - width) // 2, (size - height) // 2))
    return np.asarray(fitted)
