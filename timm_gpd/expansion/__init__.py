"""How a student widens: the plan, inferred from a dry run, and the numeric check of it."""

from .planner import plan_expansion
from .verify import verify_plan

__all__ = ['plan_expansion', 'verify_plan']
