"""Tells a student in the dry run what the rules of its modules say, before it runs."""

from typing import Any, Callable, Sequence

import torch

from ..private_torch import tree_map_only
from ..rules import Rule, RuleContext, find_rule
from ..rules.context import find_axes, find_children, join
from .widening import Widening

__all__ = ['apply_rules', 'follow_children']


def apply_rules(widening: Widening) -> None:
    """Applies the rule of every module that has one; those around a module come before it.

    Args:
        widening: the student in the dry run, which has not run yet.

    Raises:
        UnsupportedModelError: if a rule contradicts the module.
    """
    for name, module in widening.modules.items():
        rule = find_rule(module)
        if rule is not None:
            widening.running = [name]
            _apply(widening, name, rule)
    widening.running = ['']
    widening.ruled.update(widening.tensors)


def follow_children(widening: Widening) -> None:
    """Lets attributes that repeat a child's take its new value.

    Args:
        widening: the student in the dry run, which has run.
    """
    for name, module in widening.modules.items():
        rule = find_rule(module)
        for attribute, targets in rule.follow.items() if rule is not None else ():
            _follow(widening, name, attribute, (targets,) if isinstance(targets, str) else targets)


def _follow(widening: Widening, name: str, attribute: str, targets: Sequence[str]) -> None:
    for target in targets:
        path, _, key = target.rpartition('.')
        for child in find_children(widening.modules[name], path):
            before, after = widening.attributes.get(join(name, child), {}).get(key, (None, None))
            if before is not None and getattr(widening.modules[name], attribute, None) == before:
                widening.set_attribute(name, attribute, after)
                return


def _apply(widening: Widening, name: str, rule: Rule) -> None:
    module, ratio = widening.modules[name], widening.ratio
    for target, block in rule.blocks.items():
        size = block(module) if callable(block) else getattr(module, block) if isinstance(block, str) else block
        for path, side in find_axes(module, target):
            widening.describe(join(name, path), side, size)
    for pattern in rule.keep:
        widening.kept.update(join(name, child) for child in find_children(module, pattern))
    for attribute in rule.multiply:
        _change_attribute(widening, name, attribute, lambda value: value * ratio)
    for attribute in rule.divide:
        _change_attribute(widening, name, attribute, lambda value: value / ratio)
    for key, axes in rule.params.items():
        tensor = getattr(module, key, None)
        if isinstance(tensor, torch.Tensor):
            widening.widen(
                tensor,
                {
                    axis: widening.axis(tensor, '', tensor.shape[axis], ratio)
                    for axis in ((axes,) if isinstance(axes, int) else axes)
                },
            )
    if rule.code is not None:
        rule.code(RuleContext(widening, name, module))


def _change_attribute(widening: Widening, name: str, attribute: str, change: Callable[[Any], Any]) -> None:
    """Changes a number, or every number in a tuple or list, that is an attribute of a module; None stays."""
    path, _, attribute = attribute.rpartition('.')
    for child in find_children(widening.modules[name], path):
        owner = join(name, child)
        value = getattr(widening.modules[owner], attribute, None)
        if value is not None:
            widening.set_attribute(owner, attribute, tree_map_only((int, float), change, value))
