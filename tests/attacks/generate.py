"""Write the corpus of attack pickles into this folder: ``python tests/attacks/generate.py``.

Every file is a pickle that tries to run code, to reach what it must not, to crash the reader, to
keep it busy or to fill its memory. What would be run leaves a file ``holdfast-was-here``.
Nothing here is ever unpickled by Python itself.
"""

from __future__ import annotations

import struct
from pathlib import Path

HERE = Path(__file__).parent
TOUCH = "touch holdfast-was-here"
CODE = "open('holdfast-was-here', 'w')"

PROTO = b"\x80\x02"
STOP = b"."


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def items(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(function: bytes, *args: bytes) -> bytes:
    return function + items(*args) + b"R"


def new(kind: bytes, *args: bytes) -> bytes:
    return kind + items(*args) + b"\x81"


def mapping(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def build(obj: bytes, state: bytes) -> bytes:
    return obj + state + b"b"


def doubled(levels: int, start: bytes = b")") -> bytes:
    """A tuple of 2**levels parts, of which each level is one object."""
    made = start
    for i in range(levels):
        made += b"r" + struct.pack("<I", i + 1) + b"j" + struct.pack("<I", i + 1) + b"\x86"
    return made


def pickled(body: bytes) -> bytes:
    return PROTO + body + STOP


def storage(key: str, numel: int, kind: bytes = name("torch", "FloatStorage")) -> bytes:
    return items(text("storage"), kind, text(key), text("cpu"), integer(numel)) + b"Q"


def tensor(
    offset: bytes = integer(0),
    size: bytes = items(integer(2)),
    stride: bytes = items(integer(1)),
    held: bytes | None = None,
) -> bytes:
    args = (held or storage("0", 2), offset, size, stride, b"\x89", b"N")
    return call(name("torch._utils", "_rebuild_tensor_v2"), *args)


def running() -> dict[str, bytes]:
    """What would run code, were it called."""
    system = (text(TOUCH),)
    command = b"](" + text("touch") + text("holdfast-was-here") + b"e"
    gadget = call(name("builtins", "getattr"), name("builtins", "object"), text("__subclasses__"))
    return {
        "os-system": call(name("os", "system"), *system),
        "posix-system": call(name("posix", "system"), *system),
        "nt-system": call(name("nt", "system"), *system),
        "os-popen": call(name("os", "popen"), *system),
        "os-path": call(name("os.path", "os.system"), *system),
        "subprocess": call(name("subprocess", "check_output"), command),
        "popen": new(name("subprocess", "Popen"), command),
        "eval": call(name("builtins", "eval"), text(CODE)),
        "eval-python2": call(name("__builtin__", "eval"), text(CODE)),
        "exec": call(name("builtins", "exec"), text(CODE)),
        "import": call(name("builtins", "__import__"), text("antigravity")),
        "compile": call(name("builtins", "compile"), text(CODE), text(""), text("exec")),
        "open": call(name("builtins", "open"), text("holdfast-was-here"), text("w")),
        "io-open": call(name("io", "open"), text("holdfast-was-here"), text("w")),
        "getattr": call(gadget),
        "getattr-chain": call(
            call(name("builtins", "getattr"), name("collections", "OrderedDict"), text("__init__"))
        ),
        "attrgetter": call(call(name("operator", "attrgetter"), text("system")), name("os", "")),
        "methodcaller": call(call(name("operator", "methodcaller"), text("x")), b"N"),
        "partial": call(name("functools", "partial"), name("os", "system"), *system),
        "reduce": call(name("functools", "reduce"), name("os", "system"), b"](" + text("x") + b"e"),
        "map": call(name("builtins", "map"), name("os", "system"), items(*system)),
        "runpy": call(name("runpy", "run_path"), text("holdfast.py")),
        "code": call(name("code", "interact")),
        "timeit": call(name("timeit", "timeit"), text(CODE)),
        "pdb": call(name("pdb", "run"), text(CODE)),
        "profile": call(name("cProfile", "run"), text(CODE)),
        "pip": call(name("pip", "main"), command),
        "webbrowser": call(name("webbrowser", "open"), text("http://localhost:1")),
        "ctypes": call(name("ctypes", "CDLL"), text("libc.so.6")),
        "socket": call(name("socket", "create_connection"), items(text("localhost"), b"K\x01")),
        "sys-modules": build(name("sys", "modules"), b"}"),
        "sys-exit": call(name("sys", "exit"), b"K\x01"),
        "asyncio": call(name("asyncio.unix_events", "_Unix.start"), command),
        "numpy-load": call(name("numpy", "load"), text("evil.npy")),
        "numpy-runstring": call(name("numpy.testing._private.utils", "runstring"), text(CODE)),
        "numpy-fromfile": call(name("numpy", "fromfile"), text("/etc/passwd")),
        "numpy-tofile": call(name("numpy", "ndarray.tofile"), text("holdfast-was-here")),
        "path-unlink": call(name("pathlib", "Path.unlink"), text("x")),
        "path-write": call(name("pathlib", "Path.write_text"), text("holdfast-was-here"), text("")),
        "torch-hub": call(name("torch.hub", "load"), text("a/b"), text("c")),
        "torch-load": call(name("torch", "load"), text("evil.pt")),
        "torch-storage": call(name("torch.storage", "_load_from_bytes"), call(
            name("_codecs", "encode"), text("x"), text("latin1"))),
        "torch-dotted": call(name("torch._utils", "_import_dotted_name"), text("os.system")),
        "torch-jit": call(name("torch.jit._script", "RecursiveScriptModule.load"), text("x")),
        "torch-annotations": call(name("torch.jit.annotations", "parse_type_line"), text(CODE)),
        "torch-library": call(name("torch.ops", "load_library"), text("./evil.so")),
        "torch-inductor": call(
            name("torch._inductor.codecache", "compile_file"), text("a"), text("b"), text(TOUCH)
        ),
        "torch-run": call(name("torch.utils.collect_env", "run"), text(TOUCH)),
        "torch-bottleneck": call(name("torch.utils.bottleneck.__main__", "run_prof")),
        "transformers": call(name("transformers.utils.hub", "cached_file"), text("x")),
        "picklescan-submodule": call(name("asyncio.base_events", "os.system"), *system),
        "pickle-loads": call(name("pickle", "loads"), call(
            name("_codecs", "encode"), text("cos\nsystem\n."), text("latin1"))),
        "copyreg": call(
            name("copyreg", "_reconstructor"), name("subprocess", "Popen"), b"N", command
        ),
        "copyreg-extension": call(
            name("copyreg", "add_extension"), text("os"), text("system"), b"K\x01"
        ),
        "rebuild-from-type": call(
            name("torch._tensor", "_rebuild_from_type_v2"),
            name("os", "system"), name("torch", "Tensor"), items(*system), b"}",
        ),
        "factory": build(call(name("collections", "defaultdict"), name("os", "system")), b"}"),
        "method-of-value": call(text("x"), text("y")),
        "call-a-number": call(b"K\x05", text("y")),
        "call-a-class": call(name("numpy", "ndarray"), items(integer(10**12))),
        "new-a-class": new(name("torch", "Tensor"), integer(10**12)),
        "new-int": new(name("builtins", "int"), text("9" * 1000)),
        "inst": b"(" + text(TOUCH) + b"ios\nsystem\n",
        "obj": b"(" + name("os", "system") + text(TOUCH) + b"o",
        "stack-global": text("os") + text("system") + b"\x93" + items(*system) + b"R",
        "stack-global-memo": text("os") + b"\x94" + b"0" + b"h\x00" + text("system") + b"\x93"
        + items(*system) + b"R",
        "newobj-ex": name("subprocess", "Popen") + items(command) + b"}\x92",
        "extension-1": b"\x82\x01" + items() + b"R",
        "extension-4": b"\x84\x01\x00\x00\x00" + items() + b"R",
    }  # fmt: skip


def attributes() -> dict[str, bytes]:
    """What sets attributes that are not for a file to set."""
    ordered = call(name("collections", "OrderedDict"))
    space = new(name("argparse", "Namespace"))
    parameter = call(name("torch._utils", "_rebuild_parameter_with_state"), tensor(), b"\x88", b"N",
                     mapping((text("__class__"), name("collections", "OrderedDict"))))  # fmt: skip
    evil = name("os", "system")
    return {
        "class-of-ordered": build(ordered, mapping((text("__class__"), evil))),
        "dunder-of-ordered": build(ordered, mapping((text("__reduce__"), b"N"))),
        "hidden-method": build(ordered, mapping((text("items"), b"N"))),
        "slots-of-ordered": build(ordered, items(b"N", mapping((text("__class__"), b"N")))),
        "class-of-namespace": build(space, mapping((text("__class__"), name("builtins", "dict")))),
        "dict-of-namespace": build(space, mapping((text("__dict__"), b"}"))),
        "number-of-namespace": build(space, mapping((b"K\x01", b"N"))),
        "state-of-a-class": build(name("collections", "OrderedDict"), mapping((text("x"), b"N"))),
        "state-of-a-function": build(name("_codecs", "encode"), mapping((text("x"), b"N"))),
        "state-of-a-list": build(b"]", mapping((text("x"), b"N"))),
        "state-of-a-number": build(b"K\x01", mapping((text("x"), b"N"))),
        "state-of-a-dtype": build(name("torch", "float32"), mapping((text("x"), b"N"))),
        "class-of-parameter": parameter,
        "append-to-ordered": ordered + b"(K\x01e",
        "append-to-a-tuple": b")K\x01a",
        "setitem-of-a-list": b"]K\x00K\x01s",
        "setitem-of-a-string": text("abc") + b"K\x00K\x01s",
        "setitem-of-a-tensor": tensor() + b"K\x00K\x01s",
        "setitem-of-a-class": name("builtins", "dict") + text("a") + b"K\x01s",
    }


def numbers() -> dict[str, bytes]:
    """Allowed names with arguments that no program would have written."""
    array = name("numpy.core.multiarray", "_reconstruct")
    scalar = name("numpy.core.multiarray", "scalar")
    parameter = name("torch._utils", "_rebuild_parameter")
    fresh = call(array, name("numpy", "ndarray"), items(b"K\x00"), b"C\x01b")
    eight = call(name("numpy", "dtype"), text("f8"), b"\x89", b"\x88")
    swapped = items(b"K\x03", text(">"), b"N", b"N", b"N", b"J\xff\xff\xff\xff" * 2, b"K\x00")
    objects = call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88")
    raw = call(name("numpy", "dtype"), text("V8"), b"\x89", b"\x88")
    field = items(b"K\x03", text("|"), b"N", items(text("a")),
                  mapping((text("a"), items(eight, integer(1 << 40)))),
                  b"K\x08", b"K\x01", b"K\x00")  # fmt: skip
    many = integer(10**12)
    sparse = name("torch._utils", "_rebuild_sparse_tensor")
    coo = call(name("torch.serialization", "_get_layout"), text("torch.sparse_coo"))
    return {
        "bytearray-giant": call(name("builtins", "bytearray"), many),
        "bytes-giant": call(name("builtins", "bytes"), many),
        "complex-text": call(name("builtins", "complex"), text("1" * 100_000)),
        "range-set": call(name("builtins", "set"), call(name("builtins", "range"), many)),
        "deque-range": call(name("collections", "deque"), call(name("builtins", "range"), many)),
        "codec": call(name("_codecs", "encode"), text("x"), text("antigravity")),
        "codec-idna": call(name("_codecs", "encode"), text("x" * 10_000), text("idna")),
        "datetime-wild": call(name("datetime", "datetime"), b"C\x0a" + b"\xff" * 10),
        "timedelta-wild": call(name("datetime", "timedelta"), integer(10**15)),
        "path-nul": call(name("pathlib", "PosixPath"), text("a\0b")),
        "size-giant": call(name("torch", "Size"), items(integer(1 << 70))),
        "device-wild": call(name("torch", "device"), text("x" * 100_000)),
        "layout-wild": call(name("torch.serialization", "_get_layout"), text("torch.load")),
        "array-giant": build(fresh, items(b"K\x01", items(many), eight, b"\x89", b"C\x01x")),
        "array-negative": build(fresh, items(b"K\x01", items(b"J\xff\xff\xff\xff"), eight, b"\x89",
                                             b"C\x00")),
        "array-of-addresses": build(fresh, items(b"K\x01", items(b"K\x01"), objects, b"\x89",
                                                 b"C\x08" + b"A" * 8)),
        "array-twice": build(build(fresh, items(b"K\x01", items(b"K\x01"), eight, b"\x89",
                                                b"C\x08" + b"A" * 8)), b"}"),
        "array-subclass": call(array, name("numpy", "matrix"), items(b"K\x00"), b"C\x01b"),
        "array-start": call(array, name("numpy", "ndarray"), items(many), b"C\x01b"),
        "dtype-text": call(name("numpy", "dtype"), text("O,O"), b"\x89", b"\x88"),
        "dtype-huge": call(name("numpy", "dtype"), text("V999999999999"), b"\x89", b"\x88"),
        "dtype-far-field": build(raw, field),
        "dtype-of-all": build(call(name("numpy", "dtype"), text("f8"), b"\x89", b"\x89"), swapped),
        "scalar-short": call(scalar, eight, b"C\x01A"),
        "scalar-object": call(scalar, objects, b"C\x08" + b"A" * 8),
        "sparse-wild": call(sparse, coo, items(tensor(), tensor(), items(many))),
        "sparse-text": call(sparse, coo, items(text("a"), text("b"), items(many))),
        "meta-giant": call(name("torch._utils", "_rebuild_meta_tensor_no_storage"),
                           name("torch", "float32"), items(integer(1 << 62), integer(1 << 62)),
                           items(b"K\x01", b"K\x01"), b"\x89"),
        "wrapper-wild": call(name("torch._utils", "_rebuild_wrapper_subclass"),
                             name("collections", "OrderedDict"), name("torch", "float32"),
                             items(many), items(b"K\x01"), b"K\x00", b"N", text("cpu"), b"\x89"),
        "nested-wild": call(name("torch._utils", "_rebuild_nested_tensor"), *[tensor()] * 4),
        "parameter-wild": call(parameter, text("a"), b"\x88", b"N"),
        "parameter-hooks": call(parameter, tensor(), b"\x88",
                                mapping((b"K\x01", b"K\x02"))),
        "tensor-offset": tensor(offset=integer(1 << 40)),
        "tensor-negative": tensor(offset=b"J\xff\xff\xff\xff"),
        "tensor-size": tensor(size=items(many)),
        "tensor-overflow": tensor(size=items(integer(1 << 62), integer(1 << 62)),
                                  stride=items(b"K\x01", b"K\x01")),
        "tensor-stride": tensor(stride=items(integer(1 << 62))),
        "tensor-stride-negative": tensor(stride=items(b"J\xff\xff\xff\xff")),
        "tensor-uneven": tensor(stride=items()),
        "tensor-text": tensor(size=text("ab")),
        "tensor-dims": tensor(size=items(*[b"K\x01"] * 65), stride=items(*[b"K\x01"] * 65)),
        "storage-escape": tensor(held=storage("../../etc/passwd", 2)),
        "storage-absolute": tensor(held=storage("/etc/passwd", 2)),
        "storage-nul": tensor(held=storage("0\0", 2)),
        "storage-negative": tensor(held=storage("0", -2)),
        "storage-giant": tensor(held=storage("0", 1 << 63)),
        "storage-wrong": tensor(held=storage("0", 2, name("torch", "EvilStorage"))),
        "storage-twice": tensor() + tensor(held=storage("0", 3)) + b"\x86",
        "storage-two-types": tensor()
        + tensor(held=storage("0", 2, name("torch", "DoubleStorage"))) + b"\x86",
        "pid-text": text("0") + b"Q",
        "pid-short": items(text("storage")) + b"Q",
        "pid-module": items(text("module"), name("os", "system"), text("a"), text("b")) + b"Q",
        "pid-other": items(text("file"), text("/etc/passwd")) + b"Q",
        "pid-line": b"P../../etc/passwd\n",
    }  # fmt: skip


def bombs() -> dict[str, bytes]:
    """What would take all time, all memory or all of the stack."""
    return {
        "hash-key": b"}" + doubled(60) + b"Ns",
        "hash-keys": b"}(" + doubled(60) + b"Nu",
        "hash-set": call(name("builtins", "set"), b"](" + doubled(60) + b"e"),
        "hash-frozenset": b"(" + doubled(60) + b"\x91",
        "hash-additems": b"\x8f(" + doubled(60) + b"\x90",
        "hash-counter": call(name("collections", "Counter")) + doubled(60) + b"Ns",
        "hash-ordered": call(name("collections", "OrderedDict")) + doubled(60) + b"Ns",
        "hash-deep": b"})" + b"\x85" * 200_000 + b"Ns",
        "deep-tuples": b")" + b"\x85" * 200_000,
        "deep-lists": b"]" * 100_000 + b"a" * 99_999,
        "deep-marks": b"(" * 200_000,
        "laughs": doubled(60),
        "laughs-list": b"]("
        + text("lol")
        + b"e"
        + b"".join(
            b"r" + struct.pack("<I", i) + b"](" + (b"j" + struct.pack("<I", i)) * 10 + b"e"
            for i in range(30)
        ),
        "self-list": b"]q\x01h\x01a",
        "self-dict": b"}q\x01(" + text("me") + b"h\x01u",
        "self-tuple": b"]q\x01h\x01\x85a",
        "giant-text": b"X\xff\xff\xff\xff",
        "giant-text-8": b"\x8d" + b"\xff" * 7 + b"\x7f",
        "giant-bytes": b"B\xff\xff\xff\xff",
        "giant-bytes-8": b"\x8e" + b"\xff" * 7 + b"\x7f",
        "giant-bytearray": b"\x96" + b"\xff" * 7 + b"\x7f",
        "giant-frame": b"\x95" + b"\xff" * 7 + b"\x7f",
        "giant-long": b"\x8b\xff\xff\xff\x7f",
        "negative-long": b"\x8b\xff\xff\xff\xff",
        "slow-long": b"\x8b" + struct.pack("<i", 1 << 17) + b"\x7f" * (1 << 17),
        "slow-int": b"I" + b"9" * 100_000 + b"\n",
        "slow-long-line": b"L" + b"9" * 100_000 + b"L\n",
        "memo-giant": b"Nr\xff\xff\xff\xff",
        "memo-line": b"Np99999999999999999999\n",
        "memo-missing": b"j\x07\x00\x00\x00",
        "memo-negative": b"Np-1\n",
        "underflow": b"R",
        "underflow-tuple": b"\x87",
        "underflow-pop": b"0000",
        "no-mark": b"K\x01t",
        "odd-items": b"}(K\x01u",
        "two-left": b"K\x01K\x02",
        "nothing-left": b"",
        "mark-left": b"(",
        "opcode-unknown": b"\xff",
        "opcode-buffer": b"\x97",
        "opcode-readonly": b"N\x98",
        "cut-global": b"cos",
        "cut-integer": b"J\x01",
        "unhashable": b"}]Ns",
        "bad-utf8": b"X\x02\x00\x00\x00\xff\xff",
        "bad-float": b"Fnot a number\n",
        "bad-name": b"c\xff\xff\nx\n",
    }


def corpus() -> dict[str, bytes]:
    """All attacks, by the names of their files."""
    found: dict[str, bytes] = {}
    for kind, table in (
        ("run", running()), ("set", attributes()), ("wild", numbers()), ("bomb", bombs()),
    ):  # fmt: skip
        for title, body in table.items():
            found[f"{kind}-{title}.pkl"] = pickled(body)
    found["bomb-no-stop.pkl"] = PROTO + b"K\x01"
    found["bomb-empty.pkl"] = b""
    found["bomb-protocol.pkl"] = b"\x80\xffK\x01."
    found["run-protocol-0.pkl"] = b"cos\nsystem\n(S'" + TOUCH.encode() + b"'\ntR."
    return found


if __name__ == "__main__":
    for old in HERE.glob("*.pkl"):
        old.unlink()
    made = corpus()
    for title, data in made.items():
        (HERE / title).write_bytes(data)
    print(len(made), "files,", sum(map(len, made.values())), "bytes")
