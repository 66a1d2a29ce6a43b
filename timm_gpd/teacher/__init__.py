"""The dynamic teacher: one set of stored tensors that runs as a wide teacher and as the student inside it."""

from .dynamic_teacher import DynamicTeacher, JointOutput
from .inverse_reparameterization import expand
from .student_view import StudentView

__all__ = ['DynamicTeacher', 'JointOutput', 'StudentView', 'expand']
