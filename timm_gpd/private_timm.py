"""Names of timm that are not part of its public API, all in one place. Checked with timm 1.0.31."""

from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint

__all__ = ['checkpoint', 'feature_take_indices']
