"""Files that are replaced as a whole."""

import csv
import glob
import os
import tempfile
from contextlib import contextmanager, suppress
from typing import Any, Iterator, List, Mapping, Sequence, TextIO

__all__ = ['find_files', 'remove_partial_files', 'replaced_file', 'write_csv']

PARTIAL = '.partial'


def find_files(folder: str, pattern: str) -> List[str]:
    """Paths of the files in a folder, whatever its name, whose names match a pattern such as ``*.csv``."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))


def remove_partial_files(folder: str) -> None:
    """Removes what was being written to a folder when its writer was killed."""
    for path in find_files(folder, f'.*{PARTIAL}'):
        with suppress(FileNotFoundError):
            os.remove(path)


@contextmanager
def replaced_file(path: str) -> Iterator[str]:
    """Gives a hidden file beside ``path`` to write, which takes its place if nothing was raised.

    So whoever reads, and whoever is killed while writing, sees the old file or the whole new one.

    Args:
        path: what is written or replaced.

    Raises:
        OSError: if the folder cannot be written. The old file stays as it is.
    """
    folder, name = os.path.split(os.path.abspath(path))
    handle, partial = tempfile.mkstemp(prefix=f'.{name}-', suffix=PARTIAL, dir=folder)
    os.close(handle)
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)  # as of any new file; mkstemp's are for their owner alone
        yield partial
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(partial)


def write_csv(file: TextIO, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Writes rows, values by column, under a row of the columns' names."""
    writer = csv.DictWriter(file, fieldnames=columns)
    writer.writeheader()
    writer.writerows(rows)
