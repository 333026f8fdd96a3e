"""The C++ backend under AddressSanitizer and UndefinedBehaviorSanitizer in a real server, with a planted overflow."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from build.contract import Target
from build.errors import ServeError
from build.graph.attach import attach
from build.publish import backend, repository
from build.serve import TritonServer
from build.spec import load
from tests.build import tiny_model
from tests.reliability.fuzz import fuzz

FLAGS = ("-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-omit-frame-pointer")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr")
WHERE = "engine.h"
# A buffer of half its size: the first image that is copied to it runs over.
PLANTED = ("mMemory.resize(bytes + kAlignment);", "mMemory.resize(bytes / 2 + kAlignment);")


def library_of(compiler: str, name: str) -> Path | None:
    """A library of a compiler's own; None where it has none."""
    done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
    path = Path(done.stdout.strip())
    return path if path.is_file() else None


@pytest.fixture
def preloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The compiler; its sanitizers are loaded into every program that the test starts."""
    compiler = shutil.which("g++")
    libraries = [library_of(compiler, name) for name in ("libasan.so", "libubsan.so")] if compiler else [None]
    if not all(libraries):
        pytest.skip("needs g++ with libasan and libubsan")
    monkeypatch.setenv("LD_PRELOAD", ":".join(str(path.resolve()) for path in libraries if path))
    # Leaks are not looked at: tritonserver itself has some at its end.
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0:verify_asan_link_order=0:abort_on_error=1:handle_segv=1")
    monkeypatch.setenv("UBSAN_OPTIONS", "print_stacktrace=1")
    assert compiler
    return compiler


def sanitized(compiler: str, folder: Path, planted: bool) -> Path:
    """A folder of backends with ours, compiled with sanitizers."""
    target = folder / backend.NATIVE
    shutil.copytree(backend.BACKENDS / backend.NATIVE, target)
    sources = folder / "sources"
    shutil.copytree(Path(backend.__file__).parent / "backends" / backend.NATIVE, sources)
    code = (sources / WHERE).read_text()
    if planted:
        (sources / WHERE).write_text(code.replace(*PLANTED))
    library = target / backend.LIBRARY
    command = [compiler, *FLAGS, *SANITIZE, "-o", str(library), *map(str, sources.glob("*.cpp")), "-ldl"]
    subprocess.run(command, check=True, env={"PATH": "/usr/bin:/bin"})
    shutil.rmtree(sources)
    facts = json.loads((target / backend.INSTALLED).read_bytes())
    facts["files"][library.name] = hashlib.sha256(library.read_bytes()).hexdigest()
    (target / backend.INSTALLED).write_text(json.dumps(facts))
    return folder


def test_the_planted_overflow_is_still_there_to_plant() -> None:
    code = (Path(backend.__file__).parent / "backends" / backend.NATIVE / WHERE).read_text()
    assert code.count(PLANTED[0]) == 1


@pytest.mark.triton
@pytest.mark.long
def test_fuzzed_requests_touch_nothing_that_is_not_theirs(native: None, preloaded: str, tmp_path: Path) -> None:
    spec = load(tiny_model.write(tmp_path / "models" / "tiny"))
    built = tmp_path / "built.onnx"
    built.write_bytes(attach(spec).SerializeToString())
    root = tmp_path / "model_repository"
    repository.publish(spec, built, root, Target("onnxruntime"), served_by=backend.prepare(backend.NATIVE))
    with TritonServer(root, backends=sanitized(preloaded, tmp_path / "whole", planted=False)) as server:
        maps = Path(f"/proc/{server.pid}/maps").read_text()
        assert "libasan" in maps
        counts = fuzz(server, requests=1500, seed=3)
        server.check()
        log = server.log_path.read_text(errors="replace")
    assert "Sanitizer" not in log, log[log.index("Sanitizer") - 200 :][:4000]
    assert "runtime error" not in log, log[log.index("runtime error") - 200 :][:4000]
    assert counts["answered"] > 50
    backends, log_of_planted = sanitized(preloaded, tmp_path / "planted", planted=True), tmp_path / "planted.log"
    with pytest.raises(ServeError, match="ABORTING"):
        TritonServer(root, backends=backends, log=log_of_planted).start()
    assert "AddressSanitizer: heap-buffer-overflow" in log_of_planted.read_text(errors="replace")
