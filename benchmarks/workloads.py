"""What is saved: five kinds of checkpoint with real shapes and random bytes, at any scale."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .limits import Block
from .objects import map_tensors, tensors

Shapes = dict[str, tuple[int, ...]]

TIMED = (
    *("save-durable", "save", "save-over"),
    *("load-eager", "load-mapped", "load-cold", "load-cold-mapped", "load-mapped-again"),
)
MEMORY = ("memory-save", "memory-fill")


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of checkpoint.

    Attributes
    ----------
    name : str
    about : str
    nbytes : int
        Bytes of its tensors at scale 1.
    build : callable
        ``build(scale, rng)`` returns the object, of NumPy arrays; the bytes of its tensors are
        about ``scale * nbytes``.
    operations : tuple of str
        What is measured on it (:mod:`benchmarks.operations`).
    nested : bool
        Whether it is more than a flat dict of tensors, which not every rival can hold.
    rivals, limits : bool
        Whether rivals, and the limits of the machine, are measured beside holdfast.
    touched : bool
        Whether the time to read a byte of every page belongs to a load. Not so where tensors are
        far smaller than a page: there the figure would be the cost of touching them from Python.
    """

    name: str
    about: str
    nbytes: int
    build: Callable[[float, np.random.Generator], Any]
    operations: tuple[str, ...]
    nested: bool = False
    rivals: bool = True
    limits: bool = False
    touched: bool = True


@dataclass(slots=True)
class Material:
    """A workload built: one copy of the bytes, seen as NumPy arrays, torch tensors or raw."""

    workload: Workload
    numpy: Any
    nbytes: int
    count: int
    one: str
    _views: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, workload: Workload, scale: float, seed: int = 20) -> Material:
        rng = np.random.Generator(np.random.SFC64(seed))
        obj = workload.build(scale, rng)
        found = tensors(obj)
        names = [] if workload.nested else list(obj)
        return cls(
            workload=workload,
            numpy=obj,
            nbytes=sum(tensor.nbytes for tensor in found),
            count=len(found),
            one=names[len(names) // 2] if names else "",
        )

    def view(self, framework: str) -> Any:
        """The object as `framework` has it, over the same memory.

        ``"bytes"`` is what the limits of the machine are measured with: as many bytes, without
        any structure.
        """
        if framework == "numpy":
            return self.numpy
        if framework not in self._views:
            if framework == "torch":
                import torch

                self._views[framework] = map_tensors(self.numpy, torch.from_numpy)
            else:
                self._views[framework] = Block.random(self.nbytes)
        return self._views[framework]


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    kind = np.dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    words = rng.integers(0, 2**64, -(-nbytes // 8), dtype=np.uint64)
    return words.view(np.uint8)[:nbytes].view(kind).reshape(shape)


def _fill(shapes: Shapes, dtype: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: _random(rng, shape, dtype) for name, shape in shapes.items()}


def _scaled(scale: float) -> Callable[[int], int]:
    """Scale an extent that enters the size of a matrix twice, once for each axis."""
    root = math.sqrt(scale)
    return lambda extent: max(1, round(extent * root))


def llm_shapes(scale: float) -> Shapes:
    """Nine layers of the shapes of Llama 3.2 1B, with an output matrix of its own."""
    s = _scaled(scale)
    hidden, inner, kv, vocab = s(2048), s(8192), s(512), s(128256)
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(9):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv, hidden)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (kv, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def vgg16_shapes(scale: float) -> Shapes:
    """The convolutions and fully connected layers of VGG16, as torchvision names them."""
    s = _scaled(scale)
    shapes: Shapes = {}
    width = 3
    place = 0
    for repeats, channels in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(repeats):  # a convolution and its ReLU
            shapes[f"features.{place}.weight"] = (s(channels), width, 3, 3)
            shapes[f"features.{place}.bias"] = (s(channels),)
            width = s(channels)
            place += 2
        place += 1  # the pooling
    width *= 49
    for place, out in ((0, s(4096)), (3, s(4096)), (6, s(1000))):
        shapes[f"classifier.{place}.weight"] = (out, width)
        shapes[f"classifier.{place}.bias"] = (out,)
        width = out
    return shapes


def gpt_shapes(scale: float) -> Shapes:
    """Five layers of the width of GPT-2 small over a vocabulary of 8192."""
    s = _scaled(scale)
    hidden, inner = s(768), s(3072)
    shapes: Shapes = {"wte.weight": (s(8192), hidden), "wpe.weight": (s(1024), hidden)}
    for i in range(5):
        for name, out, into in (
            ("attn.c_attn", 3 * hidden, hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", inner, hidden),
            ("mlp.c_proj", hidden, inner),
        ):
            shapes[f"h.{i}.{name}.weight"] = (out, into)
            shapes[f"h.{i}.{name}.bias"] = (out,)
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{i}.{name}.weight"] = (hidden,)
            shapes[f"h.{i}.{name}.bias"] = (hidden,)
    return shapes


def _llm(scale: float, rng: np.random.Generator) -> Any:
    return _fill(llm_shapes(scale), "float16", rng)


def _vgg16(scale: float, rng: np.random.Generator) -> Any:
    return _fill(vgg16_shapes(scale), "float32", rng)


def _train(scale: float, rng: np.random.Generator) -> Any:
    """A training run: model, Adam's state under int keys, scalars, states of generators."""
    model = _fill(gpt_shapes(scale), "float32", rng)
    state = {
        i: {
            "step": np.array(1000.0, np.float32),
            "exp_avg": _random(rng, weight.shape, "float32"),
            "exp_avg_sq": _random(rng, weight.shape, "float32"),
        }
        for i, weight in enumerate(model.values())
    }
    group = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "params": list(state), "foreach": None}
    return {
        "model": model,
        "optimizer": {"state": state, "param_groups": [group]},
        "epoch": 3,
        "loss": 2.125,
        "finished": False,
        "rng": {"python": random.Random(7).getstate(), "torch": _random(rng, (5056,), "uint8")},
    }


def _small(count: int, size: int, name: str) -> Callable[[float, np.random.Generator], Any]:
    """`count` float32 tensors of `size` bytes, each with an allocation of its own."""

    def build(scale: float, rng: np.random.Generator) -> Any:
        n = max(1, round(count * scale))
        rows = _random(rng, (n, size // 4), "float32")
        return {name.format(i): row.copy() for i, row in enumerate(rows)}

    return build


WORKLOADS: tuple[Workload, ...] = (
    Workload(
        "llm",
        "84 tensors of a language model, float16",
        sum(math.prod(shape) for shape in llm_shapes(1).values()) * 2,
        _llm,
        (*TIMED, "fill", "open-one", "open-each", *MEMORY),
        limits=True,
    ),
    Workload(
        "many",
        "20,000 tensors of 1 KB, float32",
        20_000 * 1024,
        _small(20_000, 1024, "layers.{}.weight"),
        ("save-durable", "save", "fill", "load-eager", "load-mapped", "open-one", "open-each"),
        touched=False,
        limits=True,
    ),
    Workload(
        "vgg16",
        "the 32 tensors of VGG16, float32",
        sum(math.prod(shape) for shape in vgg16_shapes(1).values()) * 4,
        _vgg16,
        TIMED[:4],
        limits=True,
    ),
    Workload(
        "train",
        "model, Adam state, scalars and generators, nested, float32",
        sum(math.prod(shape) for shape in gpt_shapes(1).values()) * 12,
        _train,
        (*TIMED[:4], "fill", *MEMORY),
        nested=True,
    ),
    *(
        Workload(
            f"scaling-{count}",
            f"{count:,} tensors of 64 bytes, float32",
            count * 64,
            _small(count, 64, "w{}"),
            ("save", "load-mapped", "open-one"),
            rivals=False,
            touched=False,
        )
        for count in (10**3, 10**4, 10**5, 10**6)
    ),
)


def select(names: str) -> list[Workload]:
    """Workloads by comma-separated names; ``scaling`` stands for all of its sizes."""
    wanted = names.split(",")
    known = {w.name for w in WORKLOADS} | {w.name.partition("-")[0] for w in WORKLOADS}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"unknown workload {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return [w for w in WORKLOADS if w.name in wanted or w.name.partition("-")[0] in wanted]
