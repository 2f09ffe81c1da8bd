"""A file that has been recognised and indexed: what its names are, and which entries they mean."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import cast

from . import formats, objects, tree
from .errors import FormatError, warn
from .folder import FolderSource, Origin, beside
from .layout import Entry, Index
from .replaced import TRIES, ReplacedError

__all__ = ["Reader"]


class Reader:
    """A source, its index, and how its tensors are brought into memory.

    Parameters
    ----------
    source : Source or FolderSource
        Closed with the reader.
    verify : bool
        Whether the checksum of the header is checked.
    strict : bool
        Whether a folder that was not saved to its end is an error rather than a warning.
    guess : bool
        Whether types and shapes that the checkpoint does not say are used as the format guesses
        them, with a warning.
    """

    __slots__ = ("_kinds", "_paths", "described", "index", "source")

    def __init__(
        self, source: Origin, *, verify: bool = True, strict: bool = False, guess: bool = True
    ) -> None:
        self.source = source
        self._kinds: dict[int, str] | None = None
        self._paths: dict[str, int] | None = None
        try:
            self.index = self._index(verify, strict)
            if isinstance(self.source, FolderSource):
                for text in self.source.notes:
                    warn(text)
            if guess and self.index.guess is not None:
                warn(self.index.guess.warning)
        except BaseException:
            self.source.close()
            raise
        #: What :meth:`entry` tells of: `index`, unless tensors are dequantized.
        self.described = self.index

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.source.close()

    def _index(self, verify: bool, strict: bool) -> Index:
        """The index, of a folder that was not replaced while it was read."""
        for _ in range(TRIES):
            error = None
            try:
                found = self._index_once(verify, strict)
            except (FormatError, OSError) as caught:
                error = caught
            source = self.source
            if not isinstance(source, FolderSource) or source.is_current():
                if error is not None:
                    raise error
                return found
            self.source = source.again()
        raise ReplacedError(f"{self.source.name}: was replaced again and again while it was read")

    def _index_once(self, verify: bool, strict: bool) -> Index:
        source = self.source
        if not isinstance(source, FolderSource):
            prefix = source.peek(formats.PREFIX)
            form = formats.recognise(prefix, source.size, source.name)
            if not formats.of_folders(form):
                single = cast(formats.Reading, form)
                if single.NEEDS_SIZE:
                    source.settle()
                return single.index(source.read, source.size, source.name, verify=verify)
            self.source = source = beside(source)
        else:
            form = formats.recognise_folder(source)
        source.links = form.LINKS
        index = form.index_folder(source, verify=verify, strict=strict)
        source.files = index.files or ()
        source.forget()
        return index

    @property
    def kinds(self) -> dict[int, str]:
        """What :func:`holdfast.objects.kinds_of` says of the index."""
        if self._kinds is None:
            self._kinds = objects.kinds_of(self.index)
        return self._kinds

    def paths(self) -> dict[str, int]:
        """Every name a tensor can be asked for, those of ties included, and its entry.

        Not among them is what was stored for a long ``bytes`` or ``str``. Not to be changed.
        """
        if self._paths is None and self.index.structure is not None:
            self._paths = dict(self.index.structure.paths())
        if self._paths is None:
            try:
                paths = tree.leaf_paths(self.index.tree, self.index.names.tolist())
            except FormatError as error:
                raise FormatError(f"{self.source.name}: {error}") from None
            if objects.BLOB in self.kinds.values():
                kinds = self.kinds
                paths = {k: row for k, row in paths.items() if kinds.get(row) != objects.BLOB}
            self._paths = paths
        return self._paths

    def find(self, name: str) -> int:
        """The entry of the tensor called `name`.

        Raises
        ------
        KeyError
            There is none; the message names the nearest.
        FormatError
            There is something of that name that cannot be read.
        """
        row = self.position(name)
        if row < 0:
            self.check([name])
            raise KeyError(self.missing(name))
        return row

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raise FormatError if one of these names, or any at all, is of what cannot be read."""
        refused = self.index.refused
        for name in refused if names is None else names:
            if isinstance(name, str) and name in refused:
                raise FormatError(refused[name])

    def position(self, name: object) -> int:
        """The entry of the tensor called `name`, or -1."""
        if not isinstance(name, str):
            return -1
        if self.index.structure is not None:
            return self.paths().get(name, -1)
        row = self.index.names.find(name)
        if self.index.tree is None:
            return row
        if row < 0 or self.kinds.get(row) == objects.BLOB:
            return self.paths().get(name, -1)
        return row

    def missing(self, name: str) -> str:
        """The message for a name or a pattern that nothing answers to."""
        import difflib

        paths = [*self.paths(), *self.index.refused]
        few = isinstance(name, str) and len(paths) <= 1000
        near = difflib.get_close_matches(name, paths, n=1) if few else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{self.source.name}: no tensor is called {name!r} ({len(paths)} are here){hint}"

    def select(self, keys: str | Iterable[str]) -> dict[str, int]:
        """Names that `keys` asks for, in the order of the file, and their entries."""
        asked: object = keys
        if isinstance(asked, bytes) or not isinstance(asked, Iterable):
            raise TypeError(f"keys must be names or patterns, not {type(keys).__name__}")
        wanted = [keys] if isinstance(keys, str) else list(keys)
        paths = self.paths()
        chosen: set[str] = set()
        for key in wanted:
            if not isinstance(key, str):
                raise TypeError(f"keys must be names or patterns, not {type(key).__name__}")
            # A name is taken literally before it is taken as a pattern: it may hold brackets.
            found = [key] if key in paths else fnmatch.filter(paths, key)
            refused = self.index.refused
            if refused and key not in paths:
                self.check([key] if key in refused else fnmatch.filter(refused, key))
            if not found:
                raise KeyError(self.missing(key))
            chosen.update(found)
        return {name: row for name, row in paths.items() if name in chosen}

    def entry(self, name: str, row: int) -> Entry:
        """What there is to know of one entry without reading it."""
        index = self.described
        at = index.entries[row]
        return Entry(
            name=name,
            dtype=index.dtype(row).name,
            shape=index.shape(row),
            nbytes=int(at["nbytes"]),
            offset=int(at["offset"]),
            file=index.file(self.source.name, int(at["file"])),
            encoding=index.encodings.get(row),
        )
