"""What a module's forward does not say by itself, one file for each kind of reason."""

from . import attention_heads, channels, later_layers, substitutes, tokens, weights
from .context import RuleContext
from .rule import Rule, find_rule, register_rule

__all__ = ['Rule', 'RuleContext', 'find_rule', 'register_rule']
