"""A command line as a value."""

import argparse
from typing import Any, Dict, NoReturn, Optional

__all__ = ['Arguments']


class Arguments(argparse.Namespace):
    """What a command says. Read-only: what a run makes of it is a value of its own, beside it.

    Args:
        given: the command as it was given, where arguments follow from others; default ``values``.
        values: every argument by name.

    Attributes:
        given: values of all arguments, each as the command, its configuration or the default has it.
    """

    __slots__ = ('given',)  # none of the arguments, which `vars` lists
    given: Dict[str, Any]

    def __init__(self, given: Optional[Dict[str, Any]] = None, **values: Any) -> None:
        self.__dict__.update(values)
        object.__setattr__(self, 'given', dict(values) if given is None else given)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f'arguments are read-only: {name} stays as it was given')

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f'arguments are read-only: {name} stays as it was given')
