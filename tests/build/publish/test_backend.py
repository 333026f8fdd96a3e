"""Which backend serves an ONNX file: ours where it can be compiled, the python backend's where not, and why."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from build.contract import Target
from build.errors import RuntimeUnavailableError
from build.publish import backend
from build.publish.config import config
from build.publish.repository import recipe
from build.spec import Spec


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for libraries, and a machine without a compiler."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "libraries"


def compiler(alone: Path, name: str, code: str) -> Path:
    """A program of this name on PATH that does what the Python code says."""
    path = alone.parent / "bin" / name
    script = path.with_suffix(".py")
    script.write_text(f"import sys\nfrom pathlib import Path\n{code}\n")
    # Not a shebang of Python's: that cannot have a space in it.
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


WORKS = 'Path(sys.argv[sys.argv.index("-o") + 1]).write_bytes(b"library")'
FILES = {"libtriton_ssd_onnxruntime.so", "libonnxruntime.so.1", "manifest.json"}
SOURCES = {
    *("backend.cpp", "engine.cpp", "engine_onnxruntime.cpp", "engine_openvino.cpp", "instance.cpp", "model.cpp"),
    *(
        "config.h",
        "engine.h",
        "errors.h",
        "instance.h",
        "model.h",
        "onnxruntime.h",
        "openvino.h",
        "sha256.h",
        "triton.h",
    ),
}


def test_ours_is_installed_once_with_its_runtime(native: None, tmp_path: Path) -> None:
    chosen = backend.prepare(backends=tmp_path)
    assert (chosen.name, chosen.why, chosen.files) == ("ssd_onnxruntime", "compiled here", {})
    folder = tmp_path / "ssd_onnxruntime"
    licences = {"onnxruntime-LICENSE", "onnxruntime-ThirdPartyNotices.txt"}
    assert {path.name for path in folder.iterdir()} == FILES | licences
    for name, digest in chosen.libraries.items():
        data = (folder / name).read_bytes()
        assert data[:4] == b"\x7fELF"
        assert hashlib.sha256(data).hexdigest() == digest
    assert set(chosen.libraries) == FILES - {"manifest.json"}
    assert {path.name for path in chosen.sources} == SOURCES
    before = folder.stat().st_mtime_ns
    assert backend.prepare(backends=tmp_path) == chosen
    assert folder.stat().st_mtime_ns == before
    assert {path.name for path in tmp_path.iterdir()} == {"ssd_onnxruntime", ".ssd_onnxruntime.lock"}


DAMAGES = {
    "half a library": lambda folder: os.truncate(folder / "libtriton_ssd_onnxruntime.so", 3),
    "a flipped bit": lambda folder: (folder / "libonnxruntime.so.1").write_bytes(b"x"),
    "a missing library": lambda folder: (folder / "libonnxruntime.so.1").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a broken manifest": lambda folder: (folder / "manifest.json").write_text('{"files": 7}'),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_backend_is_named_and_installed_again(
    alone: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_onnxruntime", lambda: Path(__file__))  # a small file in place of 29 MB
    compiler(alone, "c++", WORKS)
    whole = backend.prepare(backends=alone)
    assert backend.damage(alone) == ""
    DAMAGES[what](alone / "ssd_onnxruntime")
    assert "ssd_onnxruntime" in backend.damage(alone)
    assert backend.look(backends=alone).libraries == {}
    assert backend.prepare(backends=alone) == whole
    assert backend.damage(alone) == ""


def test_nvidias_backend_can_be_asked_for(alone: Path, spec: Spec) -> None:
    chosen = backend.prepare("onnxruntime", alone)
    assert (chosen.name, chosen.files, chosen.libraries) == ("onnxruntime", {}, {})
    written = config(spec, 1, Target("onnxruntime"), "", chosen)
    assert written.backend == "onnxruntime"
    threads = written.parameters["threads"].string_value
    assert written.parameters["intra_op_thread_count"].string_value == threads
    assert written.parameters["inter_op_thread_count"].string_value == "1"
    assert not alone.exists()


def test_what_was_compiled_needs_no_compiler_any_more(alone: Path) -> None:
    program = compiler(alone, "c++", WORKS)
    chosen = backend.prepare(backends=alone)
    program.unlink()
    assert backend.prepare(backends=alone) == chosen


def test_only_prepare_compiles(alone: Path, spec: Spec) -> None:
    ran = alone.parent / "ran"
    compiler(alone, "c++", f"Path({str(ran)!r}).touch(); {WORKS}")
    chosen = backend.look(backends=alone)
    assert (chosen.name, chosen.libraries) == ("ssd_onnxruntime", {})
    assert chosen.why == "the next build compiles it with c++"
    target = Target("onnxruntime")
    for served_by in (chosen, backend.of({"serving": {"backend": "ssd_onnxruntime"}})):
        assert recipe(spec, target, served_by)["serving"]["backend"] == "ssd_onnxruntime"
        assert config(spec, 1, target, "", served_by).backend == "ssd_onnxruntime"
    assert not ran.exists()
    assert not alone.exists()
    built = backend.prepare(backends=alone)
    assert ran.exists()
    assert backend.look(backends=alone) == built
    assert recipe(spec, target, built) == recipe(spec, target, chosen)


def test_the_backend_of_a_published_version() -> None:
    assert backend.of({"serving": {"instances": 1}}) is None
    python, ours = (backend.of({"serving": {"backend": name}}) for name in (backend.PYTHON, backend.NATIVE))
    assert python
    assert ours
    assert (python.name, [path.name for path in python.sources]) == ("python", ["model.py"])
    assert (ours.name, ours.files) == ("ssd_onnxruntime", {})
    assert {path.name for path in ours.sources} == SOURCES


def test_without_a_compiler_it_is_the_python_backend(alone: Path) -> None:
    chosen = backend.prepare(backends=alone)
    assert (chosen.name, list(chosen.files)) == ("python", ["model.py"])
    assert chosen.why == "no C++ compiler on PATH (c++, g++, clang++)"
    assert chosen.sources == (chosen.files["model.py"],)
    with pytest.raises(RuntimeUnavailableError, match=r"no C\+\+ compiler.*\nwhat to do: install g\+\+"):
        backend.prepare("ssd_onnxruntime", alone)
    assert not alone.exists()


def test_the_python_backend_can_be_asked_for(tmp_path: Path) -> None:
    chosen = backend.prepare("python", tmp_path)
    assert (chosen.name, chosen.why) == ("python", "asked for")
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(alone: Path) -> None:
    compiler(alone, "g++", WORKS + '; sys.exit("backend.cpp:1: no <atomic>\\nand more")')
    chosen = backend.prepare(backends=alone)
    assert (chosen.name, chosen.why) == ("python", "g++ cannot compile ssd_onnxruntime: backend.cpp:1: no <atomic>")
    with pytest.raises(RuntimeUnavailableError, match=r"no <atomic>\nlikely because: .*C\+\+17"):
        backend.prepare("ssd_onnxruntime", alone)
    assert {path.name for path in alone.iterdir()} == {".ssd_onnxruntime.lock"}


def test_a_compiler_that_hangs_is_given_up(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(alone, "c++", "import time; time.sleep(60)")
    monkeypatch.setattr(backend, "_PATIENCE", 0.5)
    assert "timed out" in backend.prepare(backends=alone).why


def test_a_folder_that_cannot_be_written(alone: Path) -> None:
    compiler(alone, "c++", WORKS)
    alone.write_text("a file where the folder should be")
    assert f"{alone}: the backend cannot be installed: File exists" in backend.prepare(backends=alone).why


def test_cxx_names_the_compiler_with_its_options(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(alone, "c++", "sys.exit(1)")
    other = compiler(alone, "other", f'assert sys.argv[1] == "-fancy"; {WORKS}')
    monkeypatch.setenv("CXX", f"{other} -fancy")
    assert backend.prepare(backends=alone).name == "ssd_onnxruntime"
    monkeypatch.setenv("CXX", os.devnull)
    assert "/dev/null cannot compile" in backend.prepare(backends=alone / "again").why


def test_other_sources_are_compiled_again(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(alone, "c++", WORKS)
    first = backend.prepare(backends=alone)
    before = backend.installed(alone)["built_from"]
    monkeypatch.setattr(backend, "_FLAGS", (*backend._FLAGS, "-O3"))
    assert backend.look(backends=alone).libraries == {}
    assert backend.prepare(backends=alone) == first
    assert backend.installed(alone)["built_from"] != before


def test_an_onnxruntime_without_its_library(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(alone, "c++", WORKS)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "holds no libonnxruntime.so" in backend.prepare(backends=alone).why


def test_sha256_in_cpp_is_sha256(native: None, tmp_path: Path) -> None:
    """Every length around the ends of its blocks."""
    source = Path(backend.__file__).parent / "backends" / backend.NATIVE
    code = tmp_path / "digest.cpp"
    code.write_text(
        '#include "sha256.h"\nextern "C" void digest(char const* data, size_t size, char* out)\n'
        "{ std::memcpy(out, sha256::digest(std::string(data, size)).data(), 64); }\n"
    )
    library = tmp_path / "digest.so"
    compiler = backend._compiler()
    command = [*compiler, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{source}", "-o", str(library), str(code)]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).digest
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p]
    data = bytes(range(256)) * 4
    for size in [*range(200), 1000]:
        digest = ctypes.create_string_buffer(64)
        function(data[:size], size, digest)
        assert digest.raw.decode() == hashlib.sha256(data[:size]).hexdigest(), size
