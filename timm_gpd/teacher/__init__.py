"""The dynamic teacher: one set of stored tensors that runs as a wide teacher and as the student inside it."""
from .dynamic_teacher import DynamicTeacher, StudentView, expand

__all__ = ['DynamicTeacher', 'StudentView', 'expand']
