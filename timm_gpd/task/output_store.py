"""Rows of bytes on disk under keys of 128 bits, memory-mapped, for any number of processes that write at once.

A store is a folder of segments. A process writes into segments of its own, whose names nobody else has, and so needs no
lock; it reads all of them, also while they grow. A segment is three files of one name::

    <name>.json  what its rows consist of
    <name>.rows  rows of one length, one behind the other
    <name>.keys  for each of them its key and a checksum

A row is written before its key, so that one without a key is not there: whoever is killed leaves whole rows, and
perhaps the beginning of one, which nobody reads. The checksum finds what a machine that lost its power has not written.
Files only grow by being written to, never by being mapped, so a full disk is an error that can be caught.
"""

import contextlib
import json
import logging
import os
import secrets
import tempfile
import zlib
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from ..errors import InputError

__all__ = ['KEY_BYTES', 'FoundRows', 'OutputStore']

_logger = logging.getLogger(__name__)

_KEY = np.dtype([('key', '<u8', 2), ('checksum', '<u4'), ('', '<u4')])
KEY_BYTES = _KEY.itemsize  # that a row takes besides its own
_ROW_BITS = 40  # of a place, whose other bits are the segment's number
_FEW = 2**14  # keys that a dictionary holds before they are sorted


class FoundRows(NamedTuple):
    """What a store holds of some keys.

    Attributes:
        kind: what the rows consist of; None if none was found.
        rows: shape (B, bytes of a row), uint8; undefined where nothing was found.
        found: shape (B,), whether a row was found.
    """

    kind: Any
    rows: np.ndarray
    found: np.ndarray


class OutputStore:
    """A folder of rows.

    Args:
        folder: made if it is not there.
        description: says in ``about.json``, for people, what the rows are of.

    Raises:
        InputError: if the folder cannot be made or read.
    """

    def __init__(self, folder: str, description: Dict[str, Any]) -> None:
        self.folder, self.description = folder, description
        self.problem = ''  # why nothing more is stored
        self._segments: Dict[str, _Segment] = {}
        self._own: Dict[Tuple[int, str], _Segment] = {}  # by process, as it may be forked, and kind of their rows
        self._index = _Index()
        try:
            if not os.path.isdir(folder):
                os.makedirs(folder, exist_ok=True)
                _write_text(folder, 'about.json', json.dumps(description, indent=1))
            self._refresh()
        except OSError as error:
            raise InputError(f'the store {folder} cannot be used: {error.strerror}; choose another folder') from error

    def __len__(self) -> int:
        """Rows that are known, those that several processes have written at once several times."""
        return sum(segment.count for segment in self._segments.values())

    def __reduce__(self) -> Tuple[Any, ...]:
        """A copy is another writer, with segments of its own."""
        return OutputStore, (self.folder, self.description)

    def read(self, keys: np.ndarray) -> FoundRows:
        """Looks up rows.

        Args:
            keys: shape (B, 2), uint64.

        Returns:
            The rows that are there, are whole, and are of the kind of the first of them.
        """
        places = self._index.find(keys[:, 0])
        if (places < 0).any():
            with contextlib.suppress(OSError):  # of a folder that someone has removed: nothing more is in it
                self._refresh()  # another process may have written them by now
            places = self._index.find(keys[:, 0])
        found, rows, kind = places >= 0, np.empty((len(keys), 0), np.uint8), None
        segments = list(self._segments.values())
        for number in np.unique(places[found] >> _ROW_BITS):
            segment, where = segments[number], found & (places >> _ROW_BITS == number)
            if kind is None:
                kind, rows = segment.kind, np.empty((len(keys), segment.row_bytes), np.uint8)
            if segment.kind != kind:
                found &= ~where
                continue
            rows[where], found[where] = segment.read(places[where] & (2**_ROW_BITS - 1), keys[where])
        return FoundRows(kind, rows, found)

    def add(self, keys: np.ndarray, kind: Any, rows: np.ndarray) -> None:
        """Stores rows, each key once; what was found under a key before gives way.

        A disk that takes no more is warned about, once, and nothing more is stored.

        Args:
            keys: shape (B, 2), uint64.
            kind: what the rows consist of, as JSON has it.
            rows: shape (B, bytes of a row), uint8.
        """
        if self.problem:
            return
        first = np.sort(np.unique(keys[:, 0], return_index=True)[1])
        own = os.getpid(), json.dumps(kind)
        try:
            if own not in self._own:
                name = secrets.token_hex(8)
                self._own[own] = self._segments[name] = _Segment.create(self.folder, name, kind, rows.shape[1])
            segment = self._own[own]
            start = segment.append(keys[first], rows[first])
        except OSError as error:
            self.problem = str(error.strerror)
            _logger.warning(
                f'{self.folder} takes no more outputs of the static teacher ({self.problem}): those that are there '
                'are used, and the others are computed every time'
            )
            return
        number = list(self._segments.values()).index(segment)
        self._index.add(keys[first, 0], number << _ROW_BITS | start + np.arange(len(first)))

    def _refresh(self) -> None:
        """Takes in what others have written."""
        for name in sorted(file[:-5] for file in os.listdir(self.folder) if file.endswith('.json')):
            if name != 'about' and name not in self._segments:
                with contextlib.suppress(ValueError, LookupError, TypeError):  # of a machine that lost its power
                    self._segments[name] = _Segment.open(self.folder, name)
        own = [segment for (process, _), segment in self._own.items() if process == os.getpid()]
        for number, segment in enumerate(self._segments.values()):
            start = segment.count
            if segment not in own and segment.grow():
                keys = segment.keys(start)
                self._index.add(keys, number << _ROW_BITS | start + np.arange(len(keys)))


class _Segment:
    """Rows of one process and one kind."""

    def __init__(self, folder: str, name: str, kind: Any, row_bytes: int) -> None:
        self.path, self.kind, self.row_bytes = os.path.join(folder, name), kind, row_bytes
        self.count = 0
        self._mapped: Tuple[np.ndarray, np.ndarray] = np.empty(0, _KEY), np.empty((0, row_bytes), np.uint8)

    @classmethod
    def create(cls, folder: str, name: str, kind: Any, row_bytes: int) -> '_Segment':
        _write_text(folder, f'{name}.json', json.dumps(dict(row_bytes=row_bytes, kind=kind)))
        return cls(folder, name, kind, row_bytes)

    @classmethod
    def open(cls, folder: str, name: str) -> '_Segment':
        with open(os.path.join(folder, f'{name}.json'), encoding='utf-8') as file:
            about = json.load(file)
        return cls(folder, name, about['kind'], about['row_bytes'])

    def append(self, keys: np.ndarray, rows: np.ndarray) -> int:
        """Writes rows, then their keys. Returns the number of the first."""
        records = np.zeros(len(keys), _KEY)
        records['key'] = keys
        records['checksum'] = [zlib.crc32(row) for row in rows]
        for suffix, array in (('rows', rows), ('keys', records)):
            rest = memoryview(np.ascontiguousarray(array)).cast('B')
            with open(f'{self.path}.{suffix}', 'ab', buffering=0) as file:
                while rest:
                    rest = rest[file.write(rest) :]
        start = self.count
        self.count += len(keys)
        return start

    def grow(self) -> bool:
        """Looks how many rows there are by now. Whether there are more than before."""
        sizes = (_size(f'{self.path}.keys') // _KEY.itemsize, _size(f'{self.path}.rows') // self.row_bytes)
        before, self.count = self.count, max(self.count, min(sizes))
        return self.count > before

    def keys(self, start: int) -> np.ndarray:
        """The first words of the keys from some row on."""
        return self._map()[0]['key'][start:, 0]

    def read(self, numbers: np.ndarray, keys: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Rows by number, and whether each is whole and of its key."""
        try:
            all_records, all_rows = self._map()
        except (OSError, ValueError):  # someone has removed or cut the files
            return np.empty((len(numbers), self.row_bytes), np.uint8), np.zeros(len(numbers), bool)
        records, rows = all_records[numbers], all_rows[numbers]
        sums = np.array([zlib.crc32(row) for row in rows], np.uint32)
        return rows, (records['key'] == keys).all(1) & (records['checksum'] == sums)

    def _map(self) -> Tuple[np.ndarray, np.ndarray]:
        if len(self._mapped[0]) < self.count:
            self._mapped = (
                np.memmap(f'{self.path}.keys', _KEY, 'r', shape=(self.count,)),
                np.memmap(f'{self.path}.rows', np.uint8, 'r', shape=(self.count, self.row_bytes)),
            )
        return self._mapped


class _Index:
    """Places by the first words of keys: two sorted arrays, 16 bytes a row, and a dictionary of the latest."""

    def __init__(self) -> None:
        self.words, self.places = np.empty(0, np.uint64), np.empty(0, np.int64)
        self.latest: Dict[int, int] = {}

    def find(self, words: np.ndarray) -> np.ndarray:
        """Places, -1 where there is none."""
        if len(self.words):
            near = np.searchsorted(self.words, words).clip(max=len(self.words) - 1)
            places = np.where(self.words[near] == words, self.places[near], -1)
        else:
            places = np.full(len(words), -1)
        latest: List[Optional[int]] = [self.latest.get(word) for word in words.tolist()]
        return np.array([old if new is None else new for old, new in zip(places.tolist(), latest)], np.int64)

    def add(self, words: np.ndarray, places: np.ndarray) -> None:
        """Adds places; of one key the last counts. Sorts whenever there are twice as many, so seldom."""
        if len(self.latest) + len(words) <= max(_FEW, len(self.words)):
            self.latest.update(zip(words.tolist(), places.tolist()))
            return
        latest = np.array(list(self.latest), np.uint64), np.array(list(self.latest.values()), np.int64)
        all_words = np.concatenate([words[::-1], latest[0], self.words])
        all_places = np.concatenate([places[::-1], latest[1], self.places])
        self.words, first = np.unique(all_words, return_index=True)
        self.places, self.latest = all_places[first], {}


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0


def _write_text(folder: str, name: str, text: str) -> None:
    """Writes a file as a whole, or leaves none of its name."""
    descriptor, partial = tempfile.mkstemp(prefix='.', dir=folder)
    try:
        with open(descriptor, 'w', encoding='utf-8') as file:
            file.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, os.path.join(folder, name))
    except OSError:
        os.unlink(partial)
        raise
