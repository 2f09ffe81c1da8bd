"""The names of a header: their table, and the strings it is made of."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from holdfast.dtypes import BY_NAME
from holdfast.formats import _header
from holdfast.formats._header import Fault
from holdfast.views import VIEW
from patience import within


def head(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def tensor(dtype: str = "U8", shape: str = "[1]", offsets: str = "[0,1]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


T = tensor()


@pytest.mark.parametrize("twin", ['"ab"', '"a\\u0062"', '"\\u0061\\u0062"'])
def test_duplicate_names(twin: str) -> None:
    text = '{"ab":' + T + "," + twin + ":" + tensor(offsets="[1,2]") + "}"
    with pytest.raises(Fault) as caught:
        _header.scan(head(text))
    found = caught.value
    assert (found.kind, found.name, found.entry) == ("duplicate", "ab", 1)


def test_names() -> None:
    wanted = ["", "a", "é", "\U0001f600", "a b", 'q"', "\\", "\0", "x" * 5000, "\u007f"]
    text = ",".join(f"{json.dumps(n)}:{tensor('U8', '[0]', '[0,0]')}" for n in wanted)
    names = _header.scan(head("{" + text + "}")).names
    assert len(names) == len(wanted)
    assert [names.find(name) for name in wanted] == list(range(len(wanted)))
    assert names.tolist() == wanted
    assert names.tolist() is names.tolist()
    for absent in ("b", "aa", "x" * 4999, "\ud800", "É"):
        assert names.find(absent) == -1
    with pytest.raises(TypeError):
        names.find(b"a")  # type: ignore[arg-type]
    assert _header.scan(head("{}")).names.find("") == -1
    assert _header.HeaderNames(b"").find("a") == -1


@pytest.mark.parametrize("n", [10, 40_000])
def test_names_that_are_made_to_collide(n: int) -> None:
    # Who knew the key could choose them so that the quick hash is the same for all.
    names = [f"AAAAAAAA{i:08}" for i in range(n)]
    text = "{" + ",".join(f'"{x}":' + tensor("U8", "[0]", "[0,0]") for x in names) + "}"
    with within(1):  # one by one, these would be 10^9 comparisons
        found = _header.scan(head(text), key=b"BBBBBBBBAAAAAAAA").names
        assert [found.find(name) for name in names] == list(range(n))
    assert found.find("AAAAAAAA") == found.find("AAAAAAAA99999999") == -1
    twice = head(text[:-1] + ',"AAAAAAAA00000009":' + tensor("U8", "[0]", "[0,0]") + "}")
    with pytest.raises(Fault, match="duplicate") as caught:
        _header.scan(twice, key=b"BBBBBBBBAAAAAAAA")
    assert caught.value.entry == n


def test_names_of_all_lengths() -> None:
    names = ["x" * i + end for i in range(70) for end in ("y", "z", "é", '"')] + ["x" * 70]
    text = ",".join(f"{json.dumps(n)}:{tensor('U8', '[0]', '[0,0]')}" for n in names)
    header = _header.scan(head("{" + text + "}" + " " * 400))
    assert header.names.tolist() == names
    assert [header.names.find(name) for name in names] == list(range(len(names)))
    for plain in (True, False):
        some = [name for name in names if name.isalpha() or not plain]
        views, offsets = np.zeros(len(some), VIEW), np.zeros(len(some), np.uint64)
        views["dtype"] = BY_NAME["uint8"].code
        views["nbytes"] = 1
        out, _ = _header.emit(some, views.view(np.uint8), np.zeros(0, np.int64), offsets, [])
        assert list(json.loads(out[8:])) == some


def test_names_outlive_everything_else() -> None:
    text = head('{"abc":' + T + ',"\\u0064":' + tensor(offsets="[1,2]") + "}")
    header = _header.scan(bytearray(text))
    names, entries = header.names, header.entries
    del header
    assert names.tolist() == ["abc", "d"]
    del names
    assert entries["nbytes"].tolist() == [1, 1]
