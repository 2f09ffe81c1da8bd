"""The keys of storages in the pickles of TorchScript, renamed without anything else changing."""

from __future__ import annotations

from ..errors import FormatError

__all__ = ["rename_storages"]

#: Opcodes of TorchScript's pickles that have no argument.
_BARE = frozenset(b"](Nt)}aub.sRQl\x81\x85\x86\x87\x88\x89e")
#: Opcodes that have one, and the bytes that it takes.
_FIXED = {ord("\x80"): 1, ord("K"): 1, ord("M"): 2, ord("J"): 4, ord("G"): 8}
_FIXED |= {ord("q"): 1, ord("r"): 4, ord("h"): 1, ord("j"): 4}
_LONG1, _UNICODE, _GLOBAL = 0x8A, ord("X"), ord("c")
_PUTS = {ord("q"), ord("r")}
_GETS = {ord("h"), ord("j")}
_MARK, _TUPLE, _PERSISTENT, _STOP = ord("("), ord("t"), ord("Q"), ord(".")


def rename_storages(data: bytes, prefix: str, name: str) -> bytes:
    """`data` with `prefix` before the key of every storage.

    A persistent id is ``('storage', type, key, device, numel)``: in TorchScript's pickles a mark,
    one opcode for each item (two where it is memoised), TUPLE and BINPERSID. The key may be a
    string that the memo has from elsewhere, and may go into the memo for others to get; what others
    get stays what it was.

    Parameters
    ----------
    data : bytes
        A sound pickle (:func:`holdfast.formats._torch_pickle.read_object` has run it).
    prefix : str
    name : str
        Of the file, for messages.

    Raises
    ------
    FormatError
        An opcode or a persistent id is not one that TorchScript writes.
    """
    items: list[tuple[int, int]] = []  # opcodes that made values since the last mark: start, end
    keys: list[tuple[int, int]] = []
    texts: dict[int, bytes | None] = {}  # what is in the memo: strings, or None for all else
    gets: list[tuple[int, int, int]] = []  # start, end, memo
    last, at = 0, 0
    while at < len(data):
        code, start = data[at], at
        at = _end(data, at, name)
        if code in _PUTS:
            index = int.from_bytes(data[start + 1 : at], "little")
            if index in texts:
                raise _refusal(data, start, name, "a place of the memo that is not taken")
            text = bool(items) and items[-1][1] == start and data[items[-1][0]] == _UNICODE
            texts[index] = data[slice(*items[-1])] if text else None
            continue
        if code == _PERSISTENT:
            if last != _TUPLE or len(items) != 6:
                raise _refusal(data, start, name, "a storage's five items before BINPERSID")
            keys.append(items[2])
        elif code in _GETS:
            gets.append((start, at, int.from_bytes(data[start + 1 : at], "little")))
        if code == _MARK:
            items.clear()
        else:
            items.append((start, at))
        last = code
        if code == _STOP:
            break
    return _patched(data, prefix.encode(), keys, gets, texts, name)


def _end(data: bytes, at: int, name: str) -> int:
    """Where the opcode at `at` ends."""
    code = data[at]
    if code in _BARE:
        return at + 1
    if code in _FIXED:
        return at + 1 + _FIXED[code]
    if code == _UNICODE:
        return at + 5 + int.from_bytes(data[at + 1 : at + 5], "little")
    if code == _LONG1:
        return at + 2 + data[at + 1]
    if code == _GLOBAL:
        return data.index(b"\n", data.index(b"\n", at) + 1) + 1
    raise _refusal(data, at, name, "an opcode that TorchScript writes")


def _patched(
    data: bytes,
    prefix: bytes,
    keys: list[tuple[int, int]],
    gets: list[tuple[int, int, int]],
    texts: dict[int, bytes | None],
    name: str,
) -> bytes:
    """`data` with the keys at `keys` renamed, each written out in full."""
    memo = {start: index for start, _, index in gets}
    changes: dict[int, tuple[int, bytes]] = {}  # start -> end, bytes instead
    renamed = set()
    for start, end in keys:
        text = texts.get(memo[start]) if start in memo else data[start:end]
        if text is None or text[0] != _UNICODE:
            raise _refusal(data, start, name, "a string as the key of a storage")
        changes[start] = end, _unicode(prefix + text[5:])
        renamed.add(text)
    # Where a string that is a key was put into the memo, the memo has the new one.
    for start, end, index in gets:
        text = texts.get(index)
        if start not in changes and text is not None and text in renamed:
            changes[start] = end, text
    parts = []
    at = 0
    for start in sorted(changes):
        end, text = changes[start]
        parts += [data[at:start], text]
        at = end
    return b"".join([*parts, data[at:]])


def _unicode(text: bytes) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text


def _refusal(data: bytes, at: int, name: str, expected: str) -> FormatError:
    return FormatError(
        f"{name}: pickle of a TorchScript archive, offset {at}: expected {expected}, "
        f"found {data[at : at + 1]!r}"
    )
