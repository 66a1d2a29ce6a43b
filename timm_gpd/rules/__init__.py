"""What a module's forward does not say by itself, one file for each kind of reason."""
from . import attention
from . import channels
from . import substitutes
from . import tokens
from . import weights
from .rule import Rule, find_rule, register_rule
