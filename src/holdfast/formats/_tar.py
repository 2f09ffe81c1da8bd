"""Where the members of a tar stand: ustar headers, and the pax records that torch's tars have."""

from __future__ import annotations

from ..errors import FormatError
from ._window import Window

__all__ = ["BLOCK", "members"]

BLOCK = 512
#: More headers than this are not those of a checkpoint, which has three members.
_HEADERS = 64
#: A pax header of torch's holds a time stamp and perhaps a size.
_PAX = 64 << 10


def members(window: Window) -> dict[str, tuple[int, int]]:
    """Offset and size of every regular file of a tar, by its name as it stands.

    Links, devices, sparse files and the extensions of GNU tar are refused: what their names and
    sizes mean depends on who reads them.

    Raises
    ------
    FormatError
        Not a tar that can be read, or one that ends too soon.
    """
    found: dict[str, tuple[int, int]] = {}
    offset = 0
    extended: dict[str, str] = {}
    for _ in range(_HEADERS):
        head = window.most(offset, BLOCK)
        if len(head) == 0 and found:
            break
        if len(head) < BLOCK:
            raise window.short(offset, BLOCK, "tar header")
        if not any(head):
            break
        name, size, kind = _header(bytes(head), offset, window.name)
        data = offset + BLOCK
        if kind in (b"x", b"g"):
            if size > _PAX:
                raise FormatError(
                    f"{window.name}: tar header at offset {offset}: expected at most {_PAX} bytes "
                    f"of pax records, found {size}"
                )
            text = bytes(window.take(data, size, "pax records of a tar"))
            if extended and kind == b"x":
                raise FormatError(
                    f"{window.name}: tar header at offset {offset}: two of one member"
                )
            if records := _records(text, data, window.name, shared=kind == b"g"):
                extended = records
        else:
            name = extended.get("path", name)
            if "size" in extended:
                size = _decimal(extended["size"], offset, window.name)
            extended = {}
            if kind in (b"0", b"\0"):
                _admit(found, name, data, size, window)
            elif kind != b"5" or size:
                raise FormatError(
                    f"{window.name}: tar header at offset {offset}: expected a regular file, "
                    f"found {name!r} of type {kind!r} and size {size}"
                )
        offset = data + -(-size // BLOCK) * BLOCK
    else:
        raise FormatError(
            f"{window.name}: tar: more than {_HEADERS} headers, no checkpoint has so many"
        )
    return found


def _admit(
    found: dict[str, tuple[int, int]], name: str, data: int, size: int, window: Window
) -> None:
    if name in found:
        raise FormatError(
            f"{window.name}: tar member {name!r} stands at offset {found[name][0]} and again at "
            f"offset {data}"
        )
    if not window.reaches(data + size):
        raise window.short(data, size, f"tar member {name!r}")
    found[name] = (data, size)


def _header(head: bytes, offset: int, file: str) -> tuple[str, int, bytes]:
    """Name, size and type that a header states."""
    where = f"{file}: tar header at offset {offset}"
    if head[257:262] != b"ustar":
        raise FormatError(f"{where}: expected b'ustar' at its byte 257, found {head[257:262]!r}")
    stated = _number(head[148:156], f"{where}: checksum")
    unsigned = sum(head) - sum(head[148:156]) + 8 * 0x20
    # Some old tars added the bytes up as signed ones.
    negative = sum(byte >= 0x80 for byte in head[:148] + head[156:])
    if stated not in (unsigned, unsigned - 256 * negative):
        raise FormatError(f"{where}: expected checksum {unsigned}, found {stated}")
    parts = (head[345:500], head[:100])
    name = b"/".join(part.split(b"\0", 1)[0] for part in parts if part[:1] != b"\0")
    size = _number(head[124:136], f"{where}: size")
    return name.decode("utf-8", "surrogateescape"), size, head[156:157]


def _number(field: bytes, where: str) -> int:
    """A number of a tar header: octal digits, or with the first bit set, binary."""
    if field[:1] == b"\x80":
        value = int.from_bytes(field[1:], "big")
        if value < 1 << 63:
            return value
    text = field.strip(b" \0")
    if not text or set(text) - set(b"01234567"):
        raise FormatError(f"{where}: expected octal digits, found {field!r}")
    return int(text, 8)


def _records(text: bytes, offset: int, file: str, *, shared: bool) -> dict[str, str]:
    """Records of a pax header that matter here; each is ``length key=value`` and a newline."""
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        where = f"{file}: pax record at offset {offset + at}"
        digits, gap, _ = text[at : at + 8].partition(b" ")
        length = int(digits) if gap and digits.isdigit() else 0
        record = text[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or len(record) < length or record[-1:] != b"\n":
            raise FormatError(
                f"{where}: expected '<length> <key>=<value>\\n', found {text[at : at + 40]!r}"
            )
        if key in (b"path", b"size"):
            if shared or key.decode() in found:
                raise FormatError(f"{where}: expected {key!r} once, of one member, found it again")
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
        elif key.startswith(b"GNU.sparse") or key in (b"linkpath", b"hdrcharset"):
            raise FormatError(f"{where}: expected times and sizes, found {key!r}")
        at += length
    return found


def _decimal(text: str, offset: int, file: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 1 << 63):
        raise FormatError(f"{file}: tar header at offset {offset}: expected a size, found {text!r}")
    return int(text)
