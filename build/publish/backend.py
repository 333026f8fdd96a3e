"""What runs a model's ONNX file inside tritonserver on a CPU: our own backend in C++, else the python backend.

Both lie in build/publish/backends/, each in a folder of Triton's name for it, and give the same answers. Ours runs in
the server's process and copies nothing (docs/perf.md has the gain). The first publish compiles it. That takes a C++
compiler and the ONNX Runtime library of the installed package, and no other headers or libraries.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build.errors import RuntimeUnavailableError, WriteError
from build.files import ARTIFACTS, replacing
from build.publish import openvino

NATIVE, PYTHON = "ssd_onnxruntime", "python"
LIBRARIES = ARTIFACTS / "backend"

# Measured: docs/perf.md.
SLOWER = "with a C++ compiler (g++ or clang++) it would be served 4 to 15 % faster: install one and publish again"

_SOURCES = Path(__file__).resolve().parent / "backends"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")
_PATIENCE = 120  # seconds; it takes two


@dataclass(frozen=True)
class Backend:
    """A Triton backend for ONNX files.

    Attributes:
        name: Triton's name for it, in config.pbtxt.
        why: the reason for choosing it.
        files: the files beside model.onnx in a version folder, by their name there; empty until it is compiled.
        sources: the files of this project that those are built from.
        engine: what runs the file in it: onnxruntime or openvino.
    """

    name: str
    why: str
    files: Mapping[str, Path]
    sources: tuple[Path, ...]
    engine: str = openvino.OTHER


def look(wanted: str = "auto", libraries: Path = LIBRARIES) -> Backend:
    """The backend that the next build would use for ONNX files, as far as that is known without compiling anything.

    Args:
        wanted: `[serving] backend` of spec.toml: auto (ours if it can be compiled), ssd_onnxruntime or python.
        libraries: the folder of compiled libraries, which are named by the digest of their sources.

    Raises:
        RuntimeUnavailableError: ours was asked for and cannot be compiled.
    """
    return _choose(wanted, libraries, compile_it=False)


def prepare(wanted: str = "auto", libraries: Path = LIBRARIES) -> Backend:
    """The backend to publish ONNX files with; compiles it if that was not done before (two seconds).

    Args:
        wanted, libraries: as for `look`.

    Raises:
        RuntimeUnavailableError: ours was asked for and cannot be compiled.
    """
    return _choose(wanted, libraries, compile_it=True)


def _choose(wanted: str, libraries: Path, *, compile_it: bool) -> Backend:
    if wanted == PYTHON:
        return _python("asked for")
    library = _library(libraries)
    try:
        runtime = _onnxruntime()
        if not library.is_file():
            compiler = _compiler()
            if not compile_it:
                return Backend(NATIVE, f"the next build compiles it with {compiler[0]}", {}, _native_sources())
            _compile(compiler, library)
    except RuntimeUnavailableError as error:
        if wanted == NATIVE:
            raise
        return _python(error.what)
    files = {f"libtriton_{NATIVE}.so": library, "libonnxruntime.so.1": runtime}
    return Backend(NATIVE, "asked for" if wanted == NATIVE else "compiled here", files, _native_sources())


def of(manifest: Mapping[str, Any]) -> Backend | None:
    """The backend that a published version has, from its manifest alone; None for a plan."""
    name = manifest.get("serving", {}).get("backend")
    if name is None:
        return None
    if manifest["serving"].get("engine") == openvino.NAME:
        return with_openvino("published")
    return _python("published") if name == PYTHON else Backend(name, "published", {}, _native_sources())


def with_openvino(why: str) -> Backend:
    """The python backend with OpenVINO in it."""
    files = {source.name: source for source in (_SOURCES / PYTHON / "model.py", openvino.SESSION)}
    return Backend(PYTHON, why, files, tuple(files.values()), openvino.NAME)


def _python(why: str) -> Backend:
    source = _SOURCES / PYTHON / "model.py"
    return Backend(PYTHON, why, {source.name: source}, (source,))


def _native_sources() -> tuple[Path, ...]:
    return tuple(sorted(path for path in (_SOURCES / NATIVE).iterdir() if path.suffix in (".cpp", ".h")))


def _onnxruntime() -> Path:
    """The ONNX Runtime library with its C interface, which lies in the package beside Python's own."""
    spec = importlib.util.find_spec("onnxruntime")
    folder = Path(spec.origin).parent / "capi" if spec and spec.origin else None
    libraries = sorted(folder.glob("libonnxruntime.so.*")) if folder else []
    if not libraries:
        raise RuntimeUnavailableError(
            f"the installed onnxruntime holds no libonnxruntime.so ({folder or 'it is not installed'})",
            why="its wheel is another than PyPI's for Linux",
            fix='pip install onnxruntime, or publish with [serving] backend = "python"',
        )
    return libraries[0]


def _library(libraries: Path) -> Path:
    """Where our backend's library of these sources is kept."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for source in _native_sources():
        digest.update(source.read_bytes())
    return libraries / f"libtriton_{NATIVE}-{digest.hexdigest()[:16]}.so"


def _compiler() -> Sequence[str]:
    """The command of the C++ compiler.

    Raises:
        RuntimeUnavailableError: there is none.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [name for name in _COMPILERS if shutil.which(name)][:1]
    if not compiler:
        raise RuntimeUnavailableError(
            f"no C++ compiler on PATH ({', '.join(_COMPILERS)})", fix="install g++, or set CXX"
        )
    return compiler


def _compile(compiler: Sequence[str], library: Path) -> None:
    """Compiles our backend's library, whole or not at all.

    Raises:
        RuntimeUnavailableError: the compiler fails, or its result cannot be kept.
    """
    try:
        with replacing(library) as unfinished:
            _run(compiler, unfinished)
    except WriteError as error:
        raise RuntimeUnavailableError(
            f"{library.parent} cannot be written: {error.what}", why=error.why, fix=error.fix
        ) from None


def _run(compiler: Sequence[str], library: Path) -> None:
    command = [*compiler, *_FLAGS, "-o", str(library), str(_SOURCES / NATIVE / "backend.cpp"), "-ldl"]
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
