"""A soak: clients ask without pause while versions are published and rolled back, servers and clients killed.

    PYTHONPATH=.:client python -m tests.reliability.soak --minutes 120

Prints a line of JSON now and then, and the totals at the end: the table of docs/reliability.md. Exit status 1 where an
answer was wrong, a request failed beyond its retries, or memory grew.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from build import session
from build.contract import Target
from build.graph.attach import attach
from build.publish import backend, repository
from build.spec import Spec, load
from tests.build import tiny_model

ROOT = Path(__file__).resolve().parents[2]
ONNX = Target("onnxruntime")
RETRY_SECONDS = 60.0  # a request that is not answered by then has failed
LIVES = 2.5  # of the server in one soak: long enough to see memory grow
PAUSE = 0.005  # seconds between two requests of a client
KILL = "kill the server"
KILL_SHARING = "kill a client with shared memory"
EVENTS = ("publish", "rollback", "cut a client off", KILL_SHARING, KILL)
SHARING = """
import sys
import numpy as np
from ssd_client import SSDClient
client = SSDClient(sys.argv[1], model="tiny", shared_memory="system")
while True:
    client.detect(np.zeros((8, 8, 3), np.uint8))
    print(flush=True)
"""


@dataclass
class Totals:
    """What a soak saw. `sharing`: answers to clients with shared memory, which are not compared."""

    answered: int = 0
    wrong: int = 0
    failed: int = 0
    retried: int = 0
    sharing: int = 0
    events: Counter[str] = field(default_factory=Counter)
    rss_mib: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        first, last = (self.rss_mib[:1], self.rss_mib[-1:])
        return {
            "answered": self.answered,
            "wrong": self.wrong,
            "failed": self.failed,
            "retried": self.retried,
            "through shared memory": self.sharing,
            **dict(self.events),
            "rss_mib": [*first, *last, max(self.rss_mib, default=0)],
        }


class Soak:
    """A supervised server on a repository of the tiny model, and clients.

    Args:
        folder: for everything; removed by the caller.
        seed: of the order of events.
        pause: seconds between two requests of a client.
        lives: of the server: it is killed this often, less one.
    """

    def __init__(self, folder: Path, seed: int = 0, pause: float = PAUSE, lives: float = LIVES) -> None:
        self._folder = folder
        self._pause = pause
        self._lives = lives
        self._chance = random.Random(seed)
        self.totals = Totals()
        self._spec: Spec = load(tiny_model.write(folder / "models" / "tiny"))
        self._built = folder / "built.onnx"
        self._built.write_bytes(attach(self._spec).SerializeToString())
        self._root = folder / "model_repository"
        self._served_by = backend.prepare()
        self._publish()
        images = np.random.default_rng(seed).integers(0, 256, (2, 8, 8, 3), np.uint8)
        self._feeds = self._spec.nms.feeds(images)
        import onnx

        self._wanted = session.runner(onnx.load(self._built))(self._feeds)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        with closing(socket.socket()) as one, closing(socket.socket()) as two, closing(socket.socket()) as three:
            ports = []
            for probe in (one, two, three):
                probe.bind(("127.0.0.1", 0))
                ports.append(probe.getsockname()[1])
        self._ports = ports
        self._supervisor: subprocess.Popen[str] | None = None

    def run(self, seconds: float, every: float, report: float = 60.0) -> Totals:
        """Soaks for so long, with an event every so many seconds."""
        with self._supervised():
            clients = [threading.Thread(target=self._ask, args=(kind,)) for kind in ("grpc", "http", "grpc")]
            for client in clients:
                client.start()
            try:
                self._events(seconds, every, report)
            finally:
                self._ended.set()
                for client in clients:
                    client.join()
        return self.totals

    @contextmanager
    def _supervised(self) -> Iterator[None]:
        code = (
            "from pathlib import Path; from build.supervise import serve; "
            f"serve({str(self._root)!r}, http_port={self._ports[0]}, grpc_port={self._ports[1]}, "
            f"metrics_port={self._ports[2]}, poll_seconds=1, log=Path({str(self._folder / 'log')!r}))"
        )
        with (self._folder / "shown").open("w") as shown:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-u", "-c", code], cwd=ROOT, stdout=shown, stderr=subprocess.STDOUT, text=True
            )
        try:
            self._wait_up()
            yield
        finally:
            self._supervisor.terminate()
            self._supervisor.wait()

    def _wait_up(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(Exception), closing(triton_grpc.InferenceServerClient(f"127.0.0.1:{self._ports[1]}")) as c:
                if c.is_model_ready("tiny"):
                    return
            time.sleep(0.1)
        raise RuntimeError((self._folder / "shown").read_text())

    def _server(self) -> psutil.Process | None:
        assert self._supervisor is not None
        with suppress(psutil.Error):
            for child in psutil.Process(self._supervisor.pid).children():
                if child.name() == "tritonserver":
                    return child
        return None

    def _publish(self) -> None:
        repository.publish(self._spec, self._built, self._root, ONNX, served_by=self._served_by)

    def _events(self, seconds: float, every: float, report: float) -> None:
        begun = reported = time.monotonic()
        killed = 0.0
        settled = False
        while time.monotonic() - begun < seconds:
            time.sleep(every)
            event = self._chance.choice(EVENTS[:-1])
            if (
                time.monotonic() - max(killed, begun) > seconds / self._lives
                and self._restarts() == self.totals.events[KILL]
            ):
                event, killed = KILL, time.monotonic()
                settled = False
            self.totals.events[event] += 1
            if event == "publish":
                self._publish()
            elif event == "rollback":
                with suppress(repository.PublishError):
                    repository.rollback(self._root, "tiny")
            elif event == "cut a client off":
                cut_off(self._ports)
            elif event == KILL_SHARING:
                self._kill_sharing()
            else:
                server = self._server()
                if server is not None:
                    server.kill()
            server = self._server()
            if server is not None and time.monotonic() - killed > 5:
                with suppress(psutil.Error):
                    self.totals.rss_mib.append(server.memory_info().rss >> 20)
                    settled = True
            if time.monotonic() - reported > report and settled:
                reported = time.monotonic()
                print(json.dumps({"s": round(reported - begun), **self.totals.as_dict()}), flush=True)

        deadline = time.monotonic() + 60
        while self._restarts() < self.totals.events[KILL] and time.monotonic() < deadline:
            time.sleep(0.1)

    def _kill_sharing(self) -> None:
        """A client that is killed while the server has its memory mapped."""
        command = [sys.executable, "-c", SHARING, f"127.0.0.1:{self._ports[1]}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as client:
            assert client.stdout is not None
            for _ in range(3):
                if client.stdout.readline():  # no line: the server was gone, and so is the client
                    self.totals.sharing += 1
            client.kill()

    def _restarts(self) -> int:
        return (self._folder / "shown").read_text().count("the server is up again")

    def _ask(self, kind: str) -> None:
        """Asks without pause; a request that finds no server is repeated."""
        module = triton_grpc if kind == "grpc" else triton_http
        url = f"127.0.0.1:{self._ports[kind == 'grpc']}"
        inputs = []
        for name, array in self._feeds.items():
            entry = module.InferInput(name, list(array.shape), "UINT8" if array.dtype == np.uint8 else "FP32")
            inputs.append(entry.set_data_from_numpy(array))
        while not self._ended.is_set():
            with closing(module.InferenceServerClient(url)) as client:
                while not self._ended.is_set():
                    if not self._one(client, inputs):
                        break
                    time.sleep(self._pause)

    def _one(self, client: Any, inputs: list[Any]) -> bool:
        """One request; whether the connection is worth keeping."""
        try:
            answer = client.infer("tiny", inputs)
            right = all(answer.as_numpy(name).tobytes() == array.tobytes() for name, array in self._wanted.items())
        except Exception:
            with self._lock:
                self.totals.retried += 1
            deadline = time.monotonic() + RETRY_SECONDS
            while not self._up() and not self._ended.is_set():
                if time.monotonic() > deadline:
                    with self._lock:
                        self.totals.failed += 1
                    break
                time.sleep(0.1)
            return False
        with self._lock:
            self.totals.answered += 1
            self.totals.wrong += not right
        return True

    def _up(self) -> bool:
        with suppress(Exception), closing(triton_http.InferenceServerClient(f"127.0.0.1:{self._ports[0]}")) as client:
            return bool(client.is_model_ready("tiny"))
        return False


def cut_off(ports: list[int]) -> None:
    """A client that is gone in the middle of its request: its connection is reset."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", ports[0]), timeout=5) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        head = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{"
        connection.sendall(head + b" " * 999)
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two events")
    parser.add_argument("--pause", type=float, default=PAUSE, help="seconds between two requests of a client")
    parser.add_argument("--lives", type=float, default=LIVES, help="of the server: it is killed this often, less one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ssd-soak-"))
    try:
        totals = Soak(folder, options.seed, options.pause, options.lives).run(options.minutes * 60, options.every)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(totals.as_dict()))
    return int(bool(totals.wrong or totals.failed or max(totals.rss_mib) > totals.rss_mib[0] + 40))


if __name__ == "__main__":
    sys.exit(main())
