"""What is wrong with a zip archive, in words."""

from __future__ import annotations

from ..errors import FormatError
from ._header_text import short

__all__ = ["about", "read_error", "short", "write_error"]

#: What is expected, and what is found, by kind of fault; ``{e}`` and ``{f}`` stand for the numbers.
_TEXT = {
    "no_end": ("an end of central directory in the last 65557 bytes", "none"),
    "trailing": ("the comment of the end of central directory to end with the file, at {e}", "{f}"),
    "ambiguous": ("one end of central directory", "another at offset {f}"),
    "disks": ("all on one disk, {e}", "{f}"),
    "locator": ("the zip64 locator to point at offset {e}", "{f}"),
    "end64": ("a zip64 end of central directory with {e} bytes", "none, or one with {f}"),
    "contrary": ("{e} as the zip64 end of central directory says", "{f}"),
    "place": ("the central directory to end at offset {e}, where its end record begins", "{f}"),
    "huge": ("a central directory of at most {e} bytes", "{f}"),
    "count": ("a central directory of {e} bytes to have room for its entries", "{f} of them"),
    "entry": ("an entry of the central directory", "something else"),
    "short": ("an entry of {e} bytes", "the end of the central directory after {f}"),
    "rest": ("no more entries of the central directory", "{f} bytes"),
    "version": ("version {e} of the zip format, or an older one", "{f}"),
    "flags": ("no flags but those for descriptors, UTF-8 and the deflater's effort", "{f:#06x}"),
    "method": ("method 0 (stored) or 8 (deflated)", "{f}"),
    "stored_size": ("a stored payload of {e} bytes", "{f} bytes in the file"),
    "ratio": ("no more than what {e} deflated bytes can be inflated to", "{f} bytes"),
    "name": (
        "a relative name without NUL, backslash and empty, '.' or '..' parts",
        "another",
    ),
    "utf8": ("a name in UTF-8, as its flag says", "other bytes"),
    "other_name": ("one name", "another in the extra field"),
    "folder": ("a folder without bytes", "{f} bytes"),
    "extra": ("an extra field whose parts fill it, one of them for zip64 at most", "another"),
    "extra64": ("a zip64 extra field of {e} bytes", "{f}"),
    "header": ("its local header before the central directory at offset {e}", "it at offset {f}"),
    "prefix": ("the first record, or the directory, at the start of the file", "{f} bytes before"),
    "overlap": ("its local header at offset {e} or later, where the record before ends", "{f}"),
    "gap": ("at most a descriptor of {e} bytes behind its payload", "{f} bytes of nobody"),
    "local": ("its local header", "something else"),
    "local_flags": ("flags {e:#06x}, as in the central directory", "{f:#06x} in its local header"),
    "local_method": ("method {e}, as in the central directory", "{f} in its local header"),
    "local_crc": ("the CRC-32 {e:08x}, as in the central directory", "{f:08x} in its local header"),
    "local_size": ("a size of {e} bytes, as in the central directory", "{f} in its local header"),
    "local_packed": ("{e} bytes in the file, as in the central directory", "{f} in its header"),
    "local_name": ("the same name in its local header", "another"),
    "past": ("its payload to end before the central directory, at offset {e}", "its end at {f}"),
    "descriptor": ("a data descriptor", "something else"),
    "descriptor_crc": ("the CRC-32 {e:08x}, as in the directory", "{f:08x} in its descriptor"),
    "descriptor_size": ("a size of {e} bytes, as in the directory", "{f} in its descriptor"),
    "descriptor_packed": ("{e} bytes in the file, as in the directory", "{f} in its descriptor"),
}


def about(file: str, record: str | None) -> str:
    """How a message about a record begins; about the archive, where it is None."""
    return f"{file}: zip archive" if record is None else f"{file}: record {short(record)}"


def read_error(
    kind: str,
    file: str,
    record: str | None,
    position: int,
    expected: int,
    found: int,
    other: str | None,
) -> FormatError:
    """The exception for an archive that is not taken. `other` is a record with the same name."""
    start = about(file, record)
    if kind == "twice":
        return FormatError(f"{start}: expected one record of this name, found two")
    if kind == "case":
        return FormatError(
            f"{start}: expected names that differ in more than case, found {short(other or '')} too"
        )
    wanted, had = (text.format(e=expected, f=found) for text in _TEXT[kind])
    return FormatError(f"{start}: expected {wanted}, found {had} (at offset {position})")


def write_error(kind: str, root: str, record: str | None, expected: int, found: int) -> ValueError:
    """The exception for an archive that cannot be written."""
    if record is None:
        return ValueError(
            f"root {short(root)}: it has to be one part of a path, without NUL and backslash"
        )
    start = f"record {short(record)}"
    if kind == "long":
        return ValueError(f"{start}: its name has {found} bytes with the root, at most {expected}")
    if kind == "twice":
        return ValueError(f"{start}: another record has the same name but for case")
    if kind == "too_large":
        return ValueError(f"{start}: {found} bytes are more than a file can have")
    if kind == "folder":
        return ValueError(f"{start}: a folder cannot have {found} bytes")
    wanted, _ = _TEXT[kind]
    return ValueError(f"{start}: its name has to be {wanted}")
