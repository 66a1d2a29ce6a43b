"""What the package's programs share: one-line errors and exit codes."""

import argparse
import platform
import sys
import traceback
from typing import Callable, NoReturn

import timm
import torch

from .errors import NamedError, RunEnded, UsageError, why_unwritable
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
        the :class:`RunEnded`; 2 for a full disk; 130 for Ctrl-C; 1 for a bug, whose traceback is printed, with a
        request to report it.
    """
    try:
        main()
    except RunEnded as ending:
        if str(ending):
            print(f'{name}: {ending}', file=sys.stderr)
        return ending.exit_code
    except KeyboardInterrupt:
        print(f'{name}: interrupted', file=sys.stderr)
        return 130
    except NamedError as error:
        print(f'{name}: error: {error}', file=sys.stderr)
        return error.exit_code
    except Exception as error:
        reason = why_unwritable(error)
        if reason:
            where = getattr(error, 'filename', None)
            print(
                f'{name}: error: {f"{where}: " if where else ""}{reason}: what had been written before is as it was: '
                'make room; train.py goes on with --resume auto',
                file=sys.stderr,
            )
            return UsageError.exit_code
        traceback.print_exc()
        print(
            f'{name}: error: this was not expected: please report the lines above, with the versions timm-gpd '
            f'{__version__}, timm {timm.__version__}, torch {torch.__version__}, Python {platform.python_version()}',
            file=sys.stderr,
        )
        return 1
    return 0
