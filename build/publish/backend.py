"""What runs a model's ONNX file inside tritonserver on a CPU: our own backend in C++, else the python backend.

Both lie in build/publish/backends/, each in a folder of Triton's name for it, and give the same answers. Ours runs in
the server's process and copies nothing (docs/perf.md has the gain). The first publish compiles it into `backends/`,
beside the model repository, for `tritonserver --backend-directory`; version folders hold data only. That takes a C++
compiler and the ONNX Runtime library of the installed package, and no other headers or libraries. OpenVINO's libraries
lie in the same folder, from the first model on that OpenVINO serves.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from build import files
from build.errors import RuntimeUnavailableError
from build.files import ROOT, explained, locked
from build.publish import openvino

NATIVE, PYTHON, NVIDIA = "ssd_onnxruntime", "python", "onnxruntime"
BACKENDS = ROOT / "backends"
LIBRARY, RUNTIME, INSTALLED = f"libtriton_{NATIVE}.so", "libonnxruntime.so.1", "manifest.json"

# Measured: docs/perf.md.
SLOWER = "with a C++ compiler (g++ or clang++) it would be served 4 to 15 % faster: install one and publish again"
AGAIN = "install it again: ./invoke build-engines"

_SOURCES = Path(__file__).resolve().parent / "backends"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")
_LICENCES = ("LICENSE", "ThirdPartyNotices.txt")  # of ONNX Runtime's package
_PATIENCE = 120  # seconds; it takes five


@dataclass(frozen=True)
class Backend:
    """A Triton backend for ONNX files.

    Attributes:
        name: Triton's name for it, in config.pbtxt.
        why: the reason for choosing it.
        files: the files beside model.onnx in a version folder, by their name there.
        sources: the files of this project that it is made from.
        libraries: SHA-256 of the libraries in the folder of backends that it runs a file with, by name; empty until it
            is compiled, and where the server brings the backend.
        engine: what runs the file in it: onnxruntime or openvino.
    """

    name: str
    why: str
    files: Mapping[str, Path]
    sources: tuple[Path, ...]
    libraries: Mapping[str, str] = field(default_factory=dict)
    engine: str = openvino.OTHER


def look(wanted: str = "auto", backends: Path = BACKENDS) -> Backend:
    """The backend that the next build would use for ONNX files, as far as that is known without compiling anything.

    Args:
        wanted: `[serving] backend` of spec.toml: auto (ours if it can be compiled), ssd_onnxruntime, python, or
            onnxruntime (NVIDIA's, which comes with a server).
        backends: the folder of backends, one folder each.

    Raises:
        RuntimeUnavailableError: ours was asked for and cannot be compiled.
    """
    return _choose(wanted, backends, compile_it=False)


def prepare(wanted: str = "auto", backends: Path = BACKENDS, engine: str = openvino.OTHER) -> Backend:
    """The backend to publish ONNX files with; installs ours where it is missing, damaged or of other sources (5 s).

    Args:
        wanted, backends: as for `look`.
        engine: onnxruntime or openvino; OpenVINO must be installed.

    Raises:
        RuntimeUnavailableError: ours was asked for, or is needed for OpenVINO, and cannot be compiled.
    """
    if engine == openvino.OTHER:
        return _choose(wanted, backends, compile_it=True)
    if wanted in (PYTHON, NVIDIA):
        raise RuntimeUnavailableError(
            f'[serving] backend = "{wanted}" does not run OpenVINO',
            fix=f'set it to "{NATIVE}" or "auto", or set engine = "onnxruntime"',
        )
    libraries = openvino.libraries()
    chosen = _choose(NATIVE, backends, compile_it=True, more=libraries)
    held = installed(backends)["files"]
    return with_openvino("compiled here", {name: held[name] for name in (LIBRARY, *libraries)}, chosen.sources)


def _choose(
    wanted: str, backends: Path, *, compile_it: bool, more: Mapping[str, Path] = MappingProxyType({})
) -> Backend:
    if wanted == PYTHON:
        return _python("asked for")
    if wanted == NVIDIA:
        return Backend(NVIDIA, "asked for; it comes with the server (NVIDIA's containers have it)", {}, ())
    try:
        runtime = _onnxruntime()
        digest = _digest(runtime)
        facts = installed(backends)
        held = facts.get("files", {})
        lacking = any(held.get(name) != files.sha256(path) for name, path in more.items())
        if facts.get("built_from") != digest or lacking or damage(backends):
            compiler = _compiler()
            if not compile_it:
                return Backend(NATIVE, f"the next build compiles it with {compiler[0]}", {}, _native_sources())
            _install(compiler, runtime, digest, backends, more or _kept(backends))
            held = installed(backends)["files"]
    except RuntimeUnavailableError as error:
        if wanted == NATIVE:
            raise
        return _python(error.what)
    why = "asked for" if wanted == NATIVE else "compiled here"
    return Backend(NATIVE, why, {}, _native_sources(), {name: held[name] for name in (LIBRARY, RUNTIME)})


def of(manifest: Mapping[str, Any]) -> Backend | None:
    """The backend that a published version has, from its manifest alone; None for a plan."""
    name = manifest.get("serving", {}).get("backend")
    if name is None:
        return None
    if manifest["serving"].get("engine") == openvino.NAME:
        return with_openvino("published")
    if name == PYTHON:
        return _python("published")
    return Backend(name, "published", {}, _native_sources() if name == NATIVE else ())


def installed(backends: Path = BACKENDS) -> dict[str, Any]:
    """What is installed of our backend: `built_from` (a digest), `onnxruntime` (its version), `files` (name: SHA-256).

    Returns:
        An empty dict where nothing readable is installed.
    """
    try:
        facts = json.loads((backends / NATIVE / INSTALLED).read_bytes())
        return facts if {LIBRARY, RUNTIME} <= facts["files"].keys() and "built_from" in facts else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def damage(backends: Path = BACKENDS) -> str:
    """What is wrong with the installed backend, in words; empty if it is as it was installed."""
    facts = installed(backends)
    if not facts:
        return f"{files.relative(backends / NATIVE)} holds no whole {NATIVE}"
    for name, digest in facts["files"].items():
        try:
            if files.sha256(backends / NATIVE / name) != digest:
                return f"{files.relative(backends / NATIVE / name)} is not as it was installed"
        except OSError as error:
            return str(error)
    return ""


def with_openvino(
    why: str, libraries: Mapping[str, str] | None = None, sources: Sequence[Path] | None = None
) -> Backend:
    """Ours with OpenVINO in it.

    Args:
        why, libraries, sources: as Backend has them; None = not known, and those of this project.
    """
    return Backend(NATIVE, why, {}, tuple(sources or _native_sources()), libraries or {}, engine=openvino.NAME)


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


def _digest(runtime: Path) -> str:
    """What decides our backend's libraries: its sources, the compiler's flags and ONNX Runtime's version."""
    digest = hashlib.sha256(" ".join((*_FLAGS, runtime.name)).encode())
    for source in _native_sources():
        digest.update(source.read_bytes())
    return digest.hexdigest()


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


def _kept(backends: Path) -> dict[str, Path]:
    """The libraries of OpenVINO that an installed backend has and that are whole: they stay when it is made anew."""
    held = installed(backends).get("files", {})
    paths = {name: backends / NATIVE / name for name in held if name not in (LIBRARY, RUNTIME)}
    try:
        return paths if all(files.sha256(path) == held[name] for name, path in paths.items()) else openvino.libraries()
    except (OSError, RuntimeUnavailableError):
        return {}


def _install(compiler: Sequence[str], runtime: Path, digest: str, backends: Path, more: Mapping[str, Path]) -> None:
    """Puts our backend's folder in place, whole or not at all. A server that has the old one loaded keeps it.

    Args:
        compiler: its command.
        runtime: ONNX Runtime's library.
        digest: of what the library is built from.
        backends: the folder of backends.
        more: libraries of OpenVINO, by name.

    Raises:
        RuntimeUnavailableError: the compiler fails, or its result cannot be kept.
    """
    with (
        explained(backends, "the backend cannot be installed", RuntimeUnavailableError),
        locked(backends / f".{NATIVE}.lock"),
        tempfile.TemporaryDirectory(prefix=f".{NATIVE}-", dir=backends) as name,
    ):
        new, old = Path(name) / "new", Path(name) / "old"
        new.mkdir()
        _run(compiler, new / LIBRARY)
        copied = {RUNTIME: runtime, **more}
        licences = {f"onnxruntime-{name}": runtime.parent.parent / name for name in _LICENCES}
        licences |= openvino.licences() if more else {}
        for target, source in {**copied, **licences}.items():
            if source.is_file() or target in copied:
                shutil.copyfile(source, new / target)
        digests = {library: files.sha256(new / library) for library in (LIBRARY, *copied)}
        version = importlib.metadata.version("onnxruntime")
        files.write_json(new / INSTALLED, {"built_from": digest, "onnxruntime": version, "files": digests})
        place = backends / NATIVE
        if place.exists():
            place.rename(old)
        new.rename(place)


def _run(compiler: Sequence[str], library: Path) -> None:
    code = [str(path) for path in _native_sources() if path.suffix == ".cpp"]
    command = [*compiler, *_FLAGS, "-o", str(library), *code, "-ldl"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE)
        failed = done.returncode and (done.stderr.strip() or f"exit status {done.returncode}")
        if not failed and not library.is_file():
            failed = "it wrote no library"
    except (OSError, subprocess.TimeoutExpired) as error:
        failed = str(error)
    if failed:
        raise RuntimeUnavailableError(
            f"{compiler[0]} cannot compile {NATIVE}: {failed.splitlines()[0]}",
            why="it is older than C++17, or its standard library's headers are not installed",
            fix="install g++ 8 or newer, or set CXX to another compiler",
        )
