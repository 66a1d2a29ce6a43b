"""What a module's forward does not say by itself, one file for each kind of reason."""
from . import attention, channels, substitutes, tokens, weights
from .rule import Rule, find_rule, register_rule
