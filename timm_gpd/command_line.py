"""What the package's programs share: one-line errors and exit codes."""

import argparse
import platform
import sys
import traceback
from typing import Callable, NoReturn

import timm
import torch

from .errors import NamedError, RunEnded, UsageError
from .version import __version__

__all__ = ['Parser', 'flag_of', 'run_program']


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f'{message} (see --help)')


def flag_of(name: str) -> str:
    """How an argument is spelt on the command line."""
    return '--' + name.replace('_', '-')


def run_program(name: str, main: Callable[[], None]) -> int:
    """Runs a program's main function; prints what stops it on one line of stderr.

    Args:
        name: what the line starts with.
        main: the function.

    Returns:
        The exit code: 0 for success; that of the :class:`NamedError`, such as 2 for what the user has to change, or of
        the :class:`RunEnded`; 1 for a bug, whose traceback is printed, with a request to report it.
    """
    try:
        main()
    except RunEnded as ending:
        print(f'{name}: {ending}', file=sys.stderr)
        return ending.exit_code
    except NamedError as error:
        print(f'{name}: error: {error}', file=sys.stderr)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        print(
            f'{name}: error: this was not expected: please report the lines above, with the versions timm-gpd '
            f'{__version__}, timm {timm.__version__}, torch {torch.__version__}, Python {platform.python_version()}',
            file=sys.stderr,
        )
        return 1
    return 0
