"""Which families count: those that have enough characters, and one of those that share their Latin letters."""

from dataclasses import dataclass
from typing import Dict, List, Mapping, Sequence, Tuple

import numpy as np

from .classes import CLASSES
from .fonts import Face
from .rendering import render_face

__all__ = ['DrawnFace', 'Family', 'choose_families']

# Squared difference of two images over the sum of their squares: 0 for equal ones, 1 where no ink overlaps. Measured
# over all pairs of 581 regular faces: one design of two foundries is up to 0.06 apart (Nimbus Mono and TeX Gyre
# Cursor), two designs are from 0.065 on (DejaVu Sans and Noto Sans).
_SAME_DESIGN = 0.06
_SAME_GLYPH = 0.03
# Families with pictures or parts of letters in the places of characters, found by looking at those that are least like
# the others.
_PICTURES = (
    '90 Stars BRK',
    'Bit Blocks TTF BRK',
    'D050000L',
    'Entangled Layer B BRK',
    'Faux Snow BRK',
    'Head-Ding Maker BRK',
    'Line Dings BRK',
    'Symmetry BRK',
    'cmex10',
    'cmsy10',
)
_LETTERS = [target for target, character in enumerate(CLASSES) if character.isascii() and character.isalpha()]


@dataclass(frozen=True)
class DrawnFace:
    """A face and its glyphs.

    Attributes:
        face: the face.
        images: (size, size), uint8, by index of the class.
    """

    face: Face
    images: Dict[int, np.ndarray]


@dataclass(frozen=True)
class Family:
    """A family and those of its faces that differ.

    Attributes:
        name: of the family.
        faces: the regular one first, where there is one.
    """

    name: str
    faces: Tuple[DrawnFace, ...]


def choose_families(
    faces: Mapping[str, Sequence[Face]], size: int, min_share: float
) -> Tuple[List[Family], Dict[str, str]]:
    """Draws families, and leaves out those that lack characters or look like another one.

    What is compared are images, not names: of Noto's families for many scripts with one Latin design, and of clones of
    one typeface, that with the most characters stays. A character that looks like one before it in the same face is
    left out, as are small letters of fonts that have capitals alone.

    Args:
        faces: by family, as :func:`choose_faces` gives them.
        size: side of an image in pixels.
        min_share: share of the classes that a face has at least.

    Returns:
        The families in the order of their names, and the reason by name for each that was left out.
    """
    families, left_out = [], {}
    for name, of_family in faces.items():
        if name in _PICTURES:
            left_out[name] = 'pictures'
            continue
        drawn = [DrawnFace(face, _without_look_alikes(render_face(face, size))) for face in of_family]
        usable = tuple(face for face in drawn if len(face.images) >= min_share * len(CLASSES))
        if usable:
            families.append(Family(name, usable))
        else:
            most = max(len(face.images) for face in drawn)
            left_out[name] = f'{most} of {len(CLASSES)} characters'
    families.sort(key=lambda family: (-max(len(face.images) for face in family.faces), family.name))
    kept = _without_twins(families, size, left_out)
    return sorted(kept, key=lambda family: family.name), dict(sorted(left_out.items()))


def _without_look_alikes(images: Dict[int, np.ndarray]) -> Dict[int, np.ndarray]:
    if not images:
        return images
    pixels = np.stack([image.ravel() for image in images.values()]).astype(np.float64)
    squares = (pixels**2).sum(1)
    energy = squares[:, None] + squares
    kept = _first_of_each(energy - 2 * pixels @ pixels.T < _SAME_GLYPH * energy)
    return {target: image for index, (target, image) in enumerate(images.items()) if index in kept}


def _first_of_each(same: np.ndarray) -> List[int]:
    """Indices that are not the same as one that is kept before them."""
    kept: List[int] = []
    for index, row in enumerate(same):
        if not row[kept].any():
            kept.append(index)
    return kept


def _without_twins(families: List[Family], size: int, left_out: Dict[str, str]) -> List[Family]:
    """Families of which no face looks like one of a family before them, each without faces that look alike."""
    owners = [family for family in families for _ in family.faces]
    near = _design_distances([face for family in families for face in family.faces], size) < _SAME_DESIGN
    kept: Dict[str, Family] = {}
    places: List[int] = []  # of the faces that are kept
    first = 0
    for family in families:
        own = range(first, first + len(family.faces))
        first = own.stop
        twin = next((owners[place].name for place in places if near[own, place].any()), None)
        if twin is not None:
            left_out[family.name] = f'letters of {twin}'
            continue
        distinct = _first_of_each(near[own.start : own.stop, own.start : own.stop])
        kept[family.name] = Family(family.name, tuple(family.faces[index] for index in distinct))
        places += [own[index] for index in distinct]
    return list(kept.values())


def _design_distances(faces: List[DrawnFace], size: int) -> np.ndarray:
    """How far the letters of faces lie apart (F, F), over those that both have: 1 where there are none.

    Pixels are integers, of which float64 adds up as many without rounding: the same families come out everywhere.
    """
    pixels = np.zeros((len(faces), len(_LETTERS), size * size))
    has = np.zeros((len(faces), len(_LETTERS)))
    for row, face in enumerate(faces):
        for column, target in enumerate(_LETTERS):
            if target in face.images:
                pixels[row, column], has[row, column] = face.images[target].ravel(), 1
    energy = np.einsum('flp,flp->fl', pixels, pixels) @ has.T
    energy += energy.T.copy()
    flat = pixels.reshape(len(faces), -1)
    return np.where(energy > 0, (energy - 2 * (flat @ flat.T)) / np.maximum(energy, 1), 1)
