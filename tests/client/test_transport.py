"""TLS, and servers that answer nonsense, hang up or never answer."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ssd_client import (
    TLS,
    InvalidInputError,
    RequestTimeoutError,
    ServerUnavailableError,
    SSDClientError,
    grpc_transport,
    http_transport,
)

from build.serve import TritonServer
from tests.client.conftest import CLIENTS, listening, pump, scene, self_signed, server_on, url_of


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    return self_signed(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def encrypted(repository: Path, certificate: tuple[Path, Path]) -> Iterator[dict[str, str]]:
    """`localhost:port` by protocol: Triton's own TLS for gRPC, a TLS proxy before Triton's HTTP."""
    chain, key = certificate
    options = ["--grpc-use-ssl=true", f"--grpc-server-cert={chain}", f"--grpc-server-key={key}"]
    with server_on(repository, *options) as server:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(chain, key)
        host, _, port = server.http_url.rpartition(":")

        def forward(plain: socket.socket) -> None:
            with contextlib.suppress(OSError):
                outer = context.wrap_socket(plain, server_side=True)
                inner = socket.create_connection((host, int(port)))
                threading.Thread(target=pump, args=(outer, inner), daemon=True).start()
                pump(inner, outer)

        with listening(forward) as proxy:
            yield {"http": f"localhost:{proxy}", "grpc": f"localhost:{server.grpc_url.rpartition(':')[2]}"}


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_tls(encrypted: dict[str, str], certificate: tuple[Path, Path], protocol: Any, client_type: Any) -> None:
    url = encrypted[protocol]
    with client_type(url, model="fake", protocol=protocol, ssl=TLS(root_certificates=certificate[0])) as client:
        assert client.detect(scene()).labels == ("red", "blue", "checksum")
    with client_type(
        f"https://{url}", model="fake", protocol=protocol, ssl=TLS(root_certificates=certificate[0])
    ) as client:
        assert client.model_config().name == "fake"
    for trust in (TLS(), None):  # an authority nobody knows; no encryption at all
        refusal = pytest.raises(SSDClientError, match=rf"{url}(.|\n)*what to do")
        with client_type(url, model="fake", protocol=protocol, ssl=trust, retries=0, timeout=10) as client, refusal:
            client.detect(scene())


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_tls_files_that_cannot_be_used(tmp_path: Path, protocol: Any, client_type: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot read the TLS file .*none\.pem: No such file"):
        client_type("localhost", model="m", protocol=protocol, ssl=TLS(tmp_path / "none.pem")).model_config()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{}",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nwait",
        b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"parameters": 1}',
    ],
)
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_nonsense_over_http(client_type: Any, answer: bytes) -> None:
    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(answer)

    with listening(handle) as port:
        client = client_type(f"127.0.0.1:{port}", model="m", protocol="http", retries=1, timeout=5)
        with client, pytest.raises(SSDClientError):
            client.model_config()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_a_server_that_hangs_up_is_asked_again(client_type: Any, protocol: Any) -> None:
    calls = []

    def handle(connection: socket.socket) -> None:
        calls.append(1)
        connection.close()

    with listening(handle) as port:
        client = client_type(f"127.0.0.1:{port}", model="m", protocol=protocol, retries=2)
        with client, pytest.raises(ServerUnavailableError):
            client.model_config()
    assert len(calls) >= 2, "a gRPC channel may answer one attempt from the failure of the one before"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_a_deadline_is_not_retried(client_type: Any, protocol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for kind in (
        grpc_transport.GrpcTransport,
        grpc_transport.AsyncGrpcTransport,
        http_transport.HttpTransport,
        http_transport.AsyncHttpTransport,
    ):

        def counted(self: Any, *arguments: Any, send: Any = kind.send) -> Any:
            calls.append(1)
            return send(self, *arguments)

        monkeypatch.setattr(kind, "send", counted)

    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(1 << 16):
                pass

    with listening(handle) as port:
        client = client_type(f"127.0.0.1:{port}", model="m", protocol=protocol, timeout=0.3, retries=3)
        with client, pytest.raises(RequestTimeoutError, match=r"no answer .* within 0\.3 s"):
            client.model_config()
    assert len(calls) == 1


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_a_slow_connection_is_waited_for(server: TritonServer, client_type: Any, protocol: Any) -> None:
    """As to a server far away: the first bytes of an answer take half a second."""
    host, _, port = url_of(server, protocol).rpartition(":")

    def forward(outer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            time.sleep(0.5)
            inner = socket.create_connection((host, int(port)))
            threading.Thread(target=pump, args=(outer, inner), daemon=True).start()
            pump(inner, outer)

    with listening(forward) as proxy:
        client = client_type(f"127.0.0.1:{proxy}", model="fake", protocol=protocol, retries=0)
        with client:
            assert client.model_config().name == "fake"
