"""What a module's forward does not say by itself.

The planner (:mod:`timm_gpd.expansion.planner`) reads nearly everything off a dry run: a tensor widens when what it
meets is wider. A rule adds what shapes alone cannot tell: integers that count heads or channels, axes replicated in
blocks, children that mix something other than channels. Rules know no training; most are data.
"""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Type, Union

import torch.nn as nn

from .context import RuleContext

__all__ = ['Rule', 'find_rule', 'register_rule']

Block = Union[int, str, Callable[[Any], int]]  # a function of the module, whatever its class


@dataclass(frozen=True)
class Rule:
    """How one class of module widens, beyond what its forward shows.

    Names are relative to the module and may be dotted, with ``*`` for any child and '' for the module itself; those
    that an instance lacks are skipped, so that one rule serves every class that is built alike.

    Attributes:
        multiply: attributes that are multiplied by the ratio: integers, or tuples and lists of integers.
        divide: number attributes that are divided by the ratio.
        blocks: ``'<child>.in'``, ``'<child>.out'`` or an own ``'<parameter>'`` -> the run of entries that is replicated
            as a whole on that axis: a number, an attribute of the module, or a function of the module. For a child
            that is no layer itself it holds for the layers inside, wherever it divides their axis.
        params: own parameter or buffer -> its channel axis, or a tuple of them.
        keep: children that keep their width, such as those that mix tokens.
        follow: own attribute -> a child's, dotted, that it repeats, or several of which the first that is there counts.
            For sizes that are kept as numbers and that forward does not use, such as those of a fused layer to come.
        code: for what data cannot say: a function of a :class:`RuleContext`, called after the rest of the rule and
            before the dry run.
    """

    multiply: Tuple[str, ...] = ()
    divide: Tuple[str, ...] = ()
    blocks: Mapping[str, Block] = field(default_factory=dict)
    params: Mapping[str, Union[int, Tuple[int, ...]]] = field(default_factory=dict)
    keep: Tuple[str, ...] = ()
    follow: Mapping[str, Union[str, Tuple[str, ...]]] = field(default_factory=dict)
    code: Optional[Callable[[RuleContext], None]] = None


_RULES: Dict[str, Rule] = {}


def register_rule(module_class: Union[str, Type[nn.Module]], rule: Rule) -> Rule:
    """Tells the planner how a class of module widens.

    Args:
        module_class: the class, or its qualified name (``'timm.models.levit.Attention'``), which imports nothing.
            Subclasses inherit the rule unless they have one of their own. A rule that the class had is replaced.
        rule: what the class's forward does not say by itself.

    Returns:
        The rule.

    Example:
        >>> class HeadMixer(nn.Module):
        ...     def forward(self, x):  # x: (B, N, C)
        ...         return self.mix(x.unflatten(-1, (self.num_heads, -1)).mean(2))
        >>> register_rule(HeadMixer, Rule(multiply=('num_heads',)))
    """
    _RULES[module_class if isinstance(module_class, str) else _qualified_name(module_class)] = rule
    return rule


def find_rule(module: nn.Module) -> Optional[Rule]:
    """The rule of a module.

    Args:
        module: a module of any class.

    Returns:
        The rule of its class, or of the nearest base class that has one; None if there is none.
    """
    for cls in type(module).__mro__:
        rule = _RULES.get(_qualified_name(cls))
        if rule is not None:
            return rule
    return None


def _qualified_name(cls: type) -> str:
    return f'{cls.__module__}.{cls.__qualname__}'
