"""Several servers: balanced, one of them killed or hanging; and what shared memory needs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ssd_client
from ssd_client import InvalidInputError, RequestTimeoutError, SharedMemoryError, SSDClient
from ssd_client.shared_memory import Region, is_abandoned

from build.serve import TritonServer
from tests.client.conftest import CLIENTS, HEIGHT, WIDTH, listening, pump, scene, server_on, server_regions, url_of

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def second(repository: Path) -> Iterator[TritonServer]:
    with server_on(repository) as running:
        yield running


def requests_of(server: TritonServer) -> int:
    """How many inference requests a server has answered."""
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/fake/stats") as answer:
        return int(json.load(answer)["model_stats"][0]["inference_count"])


def test_a_hanging_server_costs_its_tries_only(repository: Path) -> None:
    """A server that takes connections and never answers: by default several servers share the time."""

    def silent(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(1 << 16):
                pass

    with listening(silent) as first, listening(silent) as other:
        started = time.monotonic()
        with SSDClient([f"127.0.0.1:{first}", f"127.0.0.1:{other}"], model="m", timeout=1, retries=3) as client:
            assert client._session._try_timeout == 0.25
            with pytest.raises(RequestTimeoutError):
                client.model_config()
        assert 0.9 < time.monotonic() - started < 3


def test_names_in_dns(server: TritonServer) -> None:
    port = server.grpc_url.rpartition(":")[2]
    for url in (f"dns:///localhost:{port}", [f"localhost:{port}", f"127.0.0.1:{port}"]):
        with SSDClient(url, model="fake") as client:
            assert len(client.detect(scene())) == 3


@pytest.mark.parametrize("url", [["h1", "h2"], "h1,h2", "dns:///triton"])
def test_shared_memory_needs_one_server(url: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"several servers(.|\n)*memory of one server"):
        SSDClient(url, model="m", shared_memory="system")


def test_shared_memory_behind_a_balancer(server: TritonServer, second: TritonServer) -> None:
    turns = itertools.cycle([server, second])

    def handle(outer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            inner = socket.create_connection(("127.0.0.1", int(next(turns).http_url.rpartition(":")[2])))
            threading.Thread(target=pump, args=(inner, outer), daemon=True).start()
            while data := outer.recv(1 << 16):  # one request a connection, as far as the client can tell
                inner.sendall(data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) if b"HTTP/1.1" in data else data)
            pump(outer, inner)

    def ask(client: SSDClient) -> None:
        for _ in range(4):
            client.detect(scene())

    with (
        listening(handle) as port,
        SSDClient(f"http://127.0.0.1:{port}", model="fake", shared_memory="system", retries=0) as client,
        pytest.raises(SharedMemoryError) as caught,
    ):
        ask(client)
    assert "several servers stand behind this address" in str(caught.value)
    for each in (server, second):
        url = f"http://{each.http_url}/v2/systemsharedmemory/unregister"
        urllib.request.urlopen(urllib.request.Request(url, data=b"")).close()


@pytest.mark.parametrize(
    ("protocol", "client_type"), list(zip(("grpc", "http"), CLIENTS, strict=True)), ids=("grpc", "http")
)
def test_regions_of_killed_clients_go_with_the_next_client(
    server: TritonServer, protocol: Any, client_type: Any
) -> None:
    url = url_of(server, protocol)
    code = f"""
        import os, numpy as np
        from ssd_client import SSDClient
        client = SSDClient("{url}", protocol="{protocol}", model="fake", shared_memory="system")
        client.infer(np.zeros((2, {HEIGHT}, {WIDTH}, 3), np.uint8))
        os.kill(os.getpid(), 9)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(ssd_client.__file__).parent.parent)}
    images = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)
    with client_type(url, model="fake", protocol=protocol, shared_memory="system") as living:
        living.infer(images)
        (own,) = server_regions(server)
        killed = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environment) for _ in range(2)]
        assert [process.wait(60) for process in killed] == [-9, -9]
        assert list(Path("/dev/shm").glob("ssd_client_*")) == [], "nothing to leave there"
        assert len(server_regions(server)) in (2, 3)  # the second one may have swept the first one's
        with client_type(url, model="fake", protocol=protocol, shared_memory="system") as client:
            client.infer(images)
            regions = server_regions(server)
            assert len(regions) == 2
            assert own in regions, "a living client's"
    assert server_regions(server) == []


def test_whose_region() -> None:
    region = Region(1)
    region.hide()
    prefix, namespace, process, started, rest = region.name.rsplit("_", 4)
    assert not is_abandoned(region.name)
    assert is_abandoned(f"{prefix}_{namespace}_{process}_{int(started) + 1}_{rest}"), "the number went to another one"
    assert is_abandoned(f"{prefix}_{namespace}_{2**22 + 1}_{started}_{rest}")
    assert not is_abandoned(f"{prefix}_{int(namespace) + 1}_{2**22 + 1}_{started}_{rest}"), "in another container"
    assert not is_abandoned("someone_elses_region")
    assert not is_abandoned(f"{prefix}_{namespace}_1_0_{rest}x")


def test_one_of_two_hangs_and_dies(server: TritonServer, second: TritonServer) -> None:
    """Both share the work; nothing fails while one stands still (SIGSTOP), nor after it was killed."""
    urls = [server.grpc_url, second.grpc_url]
    with contextlib.ExitStack() as stack:
        clients: list[Any] = [
            stack.enter_context(kind(urls, model="fake", timeout=20, try_timeout=0.7)) for kind in CLIENTS
        ]
        before = requests_of(server), requests_of(second)
        for client in clients:
            deadline = time.monotonic() + 10  # a channel uses a server once it is connected
            while min(requests_of(server) - before[0], requests_of(second) - before[1]) < 3:
                client.detect(scene())
                assert time.monotonic() < deadline
        os.killpg(second.pid, signal.SIGSTOP)
        try:
            for client in clients:
                assert [len(client.detect(scene())) for _ in range(4)] == [3] * 4
        finally:
            os.killpg(second.pid, signal.SIGCONT)
        os.killpg(second.pid, signal.SIGKILL)
        for client in clients:
            assert [len(each) for each in client.detect([scene()] * 30)] == [3] * 30
