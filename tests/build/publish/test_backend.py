"""Which backend serves an ONNX file: ours where it can be compiled, the python backend's where not, and why."""

from __future__ import annotations

import os
import shlex
import stat
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


def test_ours_is_compiled_once_and_lies_with_its_runtime(native: None, tmp_path: Path) -> None:
    chosen = backend.prepare(libraries=tmp_path)
    assert (chosen.name, chosen.why) == ("ssd_onnxruntime", "compiled here")
    assert set(chosen.files) == {"libtriton_ssd_onnxruntime.so", "libonnxruntime.so.1"}
    library = chosen.files["libtriton_ssd_onnxruntime.so"]
    assert library.read_bytes()[:4] == b"\x7fELF"
    assert chosen.files["libonnxruntime.so.1"].read_bytes()[:4] == b"\x7fELF"
    assert {path.name for path in chosen.sources} == {"backend.cpp", "onnxruntime.h", "triton.h"}
    before = library.stat().st_mtime_ns
    assert backend.prepare(libraries=tmp_path) == chosen
    assert library.stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == [library.name]


def test_what_was_compiled_needs_no_compiler_any_more(alone: Path) -> None:
    program = compiler(alone, "c++", WORKS)
    chosen = backend.prepare(libraries=alone)
    program.unlink()
    assert backend.prepare(libraries=alone) == chosen


def test_only_prepare_compiles(alone: Path, spec: Spec) -> None:
    ran = alone.parent / "ran"
    compiler(alone, "c++", f"Path({str(ran)!r}).touch(); {WORKS}")
    chosen = backend.look(libraries=alone)
    assert (chosen.name, chosen.files) == ("ssd_onnxruntime", {})
    assert chosen.why == "the next build compiles it with c++"
    target = Target("onnxruntime")
    for served_by in (chosen, backend.of({"serving": {"backend": "ssd_onnxruntime"}})):
        assert recipe(spec, target, served_by)["serving"]["backend"] == "ssd_onnxruntime"
        assert config(spec, 1, target, "", served_by).backend == "ssd_onnxruntime"
    assert not ran.exists()
    assert not alone.exists()
    built = backend.prepare(libraries=alone)
    assert ran.exists()
    assert backend.look(libraries=alone) == built
    assert recipe(spec, target, built) == recipe(spec, target, chosen)


def test_the_backend_of_a_published_version() -> None:
    assert backend.of({"serving": {"instances": 1}}) is None
    python, ours = (backend.of({"serving": {"backend": name}}) for name in (backend.PYTHON, backend.NATIVE))
    assert python
    assert ours
    assert (python.name, [path.name for path in python.sources]) == ("python", ["model.py"])
    assert (ours.name, ours.files) == ("ssd_onnxruntime", {})
    assert {path.name for path in ours.sources} == {"backend.cpp", "onnxruntime.h", "triton.h"}


def test_without_a_compiler_it_is_the_python_backend(alone: Path) -> None:
    chosen = backend.prepare(libraries=alone)
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
    chosen = backend.prepare(libraries=alone)
    assert (chosen.name, chosen.why) == ("python", "g++ cannot compile ssd_onnxruntime: backend.cpp:1: no <atomic>")
    with pytest.raises(RuntimeUnavailableError, match=r"no <atomic>\nlikely because: .*C\+\+17"):
        backend.prepare("ssd_onnxruntime", alone)
    assert not list(alone.iterdir())


def test_a_compiler_that_hangs_is_given_up(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(alone, "c++", "import time; time.sleep(60)")
    monkeypatch.setattr(backend, "_PATIENCE", 0.5)
    assert "timed out" in backend.prepare(libraries=alone).why


def test_a_folder_that_cannot_be_written(alone: Path) -> None:
    compiler(alone, "c++", WORKS)
    alone.write_text("a file where the folder should be")
    assert f"{alone} cannot be written" in backend.prepare(libraries=alone).why


def test_cxx_names_the_compiler_with_its_options(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(alone, "c++", "sys.exit(1)")
    other = compiler(alone, "other", f'assert sys.argv[1] == "-fancy"; {WORKS}')
    monkeypatch.setenv("CXX", f"{other} -fancy")
    assert backend.prepare(libraries=alone).name == "ssd_onnxruntime"
    monkeypatch.setenv("CXX", os.devnull)
    assert "/dev/null cannot compile" in backend.prepare(libraries=alone / "again").why


def test_another_source_is_another_library(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(alone, "c++", WORKS)
    first = backend.prepare(libraries=alone).files["libtriton_ssd_onnxruntime.so"]
    monkeypatch.setattr(backend, "_FLAGS", (*backend._FLAGS, "-O3"))
    assert backend.prepare(libraries=alone).files["libtriton_ssd_onnxruntime.so"] != first
    assert first.is_file()


def test_an_onnxruntime_without_its_library(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(alone, "c++", WORKS)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "holds no libonnxruntime.so" in backend.prepare(libraries=alone).why
