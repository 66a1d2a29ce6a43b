"""Command lines of ``train.py`` and ``validate.py``: timm's flag names and defaults, plus ``--gpd``.

A file here is a group of flags; ``docs/flags.md`` lists them all.
"""

from .arguments import Arguments
from .parse import parse_train_args, parse_validate_args, train_parser, validate_parser

__all__ = ['Arguments', 'parse_train_args', 'parse_validate_args', 'train_parser', 'validate_parser']
