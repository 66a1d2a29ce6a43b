"""A command line as a value."""

import argparse
from typing import Any, NoReturn

__all__ = ['Arguments']


class Arguments(argparse.Namespace):
    """A command as it was given. Read-only: what is made of it is a value of its own, beside it."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f'arguments are read-only: {name} stays as it was given')

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f'arguments are read-only: {name} stays as it was given')
