"""Objects taken apart: :class:`Flattener`, and what it is told of frameworks."""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from ._tree_decode import TAGS
from ._tree_json import (
    FACTORIES,
    INT_MAX,
    INT_MIN,
    MAPPINGS,
    MAX_DEPTH,
    ROOT,
    scalar_nodes,
    short,
    str_node,
    text_of,
)

__all__ = ["Codec", "Flattener", "Leaves"]

#: From which length on a value is stored as a tensor rather than as JSON.
_BLOB_LENGTH: dict[type, int] = {bytes: 1 << 10, bytearray: 1 << 10, str: 1 << 16}

_BUILTIN_TAGS = frozenset(TAGS) | set(MAPPINGS) | {"bytes", "bytearray", "str"}
_FACTORY_NAMES = {factory: name for name, factory in FACTORIES.items()}
_STR: frozenset[type] = frozenset({str})
_INTS: frozenset[type] = frozenset({int})
_PLAIN: frozenset[type] = frozenset({bool, type(None)})


@dataclass(frozen=True, slots=True)
class Codec:
    """How values of a framework that are no tensors (``torch.Size``, NumPy scalars) are held.

    Attributes
    ----------
    tag : str
        What a tree calls them, such as ``"torch.Size"``.
    types : tuple of type
        The types of these values, matched exactly.
    encode : callable
        Makes a payload of a value: anything that a tree can hold, tensors included.
    decode : callable
        Makes the value of the payload. The payload may come from a hostile file: whatever
        ``Exception`` is raised for a bad one becomes a ``FormatError``.
    subclasses : bool
        Whether subclasses of `types` are values of this kind too (the classes of NumPy dtypes).
    """

    tag: str
    types: tuple[type, ...]
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    subclasses: bool = False

    def __post_init__(self) -> None:
        if self.tag in _BUILTIN_TAGS:
            raise ValueError(f"codec tag {self.tag!r}: taken by a type of Python's own")


@dataclass(frozen=True, slots=True)
class Leaves:
    """What the tree needs to know of frameworks.

    Attributes
    ----------
    tensor_types : frozenset of type
        Types that are tensors at a glance, matched exactly.
    is_tensor : callable
        Whether an object of any other type is one; asked only for types that nobody knows.
    codecs : sequence of Codec
    blob : callable
        Makes a tensor leaf of a long ``bytes``, such as ``numpy.frombuffer(data, "u1")``.
    """

    tensor_types: frozenset[type]
    is_tensor: Callable[[Any], bool]
    codecs: Sequence[Codec]
    blob: Callable[[bytes], Any]


class _Frame:
    """A container that is being walked: its node so far, and what is still to come."""

    __slots__ = ("children", "form", "node", "obj", "prefix", "step")

    def __init__(self, obj: Any, node: list[Any], prefix: str) -> None:
        self.obj = obj
        self.node = node
        self.prefix = prefix
        self.form = "[{}]"  # how messages show `step`, the key or index of the present child
        self.step: Any = None
        self.children: Generator[tuple[Any, Any], None, None]


class Flattener:
    """One run of :func:`holdfast.tree.flatten`.

    Containers are walked by generators which yield ``(child, text)`` and are driven by one loop, so
    that depth costs no Python stack. `text` is the child's part of a name: a str, an index, or None
    for the whole object.
    """

    def __init__(self, registry: Leaves) -> None:
        self.registry = registry
        self.tensors = registry.tensor_types
        self.simple = self.tensors | scalar_nodes.keys()
        self.names: list[str] = []
        self.leaves: list[Any] = []
        self.stack: list[_Frame] = []
        self.open: set[int] = set()  # ids of the containers on the stack
        self.hashed = 0  # greater than 0 inside dict keys and sets, where no tensor may stand
        self.exact = {kind: codec for codec in registry.codecs for kind in codec.types}
        self.bases = {
            kind: codec for codec in registry.codecs if codec.subclasses for kind in codec.types
        }

    def run(self, obj: Any) -> Any:
        """Take `obj` apart; returns the tree and fills `names` (not yet unique) and `leaves`."""
        root: list[Any] = []
        self.emit(root, obj, "", None)
        stack = self.stack
        while stack:
            frame = stack[-1]
            for child, text in frame.children:
                if self.emit(frame.node, child, frame.prefix, text):
                    break
            else:
                self.open.discard(id(frame.obj))
                stack.pop()
        return root[0]

    def emit(self, out: list[Any], obj: Any, prefix: str, text: Any) -> bool:
        """Append the node of `obj`; true where a frame was pushed that fills it in."""
        kind = type(obj)
        if kind in self.tensors:
            return self.leaf(out, obj, prefix, text)
        scalar = scalar_nodes.get(kind)
        if scalar is not None:
            if kind in _BLOB_LENGTH and len(obj) >= _BLOB_LENGTH[kind] and not self.hashed:
                data = obj.encode("utf-8", "surrogatepass") if kind is str else bytes(obj)
                out.append([kind.__name__])
                return self.leaf(out[-1], self.registry.blob(data), prefix, text)
            out.append(scalar(obj))
            return False
        walker = _WALKERS.get(kind)
        if walker is not None:
            prefix = "" if text is None else f"{prefix}{text}."
            if kind is dict and len(self.stack) < MAX_DEPTH and self.take_simple(out, obj, prefix):
                return False
            frame = self.push(out, obj, prefix, kind.__name__)
            frame.children = walker(self, frame, obj)
            return True
        codec = self.exact.get(kind)
        if codec is None:
            if self.registry.is_tensor(obj):
                return self.leaf(out, obj, prefix, text)
            codec = next((self.bases[base] for base in kind.__mro__ if base in self.bases), None)
            if codec is None:
                raise TypeError(f"{self.path()}: {_advice(obj)}")
        self.encode(codec, out, obj, prefix, text)
        return True

    def push(self, out: list[Any], obj: Any, prefix: str, tag: str) -> _Frame:
        if id(obj) in self.open:
            raise ValueError(f"{self.path()}: a {type(obj).__name__} that contains itself")
        if len(self.stack) >= MAX_DEPTH:
            raise ValueError(f"{self.path()}: more than {MAX_DEPTH} levels deep")
        frame = _Frame(obj, [tag], prefix)
        out.append(frame.node)
        self.stack.append(frame)
        self.open.add(id(obj))
        return frame

    def path(self) -> str:
        """Where in the object the present child stands, for messages."""
        text = "$" + "".join(frame.form.format(short(frame.step)) for frame in self.stack)
        return text if len(text) <= 500 else f"{text[:250]}...{text[-240:]}"

    def leaf(self, out: list[Any], obj: Any, prefix: str, text: Any) -> bool:
        if self.hashed:
            raise TypeError(
                f"{self.path()}: cannot save a tensor as a dict key or a member of a set: "
                "save a list instead"
            )
        out.append([len(self.leaves)])
        self.names.append(ROOT if text is None else f"{prefix}{text}")
        self.leaves.append(obj)
        return False

    def take_simple(self, out: list[Any], obj: dict[Any, Any], prefix: str) -> bool:
        """Append the node of a dict of str to tensors and scalars, if it is one, with no frame."""
        kinds = set(map(type, obj.values()))
        if not kinds <= self.simple or self.hashed or set(map(type, obj)) != _STR:
            return False
        node: list[Any] = ["dict"]
        out.append(node)
        if kinds <= self.tensors:
            node.append(self.take_all(obj, prefix))
            return True
        run: list[int] | None = None  # the run that a tensor after another one extends
        for key, value in obj.items():
            if type(value) in self.tensors:
                run = self.extend(node, run, prefix, key, value)
            else:
                run = None
                node.append(str_node(key))
                self.emit(node, value, prefix, key)
        return True

    def take_all(self, obj: Mapping[str, Any], prefix: str) -> list[int]:
        """Take the tensors of a dict as one run."""
        run = [len(self.leaves), len(obj), len(prefix)]
        self.names.extend([prefix + key for key in obj] if prefix else obj)
        self.leaves.extend(obj.values())
        return run

    def extend(
        self, node: list[Any], run: list[int] | None, prefix: str, key: str, tensor: Any
    ) -> list[int]:
        """Add one tensor to a run, or to a new one."""
        if run is None:
            run = [len(self.leaves), 0, len(prefix)]
            node.append(run)
        run[1] += 1
        self.names.append(prefix + key)
        self.leaves.append(tensor)
        return run

    def encode(self, codec: Codec, out: list[Any], obj: Any, prefix: str, text: Any) -> None:
        try:
            payload = codec.encode(obj)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{self.path()}: {error}") from error
        frame = self.push(out, obj, prefix, codec.tag)
        frame.form = ""
        frame.children = _once(payload, text)

    def walk_mapping(self, frame: _Frame, obj: Any) -> Generator[tuple[Any, Any], None, None]:
        node = frame.node
        if type(obj) is OrderedDict and vars(obj):
            if set(vars(obj)) != {"_metadata"}:
                found = ", ".join(sorted(map(str, vars(obj))))
                raise TypeError(
                    f"{self.path_of(frame)}: cannot save an OrderedDict with the attributes "
                    f"{found}: only _metadata is kept"
                )
            node[0] = "state_dict"
            frame.step = "_metadata"
            yield vars(obj)["_metadata"], "_metadata"
        elif type(obj) is defaultdict:
            if obj.default_factory not in _FACTORY_NAMES:
                raise TypeError(
                    f"{self.path_of(frame)}: cannot save a defaultdict whose factory is "
                    f"{short(obj.default_factory)}: save dict(x) instead"
                )
            node.append(_FACTORY_NAMES[obj.default_factory])
        if (
            self.tensors.issuperset(map(type, obj.values()))
            and _STR.issuperset(map(type, obj))
            and obj
            and not self.hashed
        ):
            node.append(self.take_all(obj, frame.prefix))
            return
        run: list[int] | None = None
        for key, value in obj.items():
            frame.step = text = key
            kind = type(key)
            if kind is str and type(value) in self.tensors and not self.hashed:
                run = self.extend(node, run, frame.prefix, key, value)
                continue
            run = None
            if kind in scalar_nodes:
                node.append(scalar_nodes[kind](key))
            else:
                self.hashed += 1
                frame.form = "[key {}]"
                yield key, ""
                frame.form = "[{}]"
                self.hashed -= 1
            if kind is not str and type(node[-1]) is not int:
                text = text_of(node[-1])
            yield value, text

    def path_of(self, frame: _Frame) -> str:
        """Path of the container of a frame that was just pushed."""
        assert frame is self.stack[-1]
        frame.form = ""
        return self.path()

    def walk_sequence(self, frame: _Frame, obj: Any) -> Generator[tuple[Any, Any], None, None]:
        if type(obj) is deque:
            frame.node.append(obj.maxlen)
        kinds = set(map(type, obj)) if len(obj) > 16 else _STR
        if kinds <= _PLAIN or (kinds == _INTS and min(obj) >= INT_MIN and max(obj) <= INT_MAX):
            frame.node.extend(obj)
            return
        for frame.step, item in enumerate(obj):
            yield item, frame.step

    def walk_slice(self, frame: _Frame, obj: slice) -> Generator[tuple[Any, Any], None, None]:
        for frame.step, item in enumerate((obj.start, obj.stop, obj.step)):
            yield item, frame.step

    def walk_set(self, frame: _Frame, obj: Any) -> Generator[tuple[Any, Any], None, None]:
        self.hashed += 1
        frame.form = "{{{}}}"
        for frame.step in obj:
            yield frame.step, ""
        self.hashed -= 1
        frame.node[1:] = sorted(frame.node[1:], key=text_of)


def _once(child: Any, text: Any) -> Generator[tuple[Any, Any], None, None]:
    yield child, text


_WALKERS: dict[type, Callable[[Flattener, _Frame, Any], Generator[tuple[Any, Any], None, None]]] = {
    **dict.fromkeys((dict, OrderedDict, Counter, defaultdict), Flattener.walk_mapping),
    **dict.fromkeys((list, tuple, deque), Flattener.walk_sequence),
    **dict.fromkeys((set, frozenset), Flattener.walk_set),
    slice: Flattener.walk_slice,
}


# -- what cannot be held -------------------------------------------------------------------------


def _advice(obj: Any) -> str:
    """Why an object cannot be held, and which way works."""
    kind = type(obj)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"cannot save a value of type {module}{kind.__qualname__}: {_way(obj, kind)}"


def _way(obj: Any, kind: type) -> str:
    if isinstance(obj, type):
        return f"a class is code ({short(obj)}); save its name"
    if callable(getattr(obj, "state_dict", None)):
        return "save its state_dict() instead"
    if isinstance(obj, enum.Enum):
        return "save its .value instead"
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):
        return "save x._asdict() or tuple(x) instead"
    if (kind.__module__, kind.__name__) in _NAMESPACES:
        return "save vars(x) instead"
    if is_dataclass(obj):
        return "save dataclasses.asdict(x) instead"
    for base in (dict, list, tuple, str, bytes, bytearray, int, float, complex, set, frozenset):
        if isinstance(obj, base):
            return f"a subclass would come back as its base; save {base.__name__}(x) instead"
    if isinstance(obj, Mapping):
        return "save dict(x) instead"
    if isinstance(obj, Iterator):
        return "save list(x) instead"
    if hasattr(obj, "__fspath__"):
        return "save str(x) instead"
    if callable(obj):
        return "a function is code; save its name"
    return "save what it is made of, as a dict of plain values and tensors"


_NAMESPACES = {("argparse", "Namespace"), ("types", "SimpleNamespace")}
