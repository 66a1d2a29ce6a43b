"""Folders on this machine that a command reads or writes."""

import os

from ..errors import UsageError
from ..student_folder import CARD, CONFIG, WEIGHTS

__all__ = ['check_free', 'check_student']


def check_student(folder: str, name: str) -> None:
    """Checks that a folder holds a student.

    Args:
        folder: the folder.
        name: what the error calls it.

    Raises:
        UsageError: if it lacks the weights, the config or the card.
    """
    missing = [file for file in (WEIGHTS, CONFIG, CARD) if not os.path.isfile(os.path.join(folder, file))]
    if missing:
        raise UsageError(f'{name} is no student: it has no {" and no ".join(missing)}')


def check_free(folder: str) -> None:
    """Checks that a folder may be written.

    Args:
        folder: the folder.

    Raises:
        UsageError: if it is there and not empty.
    """
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise UsageError(f'{folder} exists: choose another folder')
