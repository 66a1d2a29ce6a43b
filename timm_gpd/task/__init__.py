"""Training tasks for timm's loop: Gap Preserving Distillation, and distillation from a static teacher alone."""

from .adversary import setup_adversary
from .attack import Attack, create_attack
from .distillation import DistillationTask
from .ema_teacher import EmaTeacherConfig
from .gap_preserving import GapPreservingTask
from .given_teacher import StaticTeacherConfig
from .handing_over import hand_over

__all__ = [
    'Attack',
    'DistillationTask',
    'EmaTeacherConfig',
    'GapPreservingTask',
    'StaticTeacherConfig',
    'create_attack',
    'hand_over',
    'setup_adversary',
]
