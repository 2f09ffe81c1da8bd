"""Build the C extensions; everything else stands in pyproject.toml.

Environment:

HOLDFAST_SANITIZE=address,undefined   instrument with these sanitizers
HOLDFAST_DEBUG=1                      no optimization, assertions on
HOLDFAST_WERROR=1                     warnings of our own C are errors
HOLDFAST_ONLY=_engine,...             build only these extensions (while working on one)
"""

import os
import sys
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

CSRC = Path("csrc")
HEADERS = sorted(str(path) for path in CSRC.glob("*.h"))
ENGINE = ["sys", "threads", "crc", "crc_x86", "strided", "memory", "kept", "segments"]
ENGINE += ["write", "read", "checksum", "uncached", "place", "rights", "draft", "closing"]
ENGINE += ["publish"]
ENGINE += ["beneath", "files", "tree", "folder"]
HEADER = ["json", "header_names", "header_check", "header_scan", "header_compact", "header_emit"]
HEADER += ["crc", "crc_x86"]
GGUF = ["gguf_scan", "dequantize", "threads", "memory", "kept", "sys"]
ZIP = ["zip_scan", "zip_local", "zip_emit", "header_names", "crc", "crc_x86"]

define = [("_GNU_SOURCE", "1"), ("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")]
compile_args = ["-std=c11", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
link_args = ["-pthread"]

if os.environ.get("HOLDFAST_DEBUG"):
    compile_args += ["-O0", "-g3", "-UNDEBUG"]
else:
    compile_args += ["-O3", "-g1"]
if sanitizers := os.environ.get("HOLDFAST_SANITIZE"):
    compile_args += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-UNDEBUG"]
    compile_args += ["-fno-omit-frame-pointer"]
    link_args += [f"-fsanitize={sanitizers}"]
if os.environ.get("HOLDFAST_WERROR"):
    # Cython's output is not ours to keep clean of unused parameters.
    compile_args += ["-Werror", "-Wno-unused-parameter", "-Wno-unused-function"]


def extension(
    name: str, sources: list[str], include: tuple[str, ...] = (), args: tuple[str, ...] = ()
) -> Extension:
    """One extension module: its .pyx and the C files that it is linked with."""
    pyx = Path("src") / (name.replace(".", "/") + ".pyx")
    csrc = [str(CSRC / f"{source}.c") for source in sources]
    shared = [str(path) for kind in ("*.pxd", "*.pxi") for path in sorted(pyx.parent.glob(kind))]
    depends = [*HEADERS, *shared, str(pyx)]
    return Extension(
        name,
        [str(pyx), *csrc],
        include_dirs=[str(CSRC), *include],
        define_macros=define,
        extra_compile_args=[*compile_args, *args],
        extra_link_args=link_args,
        depends=depends,
    )


extensions = [
    extension("holdfast._buffer", []),
    extension("holdfast._engine", ENGINE),
    extension("holdfast._dicts", []),
    extension("holdfast.formats._header", HEADER),
    extension("holdfast.formats._zip", ZIP),
    extension("holdfast.formats._crc", ["crc", "crc_x86"]),
    extension("holdfast.formats._inert", []),
    # Of a * b + c both results are rounded, as the numbers that others make of the same blocks are.
    extension("holdfast.formats._gguf", GGUF, args=("-ffp-contract=off",)),
    extension("holdfast.formats._pickle_stack", []),
    extension("holdfast.formats._pickle", []),
    extension("holdfast.formats._torch_table", []),
    extension("holdfast.formats._torch_usual", []),
    extension("holdfast.formats._torch_outline", []),
    extension("holdfast.formats._torch_replay", []),
    extension("holdfast.formats._oneflow_pickle_scan", []),
    extension("holdfast.formats._pickle_emit", []),
    extension("holdfast.adapters._numpy", [], (numpy.get_include(),)),
    extension("holdfast.adapters._dlpack", ["dlpack"]),
    extension("holdfast.adapters._torch_place", []),
]
if only := os.environ.get("HOLDFAST_ONLY"):
    wanted = only.split(",")
    extensions = [e for e in extensions if e.name.rpartition(".")[2] in wanted]

building = not {"egg_info", "dist_info", "clean", "sdist"} & set(sys.argv[1:])
setup(
    ext_modules=cythonize(
        extensions,
        build_dir="build/cython",
        language_level=3,
        compiler_directives={"embedsignature": True, "binding": True},
        quiet=True,
        show_all_warnings=False,
    )
    if building
    else extensions,
)
