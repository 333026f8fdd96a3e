"""What travels encrypted, and what a client makes of servers that answer nonsense."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ssd_client import TLS, InvalidInputError, ServerUnavailableError, SSDClient, SSDClientError

from tests.client.conftest import scene, server_on
from tests.client.test_client import FACES


@contextlib.contextmanager
def listening(handle: Callable[[socket.socket], None]) -> Iterator[int]:
    """A TCP server on a free port that hands every connection to `handle` in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    subprocess.run([*command, *subject], check=True, capture_output=True)
    return certificate, key


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
@pytest.mark.parametrize("face", FACES, ids=["sync", "asyncio"])
def test_tls(encrypted: dict[str, str], certificate: tuple[Path, Path], protocol: Any, face: Any) -> None:
    url = encrypted[protocol]
    with face(url, model="fake", protocol=protocol, ssl=TLS(root_certificates=certificate[0])) as client:
        assert client.detect(scene()).labels == ("red", "blue", "checksum")
    for trust in (TLS(), None):  # an authority nobody knows; no encryption at all
        refusal = pytest.raises(SSDClientError, match=rf"{url}(.|\n)*what to do")
        with face(url, model="fake", protocol=protocol, ssl=trust, retries=0, timeout=10) as client, refusal:
            client.detect(scene())


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("face", FACES, ids=["sync", "asyncio"])
def test_tls_files_that_cannot_be_used(tmp_path: Path, protocol: Any, face: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot read the TLS file .*none\.pem: No such file"):
        face("localhost", model="m", protocol=protocol, ssl=TLS(tmp_path / "none.pem")).model_config()


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
@pytest.mark.parametrize("face", FACES, ids=["sync", "asyncio"])
def test_nonsense_over_http(face: Any, answer: bytes) -> None:
    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(answer)

    with listening(handle) as port:
        client = face(f"127.0.0.1:{port}", model="m", protocol="http", retries=1, timeout=5)
        with client, pytest.raises(SSDClientError):
            client.model_config()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("face", FACES, ids=["sync", "asyncio"])
def test_a_server_that_hangs_up_is_asked_again(face: Any, protocol: Any) -> None:
    calls = []

    def handle(connection: socket.socket) -> None:
        calls.append(1)
        connection.close()

    with listening(handle) as port:
        client = face(f"127.0.0.1:{port}", model="m", protocol=protocol, retries=2)
        with client, pytest.raises(ServerUnavailableError):
            client.model_config()
    assert len(calls) >= 2, "a gRPC channel may answer one attempt from the failure of the one before"


def test_ipv6_and_default_ports() -> None:
    for url, protocol, expected in (
        ("::1", "grpc", None),
        ("[::1]", "grpc", "[::1]:8001"),
        ("[::1]:5", "http", "[::1]:5"),
        ("triton", "http", "triton:8000"),
        ("triton", "grpc", "triton:8001"),
    ):
        if expected is None:
            with pytest.raises(InvalidInputError, match="host:port"):
                SSDClient(url, model="m")
        else:
            client = SSDClient(url, model="m", protocol=protocol)  # type: ignore[arg-type]
            assert client._session.endpoint.url == expected
            client.close()
