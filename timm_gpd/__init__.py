from .dynamic_teacher import DynamicTeacher, expand
from .errors import UnsupportedModelError
from .plan import ExpansionPlan
from .planner import plan_expansion
