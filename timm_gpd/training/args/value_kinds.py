"""Kinds of values that a flag may take; each says what is wrong with one that it may not."""

import difflib
import math
import os
from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence, Tuple

__all__ = ['Each', 'Input', 'Names', 'Numbers', 'Output', 'Text']


@dataclass(frozen=True)
class Numbers:
    """Finite numbers within a range.

    Attributes:
        low: lowest one.
        high: highest one.
        above: whether ``low`` itself is too low.
        below: whether ``high`` itself is too high.
        counts: how many there may be, where a flag takes several; empty for any number of them.
        rising: whether none may be smaller than the one before it.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    counts: Tuple[int, ...] = ()
    rising: bool = False

    def __call__(self, value: Any) -> Optional[str]:
        """What is wrong with a value, None where nothing is."""
        values = value if isinstance(value, (list, tuple)) else [value]
        shown = ' '.join(map(str, values))
        if self.counts and len(values) not in self.counts:
            return f'takes {" or ".join(map(str, self.counts))} numbers, but got {shown}'
        if not all(self._holds(number) for number in values):
            return f'must be {self}, but is {shown}'
        if self.rising and any(first > second for first, second in zip(values, values[1:])):
            return f'must not fall from one number to the next, but is {shown}'
        return None

    def _holds(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (number > self.low if self.above else number >= self.low)
            and (number < self.high if self.below else number <= self.high)
        )

    def __str__(self) -> str:
        if self.low == 1 and not self.above:
            return 'a positive integer' + ('' if self.high == math.inf else f' of at most {self.high:.0f}')
        low = f'{"above" if self.above else "at least"} {self.low:g}'
        high = f'{"below" if self.below else "at most"} {self.high:g}'
        if self.low == -math.inf and self.high == math.inf:
            return 'a finite number'
        if self.high == math.inf:
            return low
        return f'{low} and {high}' if self.above or self.below else f'between {self.low:g} and {self.high:g}'


@dataclass(frozen=True)
class Names:
    """Names that exist.

    Attributes:
        what: what they are names of.
        known: gives them; where they are many, an error lists those nearest to what was given.
        accepts: whether something else is right as well.
    """

    what: str
    known: Callable[[], Sequence[str]]
    accepts: Callable[[str], bool] = lambda name: False

    def __call__(self, value: Any) -> Optional[str]:
        """What is wrong with a value, None where nothing is."""
        if value == '' or self.accepts(value):
            return None
        known = self.known()
        if value in known:
            return None
        if len(known) <= 120:
            return f'{value} is unknown: {self.what} are {", ".join(known)}'
        near = difflib.get_close_matches(value, known, n=5, cutoff=0.3)
        return f'{value} is unknown: {self.what} of names like it are {", ".join(near) or "none"}'


@dataclass(frozen=True)
class Each:
    """One value or several, separated by commas; an empty one stands for none.

    Attributes:
        kind: what each is.
        read: reads one from its text.
    """

    kind: Callable[[Any], Optional[str]]
    read: Callable[[str], Any] = str

    def __call__(self, value: Any) -> Optional[str]:
        """What is wrong with a value, None where nothing is."""
        for text in filter(None, str(value).split(',')):
            try:
                problem = self.kind(self.read(text))
            except ValueError:
                problem = f'must be {self.kind}, but is {text}'
            if problem:
                return problem
        return None


@dataclass(frozen=True)
class Input:
    """A file to read."""

    def __call__(self, value: Any) -> Optional[str]:
        """What is wrong with a value, None where nothing is."""
        return None if not value or os.path.isfile(value) else f'{value} does not exist, or is no file'


@dataclass(frozen=True)
class Output:
    """A file to write."""

    def __call__(self, value: Any) -> Optional[str]:
        """What is wrong with a value, None where nothing is."""
        if not value:
            return None
        folder = os.path.dirname(os.path.abspath(value))
        if os.path.isdir(value) or not os.path.isdir(folder):
            return f'{value} cannot be written: it is a folder, or its folder does not exist'
        return None if os.access(value if os.path.exists(value) else folder, os.W_OK) else f'{value} cannot be written'


@dataclass(frozen=True)
class Text:
    """Anything: it is checked elsewhere, or is a name that nobody has yet.

    Attributes:
        checked: where, or why nowhere.
    """

    checked: str

    def __call__(self, value: Any) -> Optional[str]:
        """Nothing is wrong with any value."""
        return None
