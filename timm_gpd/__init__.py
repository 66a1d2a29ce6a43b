"""Gap Preserving Distillation (arXiv 2410.04140) as an extension of timm."""

from . import models
from .errors import UnsupportedModelError
from .expansion import plan_expansion
from .plan import ExpansionPlan
from .rank import rank_students
from .rules import Rule, register_rule
from .task import DistillationTask, EmaTeacherConfig, GapPreservingTask, StaticTeacherConfig, hand_over
from .teacher import DynamicTeacher, expand

__all__ = [
    'DistillationTask',
    'DynamicTeacher',
    'EmaTeacherConfig',
    'ExpansionPlan',
    'GapPreservingTask',
    'Rule',
    'StaticTeacherConfig',
    'UnsupportedModelError',
    'expand',
    'hand_over',
    'plan_expansion',
    'rank_students',
    'register_rule',
]
