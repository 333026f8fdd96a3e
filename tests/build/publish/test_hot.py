"""Publishing to a server that runs: it lives, every answer is right, and its memory does not grow."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc

from build import session
from build.contract import Target
from build.publish import backend, repository
from build.serve import TritonServer
from build.spec import Spec

ONNX = Target("onnxruntime")
GROWTH = 12 << 20  # bytes; with libraries in the version folders it was 49 MB with each publish


class Load:
    """A client that asks without pause and compares every answer with the same file's in process.

    Attributes:
        answered, wrong: counts.
        errors: what failed.
    """

    def __init__(self, server: TritonServer, spec: Spec, built: Path) -> None:
        import onnx

        self._url = server.grpc_url
        images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
        feeds = spec.nms.feeds(images)
        self._wanted = session.runner(onnx.load(built))(feeds)
        self._inputs = []
        for name, array in feeds.items():
            kind = "UINT8" if array.dtype == np.uint8 else "FP32"
            entry = triton_grpc.InferInput(name, list(array.shape), kind)
            self._inputs.append(entry.set_data_from_numpy(array))
        self._ended = threading.Event()
        self.answered = self.wrong = 0
        self.errors: list[str] = []

    def _run(self) -> None:
        with closing(triton_grpc.InferenceServerClient(self._url)) as client:
            while not self._ended.is_set():
                try:
                    answer = client.infer("tiny", self._inputs)
                except Exception as error:
                    self.errors.append(str(error))
                    continue
                same = all(answer.as_numpy(k).tobytes() == v.tobytes() for k, v in self._wanted.items())
                self.answered += 1
                self.wrong += not same

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()


def resources(server: TritonServer) -> dict[str, int]:
    """What a server holds: bytes of memory, threads, descriptors, and mapped files that were deleted."""
    process = psutil.Process(server.pid)
    maps = Path(f"/proc/{server.pid}/maps").read_text()
    deleted = {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.endswith("(deleted)")}
    return {
        "rss": process.memory_info().rss,
        "threads": process.num_threads(),
        "descriptors": process.num_fds(),
        "deleted": len(deleted),
    }


def wait_for(server: TritonServer, version: int) -> None:
    deadline = time.monotonic() + 30
    while server.served().get("tiny") != ("READY", str(version)):
        assert time.monotonic() < deadline, server.served()
        time.sleep(0.05)


@pytest.mark.triton
@pytest.mark.parametrize("publishes", [5, pytest.param(50, marks=pytest.mark.long)])
def test_memory_stays_flat_over_publishes_under_load(
    native: None, spec: Spec, built: Path, root: Path, publishes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    served_by = backend.prepare(backend.NATIVE)
    repository.publish(spec, built, root, ONNX, served_by=served_by)
    with TritonServer(root, poll_seconds=1) as server:
        load = Load(server, spec, built)
        with load.running():
            for number in range(publishes):
                wait_for(server, repository.publish(spec, built, root, ONNX, served_by=served_by))
                if number == 1:  # the first ones fill the allocator's arenas
                    before = resources(server)
            time.sleep(0.5)
            after = resources(server)
    print(f"{publishes} publishes: {before} -> {after}, {load.answered} answers")
    assert (load.errors, load.wrong) == ([], 0)
    assert load.answered > 10 * publishes
    assert after["rss"] - before["rss"] < GROWTH
    assert after["deleted"] <= before["deleted"]
    assert after["threads"] <= before["threads"] + 1
    assert after["descriptors"] <= before["descriptors"] + 2


@pytest.mark.triton
@pytest.mark.parametrize(
    "way",
    [
        "cp -r of another version over it",
        pytest.param("half a file", marks=pytest.mark.long),
        pytest.param("a folder that grows", marks=pytest.mark.long),
    ],
)
def test_copying_over_a_live_repository_leaves_the_server_alive(
    native: None, spec: Spec, built: Path, root: Path, tmp_path: Path, way: str
) -> None:
    served_by = backend.prepare(backend.NATIVE)
    other = tmp_path / "other"
    for place in (root, other):
        repository.publish(spec, built, place, ONNX, served_by=served_by)
    version = repository.publish(spec, built, other, ONNX, served_by=served_by)
    with TritonServer(root, poll_seconds=1) as server:
        load = Load(server, spec, built)
        with load.running():
            live = root / "tiny"
            if way == "half a file":  # what cp does to a file that is there: cut, then written
                data = (live / "1" / "model.onnx").read_bytes()
                (live / "1" / "model.onnx").write_bytes(data[: len(data) // 2])
                time.sleep(2.5)
                (live / "1" / "model.onnx").write_bytes(data)
                time.sleep(1.5)
            elif way == "a folder that grows":  # config.pbtxt first, its version's files one by one
                shutil.copyfile(other / "tiny" / "config.pbtxt", live / "config.pbtxt")
                (live / str(version)).mkdir()
                for path in sorted((other / "tiny" / str(version)).iterdir()):
                    time.sleep(0.5)
                    shutil.copyfile(path, live / str(version) / path.name)
            else:
                shutil.copytree(other / "tiny", live, dirs_exist_ok=True)
            if way != "half a file":
                with suppress(AssertionError):
                    wait_for(server, version)
            server.check_alive()
        assert (load.errors, load.wrong) == ([], 0)
        if way == "cp -r of another version over it":
            assert server.served()["tiny"] == ("READY", str(version))
