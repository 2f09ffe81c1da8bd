"""Reading a file from front to back by windows, where nothing says how long its parts are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..errors import FormatError
from . import Read
from ._pickle import Truncated

__all__ = ["FIRST", "MOST", "Window"]

T = TypeVar("T")

#: Bytes of the first window on a pickle; each next one that it asks for is GROWTH times as long,
#: so that running it again and again from its start costs a third more than running it once.
FIRST = 256 << 10
GROWTH = 4
#: A pickle longer than this is refused: it would have to be held in memory, and then run.
MOST = 1 << 30


class Window:
    """Part of a file, of which bytes are asked for that may not be there.

    Parameters
    ----------
    read : callable
        ``read(offset, nbytes)``: exactly those bytes, or FormatError.
    stop : int
        Where the part ends, from the start of the file; -1 where nobody knows, and it ends where
        the bytes do.
    name : str
        Of the file, for messages.
    what : str
        What ends at `stop`, for messages.
    ahead : int
        Bytes that are read at least, where there are as many.

    Notes
    -----
    It holds the last window that was read, so that small things side by side take one read.
    """

    __slots__ = ("_ahead", "_data", "_read", "_start", "name", "stop", "what")

    def __init__(
        self, read: Read, stop: int, name: str, what: str = "file", ahead: int = 0
    ) -> None:
        self.name = name
        self.stop = stop
        self.what = what
        self._ahead = ahead
        self._read = read
        self._start = 0
        self._data = memoryview(b"")

    def most(self, offset: int, nbytes: int) -> memoryview:
        """The bytes at `offset`, at most `nbytes`; fewer only where the part ends before."""
        if self.stop >= 0:
            nbytes = min(nbytes, max(self.stop - offset, 0))
        first = offset - self._start
        if first < 0 or first + nbytes > len(self._data):
            self._data = memoryview(self._fetch(offset, nbytes))
            self._start = offset
            first = 0
        return self._data[first : first + nbytes]

    def take(self, offset: int, nbytes: int, what: str) -> memoryview:
        """Exactly `nbytes` bytes at `offset`, which are `what`.

        Raises
        ------
        FormatError
            The part ends before.
        """
        data = self.most(offset, nbytes)
        if len(data) < nbytes:
            raise self.short(offset, nbytes, what)
        return data

    def reaches(self, end: int) -> bool:
        """Whether there are as many bytes as `end`; a stream is read that far to know."""
        if self.stop < 0 and end > 0:
            self.most(end - 1, 1)
        return self.stop < 0 or end <= self.stop

    def short(self, offset: int, nbytes: int, what: str) -> FormatError:
        """The error for `what` standing partly behind the end."""
        return FormatError(
            f"{self.name}: {what}: needs {nbytes} bytes at offset {offset}, "
            f"{self.what} ends at {self.stop}"
        )

    def grow(self, offset: int, parse: Callable[[memoryview], T], first: int = FIRST) -> T:
        """What `parse` makes of the bytes at `offset`, however many it takes.

        Parameters
        ----------
        parse : callable
            Called again with more bytes when it raises Truncated, as long as there are more.
        first : int
            Bytes that it gets first.

        Raises
        ------
        Truncated
            It wants more than there are, or than MOST.
        """
        nbytes = first
        while True:
            data = self.most(offset, nbytes)
            try:
                return parse(data)
            except Truncated as error:
                least = max(error.needed, nbytes + 1)
                if len(data) < nbytes or least > MOST or 0 <= self.stop < offset + least:
                    raise
            nbytes = min(max(nbytes * GROWTH, least), MOST)

    def _fetch(self, offset: int, nbytes: int) -> bytes | memoryview:
        """At least the bytes at `offset`; where the end comes before, those up to it."""
        nbytes = max(nbytes, self._ahead)
        if self.stop < 0:
            try:
                return self._read(offset, nbytes)
            except FormatError:
                self.stop = self._length(offset + nbytes)
        nbytes = min(nbytes, max(self.stop - offset, 0))
        return self._read(offset, nbytes) if nbytes else b""

    def _length(self, beyond: int) -> int:
        """Length of a stream known to be shorter than `beyond`, all of it at hand by now."""
        least, most = -1, beyond - 1
        while most - least > 1:
            middle = (least + most) // 2
            try:
                self._read(middle, 1)
                least = middle
            except FormatError:
                most = middle
        return most
