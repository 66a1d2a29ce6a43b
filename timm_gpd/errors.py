"""Errors of the package. Each is one line that says what is wrong and what to do."""

import errno
import math
import os
import pickle
import re
import traceback
from contextlib import contextmanager
from typing import Iterator, Optional, Sequence, Type

__all__ = [
    'DataError',
    'LIBRARY_ERRORS',
    'InputError',
    'NamedError',
    'NoClassifierError',
    'RunEnded',
    'UnsupportedModelError',
    'UsageError',
    'WeightsError',
    'check_number',
    'first_of',
    'first_line',
    'is_bug',
    'one_line',
    'usage_errors',
    'why_unwritable',
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


class DataError(UsageError):
    """Images or labels are not what they should be.

    A worker process raises it with the text of its traceback in front, which ends with the message: that alone is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rpartition(f'{type(self).__name__}: ')[2])


def check_number(name: str, value: object) -> None:
    """Refuses what is no finite number.

    Raises:
        InputError: says what it is of.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f'{name} must be a finite number, but is {value!r}')


# What torch and timm raise of names, arguments and files that they are handed.
LIBRARY_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    OSError,
    AssertionError,
    LookupError,
    EOFError,
    pickle.UnpicklingError,
)


@contextmanager
def usage_errors(advice: str, *kinds: Type[Exception]) -> Iterator[None]:
    """Turns errors about what the user typed into a UsageError. A bug of this package passes as it is.

    Args:
        advice: what to do about it, appended to what the error says.
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
        line = one_line(error)
        raise UsageError(f'{line} ({advice})' if advice else line) from error


def is_bug(error: BaseException) -> bool:
    """Whether an error was raised by a line of this package that did not mean to."""
    if isinstance(error, NamedError):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get('__name__')).startswith(f'{__package__}.')


def why_unwritable(error: BaseException) -> Optional[str]:
    """What an error, or one behind it, says of a file system that takes no more; None if it is about something else."""
    cause: Optional[BaseException] = error
    while cause is not None:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            # safetensors has an error of its own, which quotes the system's
            if getattr(cause, 'errno', None) == number or os.strerror(number) in str(cause):
                return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return None


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException, names: int = 3, length: int = 600) -> str:
    """All that an error says, on one line: lists of names, such as keys of a checkpoint, are shortened.

    Args:
        error: the error.
        names: how many names of a list stay.
        length: characters that stay of what is longer nevertheless; its end is kept too.
    """
    text = ' '.join(str(error).split()) or type(error).__name__
    text = re.sub(r'^Error\(s\) in loading state_dict for \w+: ', '', text)
    text = re.sub(r'"[^"\s]+"(?:, "[^"\s]+")+', lambda found: first_of(found[0].split(', '), names), text)
    each = ' size mismatch for '
    text = re.sub(r'size mismatch for .*', lambda found: first_of(found[0].split(each), 2, each), text)
    return text if len(text) <= length else f'{text[: length * 2 // 3]} ... {text[-length // 3 :]}'


def first_of(names: Sequence[str], count: int = 5, separator: str = ', ') -> str:
    """The first of some names, and how many there are more."""
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return separator.join(names[:count]) + more
