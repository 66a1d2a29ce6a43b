"""What the package's programs share: one-line errors and exit codes."""
import argparse
import sys
from typing import Callable, NoReturn

from .errors import UsageError

__all__ = ['Parser', 'run_program']


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f'{message} (see --help)')


def run_program(name: str, main: Callable[[], None]) -> int:
    """Runs a program's main function; prints what stops it on one line of stderr.

    Args:
        name: what the line starts with.
        main: the function.

    Returns:
        The exit code: 0 for success, 2 for what the user has to change (UsageError), 1 for a loss that diverged
        (FloatingPointError). Other errors pass.
    """
    try:
        main()
    except (UsageError, FloatingPointError) as error:
        print(f'{name}: error: {error}', file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0
