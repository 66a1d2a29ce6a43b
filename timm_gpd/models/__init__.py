"""Models that importing this package adds to timm's registry."""
from . import variants
