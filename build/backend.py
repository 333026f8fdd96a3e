"""What runs a model's ONNX file inside tritonserver on a CPU: our own backend in C++, else the python backend.

Both are in build/backends/<Triton's name of it>/ and give the same answers. Ours runs in the server's process and
copies nothing (docs/perf.md: what that gains). It is compiled here the first time that it is published, which takes a
C++ compiler and the ONNX Runtime library of the installed package, no other headers or libraries.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build.errors import RuntimeUnavailableError

NATIVE, PYTHON = "ssd_onnxruntime", "python"
LIBRARIES = Path(__file__).resolve().parent.parent / "artifacts" / "backend"

# Measured: docs/perf.md.
SLOWER = "with a C++ compiler (g++ or clang++) it would be served 4 to 15 % faster: install one and publish again"

_SOURCES = Path(__file__).resolve().parent / "backends"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")
_PATIENCE = 120  # seconds; it takes two


@dataclass(frozen=True)
class Backend:
    """A Triton backend for ONNX files, ready to be published.

    Attributes:
        name: Triton's name of it, for config.pbtxt.
        why: why it is this one.
        files: what goes into a version folder beside model.onnx, by its name there.
        sources: what those are made of in this repository.
    """

    name: str
    why: str
    files: Mapping[str, Path]
    sources: tuple[Path, ...]


def choose(wanted: str = "auto", libraries: Path = LIBRARIES) -> Backend:
    """The backend to publish ONNX files with; compiles it where that was not done yet.

    Args:
        wanted: auto (ours where it can be compiled), ssd_onnxruntime or python: `[serving] backend` of spec.toml.
        libraries: where compiled ones are kept, by the digest of their source.

    Raises:
        RuntimeUnavailableError: ours was asked for and cannot be had.
    """
    if wanted == PYTHON:
        return _python("asked for")
    try:
        files = {f"libtriton_{NATIVE}.so": _compiled(libraries), "libonnxruntime.so.1": _onnxruntime()}
    except RuntimeUnavailableError as error:
        if wanted == NATIVE:
            raise
        return _python(error.what)
    return Backend(NATIVE, "asked for" if wanted == NATIVE else "compiled here", files, _native_sources())


def _python(why: str) -> Backend:
    source = _SOURCES / PYTHON / "model.py"
    return Backend(PYTHON, why, {source.name: source}, (source,))


def _native_sources() -> tuple[Path, ...]:
    return tuple(sorted(path for path in (_SOURCES / NATIVE).iterdir() if path.suffix in (".cpp", ".h")))


def _onnxruntime() -> Path:
    """The ONNX Runtime library with its C interface, which lies in the package beside Python's own."""
    spec = importlib.util.find_spec("onnxruntime")
    folder = Path(spec.origin).parent / "capi" if spec and spec.origin else None
    found = sorted(folder.glob("libonnxruntime.so.*")) if folder else []
    if not found:
        raise RuntimeUnavailableError(
            f"the installed onnxruntime holds no libonnxruntime.so ({folder or 'it is not installed'})",
            why="its wheel is another than PyPI's for Linux",
            fix='pip install onnxruntime, or publish with [serving] backend = "python"',
        )
    return found[0]


def _compiled(libraries: Path) -> Path:
    """Our backend's library.

    Raises:
        RuntimeUnavailableError: there is no compiler, it fails, or its result cannot be kept.
    """
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for source in _native_sources():
        digest.update(source.read_bytes())
    library = libraries / f"libtriton_{NATIVE}-{digest.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    compiler = shlex.split(os.environ.get("CXX", "")) or [name for name in _COMPILERS if shutil.which(name)][:1]
    if not compiler:
        raise RuntimeUnavailableError(
            f"no C++ compiler on PATH ({', '.join(_COMPILERS)})", fix="install g++, or set CXX"
        )
    try:
        libraries.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".compiling-", dir=libraries) as folder:
            made = Path(folder) / library.name
            _compile(compiler, made)
            made.replace(library)
    except OSError as error:
        raise RuntimeUnavailableError(
            f"{libraries} cannot be written: {error.strerror}", fix="free some space, or let this user write there"
        ) from None
    return library


def _compile(compiler: Sequence[str], made: Path) -> None:
    command = [*compiler, *_FLAGS, "-o", str(made), str(_SOURCES / NATIVE / "backend.cpp"), "-ldl"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE)
        failed = done.returncode and (done.stderr.strip() or f"exit status {done.returncode}")
    except (OSError, subprocess.TimeoutExpired) as error:
        failed = str(error)
    if failed:
        raise RuntimeUnavailableError(
            f"{compiler[0]} cannot compile {NATIVE}: {failed.splitlines()[0]}",
            why="it is older than C++17, or its standard library's headers are not installed",
            fix="install g++ 8 or newer, or set CXX to another compiler",
        )
