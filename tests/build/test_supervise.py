"""`invoke serve`: it ends when told to, and only then; what it says of versions; its log stays small."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from build import supervise
from build.errors import ServeError
from build.publish import repository as store
from build.serve import NOT_LOADED
from tests.conftest import TOKEN, Traces, new_traces

ROOT = Path(__file__).parents[2]


@dataclass
class Served:
    """`build.supervise.serve` in a process of its own."""

    process: subprocess.Popen[str]
    traces: Traces
    shown: list[str] = field(default_factory=list)

    def wait_for(self, text: str) -> str:
        """Reads what it prints until a line holds the text; returns that line."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            self.shown.append(line)
            if text in line:
                return line
        raise AssertionError(f"it ended without {text!r}: {''.join(self.shown)}")

    def rest(self) -> str:
        """What it printed until its end."""
        return self.process.communicate(timeout=120)[0]

    def children(self, name: str) -> list[psutil.Process]:
        """Processes below it by the beginning of their names."""
        return [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if child.name().startswith(name)
        ]

    def kill(self, name: str) -> None:
        for child in self.children(name):
            child.kill()


ENDINGS: dict[str, Callable[[Served], object]] = {
    "interrupted": lambda served: served.process.send_signal(signal.SIGINT),
    "terminated": lambda served: served.process.send_signal(signal.SIGTERM),
    "killed": lambda served: served.process.kill(),
    "instances killed": lambda served: served.kill("triton_python"),
    "server killed": lambda served: served.kill("tritonserver"),
    "server stopped": lambda served: [child.suspend() for child in served.children("tritonserver")],
    "version published": lambda served: None,
}
NATIVE = ("server killed", "server stopped", "version published")


@pytest.fixture(scope="module")
def ended(
    repository: Path, python_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Served]]:
    """A server for each thing that may happen; they start and end side by side, since that is mostly waiting."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(repository, folder / "model_repository")
    served_on = {"version published": folder / "model_repository"}
    servers = {}
    try:
        for name in ENDINGS:
            traces = new_traces()
            where = served_on.get(name, repository if name in NATIVE else python_repository)
            code = (
                "from pathlib import Path; import build.serve as s; import build.supervise as v; "
                f"s.SHM_PREFIX = {traces.token!r}; s.CANARY_TIMEOUT = 1; v.serve({str(where)!r}, http_port=0, "
                f"grpc_port=0, metrics_port=0, poll_seconds=1, canary_seconds=1, log=Path({str(folder / name)!r}))"
            )
            process = subprocess.Popen(
                [sys.executable, "-u", "-c", code],
                cwd=ROOT,
                env={**os.environ, TOKEN: traces.token},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            servers[name] = Served(process, traces)
        for server in servers.values():
            server.wait_for("Ctrl-C stops it.")
        for name, end in ENDINGS.items():
            end(servers[name])
        republish(folder / "model_repository")
        yield servers
    finally:
        for server in servers.values():
            server.process.kill()
            server.process.wait()
            assert server.process.stdout is not None
            server.process.stdout.close()
    for server in servers.values():
        assert server.traces.gone(), (server.traces.processes(), server.traces.regions())


def republish(root: Path) -> None:
    """Serves what is served as version 2, as a publish does."""
    shutil.copytree(root / "shapes" / "1", root / "shapes" / "2")
    new = root / "shapes" / "2" / "config.pbtxt"
    new.write_text(new.read_text().replace("versions: 1", "versions: 2"))
    shutil.copyfile(new, root / "shapes" / ".new")
    (root / "shapes" / ".new").replace(root / "shapes" / "config.pbtxt")
    assert store.served_version(root, "shapes") == 2


@pytest.mark.triton
@pytest.mark.parametrize("name", ["interrupted", "terminated"])
def test_signals_stop_it_cleanly(ended: dict[str, Served], name: str) -> None:
    rest, traces = ended[name].rest(), ended[name].traces
    assert (ended[name].process.returncode, rest.split()[-1]) == (0, "stopped")
    assert traces.gone(0), (traces.processes(), traces.regions())


@pytest.mark.triton
def test_the_server_does_not_outlive_a_killed_parent(ended: dict[str, Served]) -> None:
    traces = ended["killed"].traces
    ended["killed"].process.wait()
    assert traces.gone(20), (traces.processes(), traces.regions())


@pytest.mark.triton
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("instances killed", "instance(s) of a model died"),
        ("server killed", "tritonserver is gone (exit code -9)"),
        ("server stopped", "does not answer"),
    ],
)
def test_what_died_or_hangs_is_started_again_and_said(ended: dict[str, Served], name: str, reason: str) -> None:
    served = ended[name]
    served.wait_for("the server is started again in 1 s")
    assert reason in "".join(served.shown)
    line = served.wait_for("the server is up again")
    assert "shapes version 1" in line
    served.process.send_signal(signal.SIGTERM)
    assert served.rest().split()[-1] == "stopped"
    assert served.process.returncode == 0


@pytest.mark.triton
def test_it_says_how_to_publish_and_when_a_version_is_taken_up(ended: dict[str, Served]) -> None:
    served = ended["version published"]
    assert "It looks every 1 s for what is published to " in "".join(served.shown)
    line = served.wait_for("is served now")
    assert line == "shapes: version 2 is served now; before it was version 1\n"


class FakeServer:
    """What `Watch` and `_start_again` ask of a TritonServer."""

    poll_seconds = 2

    def __init__(self, *failures: str) -> None:
        self.models = {"shapes": "1"}
        self.failures = list(failures)
        self.started = 0
        self.answered = 0

    def start(self) -> None:
        self.started += 1
        if self.failures:
            raise ServeError(self.failures.pop(0))

    def stop(self, timeout: float) -> None:
        pass

    def check_alive(self) -> None:
        pass

    def served(self) -> dict[str, tuple[str, str]]:
        return {"shapes": ("READY", "1")}

    def requests(self, name: str) -> int:
        self.answered += 1
        return self.answered

    def check(self) -> None:
        if self.failures:
            raise ServeError(self.failures.pop(0))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No sleep, but a list of what was slept."""
    slept: list[float] = []
    monkeypatch.setattr(supervise.time, "sleep", slept.append)
    return slept


def shown() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, soft_wrap=True), text


def test_the_wait_doubles_up_to_a_minute_and_every_failure_is_said(quick: list[float]) -> None:
    console, text = shown()
    server: Any = FakeServer(*(f"failure {number}" for number in range(8)))
    assert supervise._start_again(server, console, 1.0) == 60
    assert quick == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert [f"failure {number}" in text.getvalue() for number in range(8)] == [True] * 8
    assert "the server is up again: shapes version 1" in text.getvalue()


@pytest.mark.parametrize(
    ("failures", "ends"),
    [
        (["no answer", "no answer"], True),
        (["model shapes does not answer: Exceeds maximum queue size"] * 5, False),
        (["model shapes does not answer: timed out"] * 5, False),  # others are answered meanwhile
    ],
)
def test_an_overloaded_server_is_not_a_dead_one(
    tmp_path: Path, failures: list[str], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise.time, "sleep", lambda seconds, real=time.sleep: real(0.001))
    console, text = shown()
    server: Any = FakeServer(*failures)
    server.stop_after = None
    (tmp_path / "log").touch()
    watch = supervise.Watch(server, console, tmp_path / "log", 1 << 20, 0.0)

    def served() -> dict[str, tuple[str, str]]:
        if not server.failures and not ends:
            raise ZeroDivisionError  # all canaries were sent
        return {"shapes": ("READY", "1")}

    server.served = served
    with pytest.raises(ServeError if ends else ZeroDivisionError):
        watch.until_it_fails()
    watch.close()
    assert ("overloaded" in text.getvalue()) is not ends


def test_what_comes_changes_fails_and_goes_is_said_once(tmp_path: Path) -> None:
    console, text = shown()
    server: Any = FakeServer()
    (tmp_path / "log").touch()
    watch = supervise.Watch(server, console, tmp_path / "log", 1 << 20, 1e9)
    ready = {"shapes": ("READY", "1")}
    for states in (
        ready,
        {"shapes": ("READY", "2")},
        {"shapes": ("READY", "2"), "faces": ("failed to load: no memory", "1")},
        {"shapes": ("LOADING", "3"), "faces": ("failed to load: no memory", "1")},
        {"shapes": ("READY", "3"), "faces": ("READY", "2")},
        {"faces": ("READY", "2")},
    ):
        server.served = lambda states=states: states
        watch._look_at_versions()
    watch.close()
    assert text.getvalue().splitlines() == [
        "shapes: version 2 is served now; before it was version 1",
        "faces: version 1 is not served: failed to load: no memory",
        "shapes: version 3 is served now; before it was version 2",
        "faces: version 2 is served now",
        "shapes: is not served any more",
    ]
    assert server.models == {"faces": "2"}  # nobody asks for what was removed


def test_a_new_model_is_given_time_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console, text = shown()
    server: Any = FakeServer()
    (tmp_path / "log").touch()
    watch = supervise.Watch(server, console, tmp_path / "log", 1 << 20, 1e9)
    clock = iter((100.0, 101.0, 104.0, 106.0))
    monkeypatch.setattr(supervise.time, "monotonic", lambda: next(clock))
    server.served = lambda: {"shapes": ("READY", "1"), "faces": (NOT_LOADED, "")}
    for _ in range(3):
        watch._look_at_versions()
    assert text.getvalue() == ""
    watch._look_at_versions()
    watch.close()
    assert text.getvalue() == "faces: version ? is not served: not loaded\n"


def test_a_flood_of_log_lines_is_cut_on_the_screen_and_on_disk(tmp_path: Path) -> None:
    console, text = shown()
    log = tmp_path / "log"
    log.touch()
    watch = supervise.Watch(FakeServer(), console, log, 1 << 20, 1e9)  # type: ignore[arg-type]
    with log.open("ab") as server:
        for _ in range(5):
            server.write(b"E1125 a socket could not be accepted\n" * 100_000)
            server.flush()
            watch._show_log()
            supervise.rotate(log, 1 << 20)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 8 << 20
        server.write(b"E1125 the last line\nE1125 half a li")
        server.flush()
        watch._show_log()
        server.write(b"ne\n")
        server.flush()
        watch._show_log()
    watch.close()
    lines = text.getvalue().splitlines()
    assert len(lines) < 200
    assert lines[-2:] == ["E1125 the last line", "E1125 half a line"]
    assert "many more lines in" in text.getvalue()
