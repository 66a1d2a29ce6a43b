"""Inverse reparameterization: how a dynamic teacher is made from a student (Sec. 3.2 of arXiv 2410.04140)."""

from typing import Optional, Sequence, Union

import torch.nn as nn

from ..errors import InputError
from ..expansion import plan_expansion, verify_plan
from ..expansion.student import unwrap_student
from .branches import branch_kinds
from .dynamic_teacher import DynamicTeacher, check_storage
from .rehearsal import rehearse

__all__ = ['expand']


def expand(
    student: nn.Module,
    ratio: int = 2,
    num_branches: int = 1,
    noise: Optional[float] = None,
    scale: str = 'student',
    branches: Optional[Sequence[str]] = None,
    classifier: Union[str, Sequence[str], None] = None,
) -> DynamicTeacher:
    """Builds the dynamic teacher of a student by inverse reparameterization (Sec. 3.2 of arXiv 2410.04140).

    The teacher starts as exactly the student's function. This is checked on a random batch in float64, with randomised
    weights, in evaluation and in training mode, before anything is returned: for a moment the CPU holds both models in
    float64, about 8 (1 + r^2) bytes for each of the student's parameters, besides activations of four small images.
    Then what is returned runs itself, see :func:`timm_gpd.teacher.rehearsal.rehearse`.

    Args:
        student: a timm model with a classifier, or any model whose ``classifier`` is named; wrappers are looked
            through. It is not modified.
        ratio: expansion ratio r of the channels.
        num_branches: branches per convolution, 1 to 6 (the paper's); 1 is a plain convolution.
        noise: standard deviation, relative to each weight's own, of noise that tells replicas apart without changing
            the teacher's function or the student (default: 0.1 if r > 2, else 0). Replica 0 receives the student's
            gradient, too; exact replicas besides it receive equal gradients for ever, and a teacher of r > 2 without
            noise is no wider than one of r = 2.
        scale: what is stored. ``'student'`` stores the student's own weights in replica 0, and the student's learning
            rate and weight decay mean what they mean in plain training. ``'teacher'`` (the authors') stores the
            teacher's weights, and the student's are r times a slice of them. ``'balanced'`` stores the student's in
            replica 0 and the teacher's elsewhere, and both models learn at the rate that they would have alone, see
            ``share_weight`` of :class:`timm_gpd.GapPreservingTask`; without branches.
        branches: names the kinds of branch instead of their number, see ``timm_gpd.teacher.branches.BRANCH_KINDS``.
        classifier: dotted names of the modules that give logits, where the model has no ``get_classifier()``, see
            :func:`timm_gpd.plan_expansion`.

    Returns:
        The dynamic teacher, on the student's device, in its dtype and mode.

    Raises:
        ValueError: if an argument is out of range.
        UnsupportedModelError: if a module cannot be widened exactly.
    """
    kinds = branch_kinds(num_branches, branches)
    check_storage(scale, noise, kinds)
    student = unwrap_student(student)
    if isinstance(student, DynamicTeacher):
        raise InputError('this is a dynamic teacher already: give the plain student, as extract_student() returns it')
    plan = plan_expansion(student, ratio, classifier)
    verify_plan(student, plan)
    dynamic_teacher = DynamicTeacher(student, plan, noise=noise, scale=scale, branches=kinds)
    rehearse(dynamic_teacher, student)
    return dynamic_teacher
