"""``--config``: default arguments from a YAML file, checked as a command line is."""

import argparse
import logging
import os
from typing import Any, Dict

import yaml
from timm.utils import ParseKwargs

from ...errors import UsageError
from .adversarial import fraction
from .refused import Refused

__all__ = ['read_config']

_logger = logging.getLogger('train')
# A run's args.yaml is a configuration. It notes versions, and may name the configuration that it came from.
_IGNORED = ('versions', 'config')


def read_config(path: str, parser: argparse.ArgumentParser) -> Dict[str, Any]:
    """Reads the arguments of a YAML file.

    Args:
        path: file of values by argument, with underscores: ``batch_size: 128``.
        parser: whose arguments these are. A value is checked by type and choices as on the command line, where a
            number may stand in quotes; ``nargs`` asks for a list, and ``NAME=VALUE`` arguments for a mapping.

    Returns:
        Values by argument. A key that is no argument is warned about and left out.

    Raises:
        UsageError: if the file is missing or no YAML mapping, or a value is none of its argument.
    """
    if not os.path.isfile(path):
        raise UsageError(f'config file {path} does not exist: check --config')
    try:
        with open(path) as file:
            config = yaml.safe_load(file) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f'config file {path} is not valid YAML: {" ".join(str(error).split())}')
    except OSError as error:
        raise UsageError(f'config file {path} cannot be read: {error.strerror}')
    if not isinstance(config, dict):
        raise UsageError(f'config file {path} is no mapping of arguments to values')
    actions = {action.dest: action for action in parser._actions if action.dest not in ('help', 'version')}
    unknown = [str(key) for key in config if key not in actions and key not in _IGNORED]
    if unknown:
        _logger.warning(f'config file {path}: no such arguments, ignored: {", ".join(sorted(unknown))}')
    values = {}
    for key, value in config.items():
        if key not in actions or key in _IGNORED:
            continue
        action = actions[key]
        if isinstance(action, Refused):
            if value != action.timm_default:
                action.refuse()
            continue
        try:
            values[key] = _checked(value, action)
        except ValueError as error:
            raise UsageError(f'config file {path}: {key} {error}, but is {value!r}')
    return values


def _checked(value: Any, action: argparse.Action) -> Any:
    if value is None or value == action.default == []:
        if action.default is None or value == []:
            return value
        raise ValueError('must have a value')
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ValueError('must be a mapping of names to values')
        return value
    if action.nargs == 0:  # a flag without a value
        if not isinstance(value, bool):
            raise ValueError('must be true or false')
        return value
    if action.nargs in ('+', '*') or isinstance(action.nargs, int):
        if not isinstance(value, list) or not value:
            raise ValueError('must be a list')
        if isinstance(action.nargs, int) and len(value) != action.nargs:
            raise ValueError(f'must be a list of {action.nargs}')
        return [_scalar(item, action) for item in value]
    return _scalar(value, action)


def _scalar(value: Any, action: argparse.Action) -> Any:
    kind: Any = action.type or str
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):  # YAML knows dates, too
        raise ValueError(f'must be {_NAMES[kind]}')
    try:
        if isinstance(value, float) and kind is int and not value.is_integer():
            raise ValueError
        found = kind(value)
    except (ValueError, OverflowError):
        raise ValueError(f'must be {_NAMES[kind]}')
    if action.choices is not None and found not in action.choices:
        raise ValueError(f'must be one of {", ".join(repr(choice) for choice in action.choices)}')
    return found


_NAMES = {
    int: 'an integer',
    float: 'a number',
    fraction: 'a number, or one over another',
    str: 'a name or a text',
}
