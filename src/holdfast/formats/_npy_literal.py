"""The header of an array as NumPy writes it: the text of a Python dict, read and never run."""

from __future__ import annotations

import re
from typing import Any

from ..errors import FormatError
from ._header_text import short

__all__ = ["MAX_DEPTH", "read_literal"]

#: How deep lists and tuples may nest: far deeper than any array's records do.
MAX_DEPTH = 64

_TOKEN = re.compile(
    r"[ \t\r\n\f]*(?:"
    r"(?P<int>[0-9]{1,20})[lL]?(?![0-9A-Za-z_.])"  # the L is that of Python 2
    r"|(?P<text>'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\")"
    r"|(?P<word>True|False|None)(?![0-9A-Za-z_])"
    r"|(?P<mark>[{}()\[\],:])"
    r")"
)
_END = re.compile(r"[ \t\r\n\f]*(?:#(?P<comment>[^\r\n]*))?[ \t\r\n\f]*")
_ESCAPE = re.compile(
    r"\\(?:([\\'\"abfnrtv])|([0-7]{1,3})|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U(000[0-9a-fA-F]{5}"
    r"|0010[0-9a-fA-F]{4})|(.))",
    re.S,
)
_CONTROL = dict(zip("abfnrtv", "\a\b\f\n\r\t\v", strict=True))
_WORDS = {"True": True, "False": False, "None": None}


def read_literal(text: str, where: str) -> tuple[dict[str, Any], str]:
    """The dict that `text` shows, and what a comment behind it says.

    Of Python's literals it knows those that NumPy has written there: dicts with texts for keys,
    lists, tuples, texts, integers of 0 or more, True, False and None.

    Parameters
    ----------
    text : str
    where : str
        How a message begins.

    Raises
    ------
    FormatError
    """
    parser = _Parser(text, where)
    found = parser.mapping()
    end = _END.fullmatch(text, parser.at)
    if end is None:
        raise parser.wrong("the end of the header, or a comment")
    return found, (end["comment"] or "").strip()


class _Parser:
    """A text, and how far it has been read."""

    __slots__ = ("at", "kind", "next", "piece", "start", "text", "where")

    def __init__(self, text: str, where: str) -> None:
        self.text = text
        self.where = where
        self.at = self.next = self.start = 0
        self.step()

    def wrong(self, expected: str) -> FormatError:
        """The error for what stands here."""
        rest = self.text[self.at :].lstrip()
        found = short(rest, 40) if rest else "its end"
        return FormatError(
            f"{self.where}: header: expected {expected} at character "
            f"{len(self.text) - len(rest)}, found {found}"
        )

    def step(self) -> None:
        """Go behind the present piece and look at the next one."""
        self.at = self.next
        match = _TOKEN.match(self.text, self.at)
        self.kind = match.lastgroup if match else ""
        self.piece = match[self.kind] if match and self.kind else ""
        self.next = match.end() if match else self.at

    def take(self, mark: str) -> bool:
        """Whether `mark` stands here; if so, go behind it."""
        if self.kind != "mark" or self.piece != mark:
            return False
        self.step()
        return True

    def mapping(self) -> dict[str, Any]:
        """The dict that stands here."""
        if not self.take("{"):
            raise self.wrong("'{'")
        found: dict[str, Any] = {}
        while not self.take("}"):
            key = _unquoted(self.piece) if self.kind == "text" else None
            if key is None or key in found:
                raise self.wrong("a key in quotes, each once, or '}'")
            self.step()
            if not self.take(":"):
                raise self.wrong("':'")
            found[key] = self.value(0)
            if not self.take(",") and not (self.kind == "mark" and self.piece == "}"):
                raise self.wrong("',' or '}'")
        return found

    def value(self, depth: int) -> Any:
        """The value that stands here."""
        if depth > MAX_DEPTH:
            raise self.wrong(f"at most {MAX_DEPTH} levels of nesting")
        kind, piece = self.kind, self.piece
        if kind == "mark" and piece in "([":
            self.step()
            return self.sequence(")" if piece == "(" else "]", depth + 1)
        found: Any = None
        if kind == "int":
            found = int(piece)
        elif kind == "text":
            found = _unquoted(piece)
            if found is None:
                raise self.wrong("a text with the escapes that Python has")
        elif kind == "word":
            found = _WORDS[piece]
        else:
            raise self.wrong("a text, an integer of 0 or more, True, False, a tuple or a list")
        self.step()
        return found

    def sequence(self, close: str, depth: int) -> Any:
        """The list or tuple that was begun; or the value that is only in parentheses."""
        found: list[Any] = []
        comma = False
        while not self.take(close):
            if found and not comma:
                raise self.wrong(f"',' or {close!r}")
            found.append(self.value(depth))
            comma = self.take(",")
        if close == "]":
            return found
        return found[0] if len(found) == 1 and not comma else tuple(found)


def _unquoted(piece: str) -> str | None:
    """The text that a piece in quotes stands for; None for an escape that is not known."""
    inner = piece[1:-1]
    if "\\" not in inner:
        return inner
    bad = False

    def escape(match: re.Match[str]) -> str:
        nonlocal bad
        letter, octal, *codes, other = match.groups()
        bad |= other is not None
        if letter is not None:
            return _CONTROL.get(letter, letter)
        code = int(octal, 8) if octal else int(next(filter(None, codes), "0"), 16)
        return chr(code)

    found = _ESCAPE.sub(escape, inner)
    return None if bad else found
