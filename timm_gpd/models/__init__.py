"""Models that importing this package adds to timm's registry."""

from . import (
    rvt,
    variants,  # last: it makes a variant of everything that is registered
)
