"""Read every attack of this folder in one process, and say what came of it, line by line.

``python probe.py framework`` prints a line of JSON before each attack and one after it. An
audit hook notes whatever the reader does beyond reading: commands, modules, files, sockets.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import resource
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOM = 1 << 30  # bytes of address space, beyond what the imports took

#: Events of Python that mean that something is run, opened or brought in.
EVENTS = (
    *("os.", "subprocess.", "exec", "compile", "import", "open", "socket.", "shutil."),
    *("ctypes.dlopen", "ctypes.dlsym", "ctypes.call_function"),
)
QUIET = ("os.listdir", "os.scandir")


MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4}}


def archive(data: bytes, *, script: bool = False) -> BytesIO:
    """A zip as torch.save writes it; with `script`, one that a program would be taken for."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a/data.pkl", data)
        made.writestr("a/byteorder", "little")
        made.writestr("a/data/0", bytes(8))
        if script:
            made.writestr("a/code/__torch__.py", "import os")
            made.writestr("a/constants.pkl", data)
        made.writestr("a/version", "3\n")
    file.seek(0)
    return file


def legacy(data: bytes) -> BytesIO:
    """A stream of pickles, as before torch 1.6."""
    named = b"FloatStorage" in data
    tail = pickle.dumps(["0"] if named else [], 2)
    if named:
        tail += struct.pack("<q", 2) + bytes(8)
    head = MAGIC + pickle.dumps(1001, 2) + pickle.dumps(SYSTEM, 2)
    return BytesIO(head + data + tail)


def tar(data: bytes, views: bytes | None = None) -> BytesIO:
    """The oldest kind of file, in which every member is a pickle; `views` is the list in one."""
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as made:
        none = pickle.dumps(0, 2)
        storages = none + (pickle.dumps([], 2) if views is None else views)
        for name, body in (("storages", storages), ("tensors", none), ("pickle", data)):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            made.addfile(member, BytesIO(body))
    file.seek(0)
    return file


def ways(framework: str) -> dict[str, Callable[[bytes], Any]]:
    """Every way in which the library comes upon a pickle."""
    import numpy as np

    import holdfast
    from holdfast.formats._torch_pickle import read_object
    from holdfast.safe import SafeResolver

    if framework == "torch":
        import torch

    def tensor() -> Any:
        return torch.zeros(2) if framework == "torch" else np.zeros(2)

    def objects(data: bytes) -> Any:
        found = read_object(data, name="a.pt", where="data.pkl")
        resolver = SafeResolver(framework, name="a.pt")
        tensors = [tensor() for _ in found.entries]
        return found.structure.replay(tensors, lambda _row, _code: tensor(), resolver)

    def load(make: Callable[[bytes], BytesIO]) -> Callable[[bytes], Any]:
        return lambda data: holdfast.load(make(data), framework=framework)

    def show(data: bytes) -> Any:
        with holdfast.open(archive(data), framework=framework) as found:
            return [found[name] for name in found.keys()]  # noqa: SIM118

    return {
        "objects": objects,
        "zip": load(archive),
        "script": load(lambda data: archive(data, script=True)),
        "legacy": load(legacy),
        "tar": load(tar),
        "table": load(lambda data: tar(b"\x80\x02}.", data)),
        "open": show,
    }


def main(framework: str) -> None:
    """Read the attacks one after the other, each in every way."""
    attacks = {path.stem: path.read_bytes() for path in sorted(HERE.glob("*.pkl"))}
    readers = ways(framework)
    for way, read in readers.items():  # so that whatever is imported late is there
        with contextlib.suppress(Exception):
            read(b"\x80\x02cos\nsystem\n)R.")
        harmless = b"\x80\x02]." if way == "table" else b"\x80\x02}."
        assert not read(harmless), f"{way}: what is harmless is an empty object"
    noted: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(EVENTS) and event not in QUIET:
            noted.append(f"{event} {args[:1]!r:.80}")

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    sys.addaudithook(hook)
    Path(__file__).open().close()
    assert noted, "the hook sees nothing"
    for title, data in attacks.items():
        for way, read in readers.items():
            print(json.dumps({"begin": f"{way}/{title}"}), flush=True)
            noted.clear()
            start = time.process_time()
            outcome, said = "object", ""
            try:
                said = type(read(data)).__name__
            except Exception as error:
                kinds = [kind.__name__ for kind in type(error).__mro__]
                outcome, said = kinds[0], str(error)[:300]
                if outcome != "UnsafeError" and "FormatError" in kinds:
                    outcome = "FormatError"
            seconds = time.process_time() - start
            result = {"outcome": outcome, "said": said, "seconds": seconds, "noted": noted[:]}
            print(json.dumps({f"{way}/{title}": result}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
