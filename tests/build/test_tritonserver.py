"""Finding and starting a tritonserver, with programs that stand in for it where the real one cannot be made to fail."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from build import tritonserver
from build.errors import ServeError
from build.serve import TritonServer


def program(folder: Path, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / "tritonserver"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def make(script: str) -> None:
        program(tmp_path / "bin", script)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    return make


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A repository with one model for TensorRT."""
    (tmp_path / "plans" / "shapes").mkdir(parents=True)
    (tmp_path / "plans" / "shapes" / "config.pbtxt").write_text('name: "shapes" platform: "tensorrt_plan"')
    return tmp_path / "plans"


HELP = 'case "$1" in --help) exit 1;; esac;'
REFUSALS = {
    "a library": ("tritonserver: error while loading shared libraries: libfoo.so.1: cannot open", "libfoo.so.1 is not"),
    "glibc": ("tritonserver: /lib/libc.so.6: version \\`GLIBC_2.99' not found", "needs GLIBC_2.99"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_the_loader_refuses_is_said_before_the_start(
    stand_in: Callable[[str], None], plan: Path, what: str
) -> None:
    printed, expected = REFUSALS[what]
    stand_in(f'echo "{printed}" >&2; exit 127')
    with pytest.raises(ServeError, match=f"(?s)cannot run on this machine.*{expected}"):
        TritonServer(plan).start()


CAUSES = {
    "port race": (
        "failed to start HTTP service: Unavailable - Socket '127.0.0.1:8000' already in use",
        "another program",
    ),
    "plugin": ("could not find any supported creator for SSDNMS, plugin namespace: , version 1", "libssd_nms.so"),
    "memory": ("Failed to initialize the shared memory: No space left on device", "/dev/shm is too small"),
}


@pytest.mark.parametrize("what", CAUSES)
def test_the_likely_cause_of_an_early_end(stand_in: Callable[[str], None], plan: Path, what: str) -> None:
    printed, expected = CAUSES[what]
    stand_in(f'{HELP} echo "{printed}"; exit 3')
    with pytest.raises(ServeError, match=r"(?s)ended with code 3 before it was ready\nthe log ends with:") as caught:
        TritonServer(plan).start()
    assert printed.split(":")[0] in str(caught.value)
    assert expected in str(caught.value)


def test_a_server_that_hangs_ends_at_the_timeout(stand_in: Callable[[str], None], plan: Path, traces: Any) -> None:
    stand_in(f"{HELP} echo thinking; exec sleep 100")
    with pytest.raises(ServeError, match=r"(?s)not ready after 3 s.*thinking"):
        TritonServer(plan, startup_timeout=3).start()
    assert traces.gone(0)


def test_a_stub_that_lacks_a_library_does_not_hang_the_start(stand_in: Callable[[str], None], plan: Path) -> None:
    stand_in(
        f"{HELP} echo 'x: error while loading shared libraries: libpython3.99.so.1.0: cannot open'; exec sleep 100"
    )
    started = time.monotonic()
    with pytest.raises(ServeError, match=r"(?s)could not start.*libpython3\.99\.so\.1\.0"):
        TritonServer(plan).start()
    assert time.monotonic() - started < 60  # of startup_timeout's 120


def test_a_server_that_ignores_sigterm_is_killed(stand_in: Callable[[str], None], plan: Path, traces: Any) -> None:
    stand_in(f"{HELP} trap '' TERM; echo up; while :; do sleep 0.1; done")
    server = TritonServer(plan, startup_timeout=60)

    def start() -> None:
        with suppress(ServeError):
            server.start()

    starter = threading.Thread(target=start)
    starter.start()
    while not (server._process and "up" in server.log_lines()):
        time.sleep(0.01)
    started = time.monotonic()
    server.stop(timeout=0.3)
    assert time.monotonic() - started < 15  # of its program, which would go on without end
    starter.join(10)
    assert traces.gone(1)


@pytest.mark.parametrize(
    ("platform", "built", "loaded"),
    [
        ("tensorrt_plan", True, True),
        ("tensorrt_plan", False, False),
        ("onnxruntime_onnx", True, False),
    ],
)
def test_the_plugin_is_preloaded_for_plans_only(
    stand_in: Callable[[str], None],
    plan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    built: bool,
    loaded: bool,
) -> None:
    config = plan / "shapes" / "config.pbtxt"
    config.write_text(f'name: "shapes" platform: "{platform}"')
    plugin = tmp_path / "mein projekt" / "libssd_nms.so"
    plugin.parent.mkdir()
    if built:
        plugin.touch()
    monkeypatch.setattr(tritonserver, "PLUGIN", plugin)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    # The paths as the loader takes them: separated by spaces and colons.
    stand_in(f'{HELP} IFS=" :"; for path in $LD_PRELOAD; do echo "preload=[$(readlink -f "$path")]"; done; exit 3')
    with pytest.raises(ServeError) as caught:
        TritonServer(plan).start()
    assert (f"preload=[{plugin}]" in str(caught.value)) is loaded
    assert str(caught.value).count("preload=[") == loaded
    assert "LD_PRELOAD" not in os.environ


@pytest.mark.parametrize(("offered", "passed"), [("--allow-client-shm", True), ("--other", False)])
def test_client_shared_memory_is_allowed_where_the_server_knows_the_flag(
    stand_in: Callable[[str], None], plan: Path, offered: str, passed: bool
) -> None:
    stand_in(f'case "$1" in --help) echo "{offered} <boolean>"; exit 1;; esac; echo "$@"; exit 3')
    with pytest.raises(ServeError) as caught:
        TritonServer(plan).start()
    assert ("--allow-client-shm=true" in str(caught.value)) is passed


def test_the_server_on_path_comes_first(stand_in: Callable[[str], None], tmp_path: Path) -> None:
    wheel = tritonserver.find()
    stand_in("exit 0")
    assert tritonserver.find().binary == tmp_path / "bin" / "tritonserver"
    assert wheel.from_wheel or shutil.which("tritonserver", path=os.environ["PATH"].split(":", 1)[1])
