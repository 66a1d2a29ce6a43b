"""Infers the expansion plan of a model from a shape-only dry run.

One idea: **a tensor widens when what it meets is wider.** The student runs once on the meta device, where nothing is
computed. Torch functions that its forward calls are seen on the way in. A weight, bias, norm or token that meets an
input wider than itself has just shown which of its axes carry channels, so it is replaced by a wider one, its own
output becomes wider, and the widening flows on to the classifier, which keeps its classes. Since functions are watched
rather than layer classes, a model that calls ``F.linear(x, self.qkv.weight)`` by hand is read as well as ``nn.Linear``.
What shapes cannot tell (head counts, split sizes) comes from :mod:`timm_gpd.rules`.

The run itself is in ``dry_run``, what happens to a function in ``functions``, what has become wider in ``widening``.
"""

from typing import Sequence, Set, Tuple, Union

import torch.nn as nn

from ..errors import InputError, UnsupportedModelError, first_line
from ..plan import ExpansionPlan
from .apply_rules import apply_rules, follow_children
from .copies import blank_copy
from .dry_run import dry_run
from .images import accepted_input_shape, error_with, has_record, input_shape
from .parametrizations import refuse_parametrizations
from .student import classifier_names, unwrap_student
from .timm_records import widen_records
from .widening import Widening

__all__ = ['plan_expansion']


def plan_expansion(
    student: nn.Module,
    ratio: int = 2,
    classifier: Union[str, Sequence[str], None] = None,
) -> ExpansionPlan:
    """Plans how every tensor and attribute of a student widens; allocates neither a student nor a teacher.

    Args:
        student: a timm model with a classifier, or any model whose ``classifier`` is named. It is not modified. What
            ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel`` put around it is looked through.
        ratio: expansion ratio r of the channels, a positive integer.
        classifier: dotted names of the modules whose outputs are logits, such as ``'fc'``; one or several (default:
            what the model's ``get_classifier()`` returns). An empty sequence: the model gives features, which widen.

    Returns:
        The plan; ``print(plan)`` shows it.

    Raises:
        ValueError: if ``ratio`` is not a positive integer.
        NoClassifierError: if the model has no classifier; a kind of UnsupportedModelError.
        UnsupportedModelError: if a module cannot be widened.
    """
    if not isinstance(ratio, int) or isinstance(ratio, bool) or ratio < 1:
        raise InputError(f'ratio must be a positive integer, but is {ratio!r}')
    student = unwrap_student(student)
    classifiers = classifier_names(student, classifier)
    refuse_parametrizations(student)
    shape = input_shape(student)
    if has_record(student):
        try:
            return _plan(student, ratio, classifiers, shape)
        except UnsupportedModelError:
            accepted = accepted_input_shape(student)
            if accepted == shape:
                raise
    else:
        accepted = accepted_input_shape(student)
    if accepted is not None:
        return _plan(student, ratio, classifiers, accepted)
    accepted = accepted_input_shape(student, device='cpu')
    if accepted is None:
        error = error_with(blank_copy(student, 'cpu').eval(), shape, 'cpu')
        raise UnsupportedModelError(
            f'{type(student).__name__} runs on no images that were tried (with {shape}: {type(error).__name__}: '
            f'{first_line(error)}): say which it takes, as attributes of the model: in_chans and img_size, or '
            "pretrained_cfg = {'input_size': (channels, height, width)}"
        )
    note = f'planned on the CPU: the forward of {type(student).__name__} does not run on the meta device'
    return _plan(student, ratio, classifiers, accepted, device='cpu', notes=(note,))


def _plan(
    student: nn.Module,
    ratio: int,
    classifiers: Set[str],
    shape: Tuple[int, int, int],
    device: str = 'meta',
    notes: Tuple[str, ...] = (),
) -> ExpansionPlan:
    widening = Widening(student, ratio, kept=classifiers, device=device)
    apply_rules(widening)
    dry_run(widening, shape)
    follow_children(widening)
    widen_records(widening)
    return ExpansionPlan(
        ratio, widening.tensors, widening.attributes, widening.divided_inputs, notes, input_shape=shape
    )
