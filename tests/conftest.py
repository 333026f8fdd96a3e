"""One published `shapes` and one real tritonserver for every test that leaves them whole."""

from __future__ import annotations

import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from tritonclient.utils import InferenceServerException

from build.files import locked
from build.serve import TritonServer

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "SSD_TEST_TOKEN"
NO_OPENVINO = 'needs OpenVINO: build once with [serving] engine = "openvino"'


def pytest_configure() -> None:
    """A shell that starts the tests in the background lets them, and what they start, ignore Ctrl-C: undone here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: where workers share the tests by file, no long one starts when all else is done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills: once in a test run, however many workers (pytest-xdist) ask for it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with locked(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with version 1 of `shapes`, built from models/shapes for ONNX Runtime."""
    from build.pipeline import build_engines

    def make(folder: Path) -> None:
        build_engines(
            ["shapes"],
            "onnxruntime",
            repository=folder / "model_repository",
            artifacts=folder / "artifacts",
            rehearse=False,  # `triton_server` serves it anyway
        )

    return once(tmp_path_factory, "published", make) / "model_repository"


@pytest.fixture(scope="session")
def python_repository(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same file with the python backend: what is served where there is no C++ compiler, in processes of its own."""
    from build import spec
    from build.contract import Target
    from build.publish import backend
    from build.publish import repository as store

    folder = tmp_path_factory.mktemp("published-python")
    shutil.copytree(ROOT / "models" / "shapes", folder / "models" / "shapes")
    source = folder / "models" / "shapes" / "spec.toml"
    spec.edit(source, {"serving.backend": backend.PYTHON})
    built, manifest = store.served(repository, "shapes")
    facts = {"verified": manifest["verified"]}
    served_by = backend.prepare(backend.PYTHON)
    target = folder / "model_repository"
    store.publish(spec.load(source), built / "model.onnx", target, Target("onnxruntime"), facts, served_by)
    return target


@pytest.fixture(scope="session")
def triton_server(repository: Path) -> Iterator[TritonServer]:
    """A server on `repository`; after the last test it must still be whole."""
    with TritonServer(repository) as server:
        yield server
        server.check()


@pytest.fixture(scope="session")
def python_server(python_repository: Path) -> Iterator[TritonServer]:
    """A server on `python_repository`; after the last test it must still be whole."""
    with TritonServer(python_repository) as server:
        yield server
        server.check()


@pytest.fixture(scope="session")
def native() -> None:
    """Skips where our own backend cannot be compiled."""
    from build.errors import RuntimeUnavailableError
    from build.publish import backend

    try:
        backend.prepare(backend.NATIVE)
    except RuntimeUnavailableError as error:
        pytest.skip(f"needs a C++ compiler: {error.what}")


@pytest.fixture(params=["ssd_onnxruntime", "python"])
def server(request: pytest.FixtureRequest) -> TritonServer:
    """The server of each backend in turn; they must not differ in anything."""
    if request.param == "python":
        chosen: TritonServer = request.getfixturevalue("python_server")
    else:
        request.getfixturevalue("native")
        chosen = request.getfixturevalue("triton_server")
    assert chosen.model_config("shapes")["backend"] == request.param
    return chosen


@dataclass(frozen=True)
class Traces:
    """What the servers of a test leave, and nothing of anyone else's.

    Attributes:
        token: in the environment of their processes and in their names in /dev/shm.
    """

    token: str

    def processes(self) -> set[str]:
        """Their processes, the dead ones that nobody collected not counted."""
        running = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get(TOKEN) == self.token:
                    running.add(f"{process.name()} {process.pid}")
        return running

    def regions(self) -> set[str]:
        """Their names in /dev/shm."""
        return {path.name for path in Path("/dev/shm").glob(f"{self.token}*")}

    def gone(self, seconds: float = 15.0) -> bool:
        """Whether all of it is gone, at once or within the time."""
        deadline = time.monotonic() + seconds
        while self.processes() or self.regions():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


def new_traces() -> Traces:
    """Traces of servers that are started with its token in their environment and as `build.serve.SHM_PREFIX`."""
    return Traces(f"ssd-test-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traces]:
    """Fails the test if a process of its servers outlives it, or something of theirs stays in /dev/shm."""
    traces = new_traces()
    monkeypatch.setenv(TOKEN, traces.token)
    monkeypatch.setattr("build.serve.SHM_PREFIX", traces.token)
    yield traces
    assert traces.gone(), (traces.processes(), traces.regions())


def unregister(client: Any, region: str) -> None:
    """Unregisters shared memory; the server holds it until shortly after the answer is on its way."""
    deadline = time.monotonic() + 10
    while True:
        try:
            client.unregister_system_shared_memory(region)
        except InferenceServerException as error:
            if "currently in use" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
