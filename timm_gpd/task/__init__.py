"""Training tasks for timm's loop: Gap Preserving Distillation, and distillation from a static teacher alone."""

from .distillation import DistillationTask
from .gap_preserving import GapPreservingTask

__all__ = ['DistillationTask', 'GapPreservingTask']
