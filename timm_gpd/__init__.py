"""Gap Preserving Distillation (arXiv 2410.04140) as an extension of timm."""
from . import models
from .task.distillation import DistillationTask
from .teacher.dynamic_teacher import DynamicTeacher, expand
from .errors import UnsupportedModelError
from .plan import ExpansionPlan
from .expansion.planner import plan_expansion
from .rules import Rule, register_rule
from .task.gap_preserving import GapPreservingTask

__all__ = [
    'DistillationTask', 'DynamicTeacher', 'ExpansionPlan', 'GapPreservingTask', 'Rule', 'UnsupportedModelError',
    'expand', 'plan_expansion', 'register_rule',
]
