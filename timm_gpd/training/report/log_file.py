"""``train.log``: all that a run logs, in its folder."""

import logging
import traceback
from contextlib import suppress
from typing import Any, List, Optional, TextIO

from ...errors import NamedError, RunEnded

__all__ = ['LogFile']

_logger = logging.getLogger('train')


class LogFile(logging.Handler):
    """Keeps what is logged until it knows the file, then writes it there, in timm's format. A context of the run.

    So the file begins with what was logged before the run had a folder. A run that is continued adds to it. What ends
    the run is its last line, or the traceback there.

    Args:
        is_primary: whether this is the process that reports. In all others nothing is written.
    """

    def __init__(self, is_primary: bool = True) -> None:
        super().__init__()
        self.is_primary = is_primary
        self.setFormatter(logging.Formatter('%(asctime)s - %(name)20s: [%(levelname)8s] - %(message)s'))
        self.waiting: List[str] = []
        self.file: Optional[TextIO] = None
        self.has_failed = False

    def __enter__(self) -> 'LogFile':
        logging.root.addHandler(self)
        return self

    def __exit__(self, kind: Any, error: Optional[BaseException], trace: Any) -> None:
        logging.root.removeHandler(self)
        if error is not None:
            is_known = isinstance(error, (NamedError, RunEnded))
            text = str(error) if is_known else ''.join(traceback.format_exception(error)).strip()
            level = logging.INFO if isinstance(error, RunEnded) else logging.ERROR
            self.handle(_logger.makeRecord('train', level, '', 0, f'The run ended: {text}', (), None))
        self.close()

    def open(self, path: str) -> None:
        """Writes what has been logged so far, and from now on all that is.

        Args:
            path: of the file; it is continued where it is there.
        """
        if not self.is_primary:
            return
        with self.lock:
            try:
                self.file = open(path, 'a')
            except OSError as error:
                self._give_up(error)
                return
            waiting, self.waiting = self.waiting, []
            self._write(''.join(waiting))

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record) + '\n'
        if self.file is not None:
            self._write(text)
        elif not self.has_failed:
            self.waiting.append(text)

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # of a full disk: it has been said
                self.file.close()
            self.file = None
        super().close()

    def _write(self, text: str) -> None:
        assert self.file is not None
        try:
            self.file.write(text)
            self.file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """A run goes on without its log."""
        self.has_failed, self.waiting = True, []
        self.close()
        _logger.warning(f'train.log is not written any more: {error.strerror or error}')
