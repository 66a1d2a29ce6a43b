"""Errors of the package. Each is one line that says what is wrong and what to do."""

import traceback
from contextlib import contextmanager
from typing import Iterator, Type

__all__ = [
    'InputError',
    'NamedError',
    'NoClassifierError',
    'RunEnded',
    'UnsupportedModelError',
    'UsageError',
    'WeightsError',
    'first_line',
    'is_bug',
    'usage_errors',
]


class NamedError(Exception):
    """What this package raises knowingly: all else that comes out of its code is a bug.

    Attributes:
        exit_code: of a program that it ends.
    """

    exit_code = 1


class InputError(NamedError, ValueError):
    """An argument is out of range, or two things that were given do not fit together."""


class WeightsError(NamedError, RuntimeError):
    """A variant's weights are not there, or cannot be fetched or read."""


class UnsupportedModelError(InputError):
    """A model cannot be widened exactly: names the module, its class and the reason."""


class NoClassifierError(UnsupportedModelError):
    """A model has no logits that could be distilled."""


class UsageError(NamedError, ValueError):
    """A script was given something that it cannot work with. Printed as one line; the script exits with code 2."""

    exit_code = 2


class RunEnded(Exception):
    """A run ended early, as it was told to. Printed as one line.

    Args:
        message: where it stands and how it goes on.
        exit_code: of the program.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def usage_errors(advice: str, *kinds: Type[Exception]) -> Iterator[None]:
    """Turns errors about what the user typed into a UsageError. A bug of this package passes as it is.

    Args:
        advice: what to do about it, appended to the first line of the error.
        *kinds: what else to catch besides this package's :class:`NamedError`: classes that a library which is handed
            what the user typed raises. Where they come out of this package's own code they are bugs, see
            :func:`is_bug`.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if not isinstance(error, (NamedError, *kinds)) or is_bug(error):
            raise
        line = first_line(error)
        raise UsageError(f'{line} ({advice})' if advice else line) from error


def is_bug(error: BaseException) -> bool:
    """Whether an error was raised by a line of this package that did not mean to."""
    if isinstance(error, NamedError):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get('__name__')).startswith(f'{__package__}.')


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
