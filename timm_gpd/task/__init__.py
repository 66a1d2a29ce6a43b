"""Training tasks for timm's loop: Gap Preserving Distillation, and distillation from a static teacher alone."""

from .distillation import DistillationTask
from .ema_teacher import EmaTeacherConfig
from .gap_preserving import GapPreservingTask
from .given_teacher import StaticTeacherConfig
from .handing_over import hand_over

__all__ = ['DistillationTask', 'EmaTeacherConfig', 'GapPreservingTask', 'StaticTeacherConfig', 'hand_over']
