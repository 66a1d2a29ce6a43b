"""Errors of the package. Each is one line that says what is wrong and what to do."""
from contextlib import contextmanager
from typing import Iterator, Type

__all__ = ['NoClassifierError', 'UnsupportedModelError', 'UsageError', 'first_line', 'usage_errors']


class UnsupportedModelError(ValueError):
    """A model cannot be widened exactly: names the module, its class and the reason."""


class NoClassifierError(UnsupportedModelError):
    """A model has no logits that could be distilled."""


class UsageError(ValueError):
    """A script was given something that it cannot work with. Printed as one line; the script exits with code 2."""


@contextmanager
def usage_errors(advice: str, *kinds: Type[BaseException]) -> Iterator[None]:
    """Turns errors of the given kinds, from a library that was handed what the user typed, into a UsageError.

    Args:
        advice: what to do about it, appended to the first line of the error.
        *kinds: exception classes; default ValueError, RuntimeError, OSError, AssertionError.
    """
    try:
        yield
    except UsageError:
        raise
    except kinds or (ValueError, RuntimeError, OSError, AssertionError) as error:
        line = first_line(error)
        raise UsageError(f'{line} ({advice})' if advice else line) from error


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
