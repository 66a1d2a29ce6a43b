"""Students as people have them: in wrappers, and with classifiers that a model of their own does not tell."""

from typing import Any, Sequence, Set, Union

import torch.nn as nn

from ..errors import InputError, NoClassifierError
from ..private_torch import uncompiled
from .copies import blank_copy
from .images import accepted_input_shape, blank_images

__all__ = ['classifier_names', 'count_classes', 'unwrap_student']


def unwrap_student(model: nn.Module) -> nn.Module:
    """The model inside what ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` put around it.

    Raises:
        InputError: if it is no model.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model, nn.Module):
            inner = uncompiled(model)
            if inner is model:
                return model
            model = inner
        else:
            raise InputError(f'the student must be a model, an nn.Module, but is {model!r}')


def classifier_names(model: nn.Module, classifier: Union[str, Sequence[str], None] = None) -> Set[str]:
    """Names of the modules that produce class logits.

    Args:
        model: a student, without wrappers.
        classifier: their names (default: those of what the model's ``get_classifier()`` returns).

    Returns:
        The names; a module that has several has them all. Empty only if ``classifier`` is empty.

    Raises:
        NoClassifierError: if the model has no such modules, or they have no parameters.
    """
    if classifier is None:
        found = _registered(model)
        what = f'{type(model).__name__} has no classifier'
    else:
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        modules = dict(model.named_modules(remove_duplicate=False))
        missing = [name for name in names if name not in modules]
        if missing:
            raise NoClassifierError(
                f'{type(model).__name__} has no module {missing[0]!r}: check classifier={classifier!r}'
            )
        if not names:
            return set()
        found = [modules[name] for name in names]
        what = f'the classifier {classifier!r} of {type(model).__name__} has no parameters'
    wanted = {id(module) for module in found}
    names_of_all = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in wanted and any(True for _ in module.parameters())
    }
    if not names_of_all:
        raise NoClassifierError(
            f'{what}: create it with num_classes > 0 to distil logits, or name the modules that give them, as in '
            "classifier='fc'"
        )
    return names_of_all


def _registered(model: nn.Module) -> Sequence[nn.Module]:
    get_classifier: Any = getattr(model, 'get_classifier', None)
    classifiers = get_classifier() if get_classifier is not None else None
    classifiers = classifiers if isinstance(classifiers, (tuple, list)) else (classifiers,)
    return [module for module in classifiers if isinstance(module, nn.Module)]


def count_classes(model: nn.Module) -> int:
    """How many classes a model tells apart: its ``num_classes``, or the size of its logits.

    Args:
        model: a model of any kind, without wrappers.

    Returns:
        The number of classes.

    Raises:
        NoClassifierError: if it neither records the number nor runs on images without values.
    """
    recorded = getattr(model, 'num_classes', None)
    if isinstance(recorded, int):
        return recorded
    shape = accepted_input_shape(model)
    if shape is None:
        raise NoClassifierError(
            f'{type(model).__name__} does not tell how many classes it has: set its attribute num_classes'
        )
    copy = blank_copy(model).eval()
    return copy(blank_images(copy, shape)).shape[-1]
