"""Another view of a glyph, for a whole batch at once."""

from typing import Sequence

import torch
import torch.nn.functional as F

__all__ = ['augment']

# Each is drawn evenly between minus and plus what is said here, where nothing else is said.
_ROTATION = 0.35  # radians
_SHEAR = 0.3
_SCALE = 0.25  # of the logarithm of each side's factor
_SHIFT = 0.2  # share of half the side
_LOWEST_CONTRAST = 0.3  # between ink and ground, of 1
_HIGHEST_NOISE = 0.12  # deviation of a pixel, of 1
_NUMBERS = 9


def augment(images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Turns, shears, scales and shifts glyphs; draws ink and ground of other greys, either the lighter; adds noise.

    What becomes of an image depends on it and its seed alone, not on the others of its batch. One pass over the batch
    takes a fraction of the time of timm's transforms, which take image after image.

    Args:
        images: (B, H, W), uint8, white on black.
        seeds: one for each image.

    Returns:
        (B, H, W), uint8.
    """
    generator = torch.Generator()
    numbers, noise = torch.empty(len(images), _NUMBERS), torch.empty(images.shape)
    for row, seed in enumerate(seeds):
        generator.manual_seed(seed)
        torch.rand(_NUMBERS, generator=generator, out=numbers[row])
        torch.randn(images.shape[1:], generator=generator, out=noise[row])
    angle, shear, wide, high, right, down = (2 * numbers[:, :6] - 1).unbind(1)
    angle, shear = _ROTATION * angle, _SHEAR * shear
    wide, high = torch.exp(_SCALE * wide), torch.exp(_SCALE * high)
    cos, sin = angle.cos(), angle.sin()
    maps = torch.stack(
        [
            torch.stack([cos * wide, (shear * cos - sin) * high, _SHIFT * right], 1),
            torch.stack([sin * wide, (shear * sin + cos) * high, _SHIFT * down], 1),
        ],
        1,
    )
    grid = F.affine_grid(maps, [len(images), 1, *images.shape[1:]], align_corners=False)
    moved = F.grid_sample(images[:, None].float(), grid, align_corners=False)[:, 0]
    contrast, level, deviation = numbers[:, 6:, None, None].unbind(1)
    # The sign of what is drawn for the contrast says which of both is the lighter.
    contrast = 2 * contrast - 1
    contrast = torch.sign(contrast) * (_LOWEST_CONTRAST + (1 - _LOWEST_CONTRAST) * contrast.abs())
    ground = level * (1 - contrast.abs()) + (-contrast).clamp(min=0)
    drawn = 255 * (ground + _HIGHEST_NOISE * deviation * noise) + contrast * moved
    return drawn.round().clamp_(0, 255).to(torch.uint8)
