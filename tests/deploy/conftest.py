"""Real servers started as the images start them, and the programs of deploy/tools.py."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from build import tritonserver
from deploy import backends, tools

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "ssd-on-triton"
RULES = CHART / "files" / "rules.yml"
DOCKER = ROOT / "deploy" / "docker"


def need(name: str) -> str:
    """A program's path; skips where it is not installed."""
    program = tools.find(name)
    if program is None:
        pytest.skip(f"needs {name}: {tools.INSTALL}")
    return str(program)


def run(program: str, *arguments: object, check: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a program of deploy/tools.py, its output caught."""
    command = [need(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, cwd=ROOT, **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def python(*arguments: object, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs the Python of the environment, which has PyYAML and the schemas; skips where there is none."""
    if not tools.PYTHON.is_file():
        pytest.skip(f"needs the Python packages of requirements/deploy.lock: {tools.INSTALL}")
    done = subprocess.run(
        [str(tools.PYTHON), *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def parsed(*paths: Path) -> list[Any]:
    """The documents of YAML files."""
    documents: list[Any] = json.loads(python(ROOT / "deploy" / "schemas.py", "json", *paths, check=True).stdout)
    return documents


def rendered(folder: Path, *options: object) -> tuple[Path, list[Any]]:
    """The chart's manifests with some options: the file and its documents."""
    text = run("helm", "template", "ssd", CHART, "--namespace", "detectors", *options, check=True).stdout
    path = folder / f"{len(list(folder.iterdir()))}.yaml"
    path.write_text(text)
    return path, parsed(path)


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def get(url: str, seconds: float = 5.0) -> str:
    """A page of this machine."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=seconds) as answer:
        text: str = answer.read().decode()
        return text


def wait(what: str, condition: Callable[[], Any], seconds: float = 30.0, pause: float = 0.1) -> Any:
    """Waits until the condition gives something true; errors of the network count as not yet."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, ValueError):
            if result := condition():
                return result
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(pause)


@dataclass
class Server:
    """A tritonserver that deploy/docker/serve.sh started.

    Attributes:
        drain: seconds between SIGTERM and its end; with 0 the process is tritonserver itself.
        ports: HTTP, gRPC, metrics, and the canary's where it drains.
    """

    repository: str
    backends: Path
    log: Path
    extra: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    drain: int = 0
    ports: list[int] = field(default_factory=lambda: free_ports(4))
    process: subprocess.Popen[bytes] | None = None

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports[1]}"

    @property
    def metrics(self) -> str:
        return f"127.0.0.1:{self.ports[2]}"

    def start(self, ready: bool = True) -> Server:
        """Starts it; when this returns it is ready, or only alive where its models cannot load."""
        names = ("SSD_HTTP_PORT", "SSD_GRPC_PORT", "SSD_METRICS_PORT", "SSD_CANARY_PORT")
        variables = {
            **tritonserver.environment(),
            **dict(zip(names, map(str, self.ports), strict=True)),
            "SSD_TRITONSERVER": str(tritonserver.find().binary),
            "SSD_REPOSITORY": self.repository,
            "SSD_BACKENDS": str(self.backends),
            "SSD_EXIT_TIMEOUT": "5",
            "SSD_DRAIN_SECONDS": str(self.drain),
            "SSD_CANARY": str(DOCKER / "canary.py"),
            **self.environment,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(DOCKER / "serve.sh"), *self.extra],
                env=variables,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so stop() reaches tritonserver behind the script
            )
        wait(f"{self.http} is ready, see {self.log}", lambda: self.alive() and self.up(ready), 60)
        return self

    def alive(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        return True

    def up(self, ready: bool = True) -> bool:
        return get(f"http://{self.http}/v2/health/{'ready' if ready else 'live'}") == ""

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None:
            for number in (signal.SIGCONT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, number)
            self.process.wait(20)
            self.process = None


@pytest.fixture(scope="session")
def backend_folder(native: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tritonserver's backend folder with this project's backend, as the images have it."""
    return backends.install(tmp_path_factory.mktemp("backends"))


@pytest.fixture(scope="session")
def data_repository(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published model without libraries: what a volume or a bucket of a fleet holds."""
    folder = tmp_path_factory.mktemp("data") / "model_repository"
    ignored = shutil.ignore_patterns("*.so", "*.so.*", ".*.lock")
    return Path(shutil.copytree(repository, folder, ignore=ignored))


@pytest.fixture(scope="module")
def servers(
    data_repository: Path, backend_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    """Two servers on the same repository, as two pods of the chart."""
    with two_servers(data_repository, backend_folder, tmp_path_factory.mktemp("logs")) as servers:
        yield servers


@contextlib.contextmanager
def two_servers(repository: Path, backend_folder: Path, logs: Path, drain: int = 0) -> Iterator[list[Server]]:
    """Two servers that run until the end of the block."""
    servers = [Server(str(repository), backend_folder, logs / f"{name}.log", drain=drain) for name in "ab"]
    try:
        for server in servers:
            server.start()
        yield servers
    finally:
        for server in servers:
            server.stop()


@contextlib.contextmanager
def running(command: Sequence[object], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs until the end of the block."""
    with log.open("ab") as output:
        process = subprocess.Popen([*map(str, command)], stdout=output, stderr=output, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
