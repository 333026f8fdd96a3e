"""Forms of an address, proxies of the environment, and headers: what is accepted and what is refused with a reason."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from ssd_client import (
    TLS,
    AccessDeniedError,
    InferenceError,
    InvalidInputError,
    ModelNotReadyError,
    ServerUnavailableError,
)
from ssd_client.endpoint import Endpoint

from build.serve import TritonServer
from tests.client.conftest import CLIENTS, listening, pump, scene, server_on, url_of

PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "no_proxy", "no_grpc_proxy")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("url", "protocol", "address", "kind", "path"),
    [
        ("triton", None, "triton:8001", "grpc", ""),
        ("triton", "http", "triton:8000", "http", ""),
        ("[::1]", None, "[::1]:8001", "grpc", ""),
        ("[::1]:5", "http", "[::1]:5", "http", ""),
        ("triton:9/v1/ssd/", "http", "triton:9", "http", "/v1/ssd"),
        ("http://triton", None, "triton:80", "http", ""),
        ("http://triton:8000/a", None, "triton:8000", "http", "/a"),
        ("https://triton", None, "triton:443", "http", ""),
        ("https://triton:8001", "grpc", "triton:8001", "grpc", ""),
        ("dns:///triton:8001", None, "dns:///triton:8001", "grpc", ""),
        ("dns:///triton", None, "dns:///triton:8001", "grpc", ""),
        ("unix:/tmp/triton.sock", None, "unix:/tmp/triton.sock", "grpc", ""),
    ],
)
def test_forms(url: str, protocol: Any, address: str, kind: str, path: str) -> None:
    endpoint = Endpoint.parse(url, protocol, "m", None)
    assert (endpoint.addresses, endpoint.protocol, endpoint.path) == ((address,), kind, path)
    assert (endpoint.tls is not None) == url.startswith("https:")
    assert endpoint.is_balanced == url.startswith("dns:")


@pytest.mark.parametrize("urls", ["h1:1, h2", ["h1:1", "h2"], ("h1:1", "h2:8001")])
def test_several_addresses(urls: Any) -> None:
    endpoint = Endpoint.parse(urls, None, "m", None)
    assert endpoint.addresses == ("h1:1", "h2:8001")
    assert endpoint.is_balanced


@pytest.mark.parametrize(
    ("url", "protocol", "tls", "named"),
    [
        ("::1", None, None, "host:port"),
        ("http://user:secret@triton", None, None, r"//\.\.\.@triton(.|\n)*headers="),
        ("http://triton/a?b=c", None, None, "host:port"),
        ("triton:8001/a", "grpc", None, "gRPC knows no base path"),
        ("http://triton", None, TLS(), "write https://"),
        ("unix:/tmp/x", "http", None, "host:port"),
        ("dns:///triton", "http", None, "host:port"),
        (["a", "b"], "http", None, "several addresses need gRPC"),
        (["a", "dns:///b"], None, None, "several addresses need gRPC"),
        ([], None, None, "url is"),
        (["a", ""], None, None, "host:port"),
        (["a", None], None, None, "url is None"),
        (7, None, None, "url is 7"),
        (b"triton", None, None, "url is b'triton'"),
        ("triton:８００１", None, None, "host:port"),
        ("triton:0", None, None, "host:port"),
        ("h\x1b[31m:1", None, None, r"url is 'h\\x1b"),
    ],
)
def test_wrong_forms(url: Any, protocol: Any, tls: Any, named: str) -> None:
    with pytest.raises(InvalidInputError, match=named) as caught:
        Endpoint.parse(url, protocol, "m", tls)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "protocol", "named"),
    [
        ({"a b": "c"}, "http", "name is 'a b'"),
        ({"a": "b\r\nc: d"}, "http", "value of header a"),
        ({"Content-Length": "1"}, "http", "name is 'Content-Length'"),
        ({"a": 7}, "http", "value of header a"),
        ({"a": "ü"}, "grpc", "value of header a"),
        ({"a-bin": "b"}, "grpc", "a-bin"),
        ({"a!": "b"}, "grpc", "a!"),
    ],
)
def test_wrong_headers(headers: Any, protocol: str, named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        Endpoint.parse("triton", protocol, "m", None, headers)


def test_headers_are_secrets() -> None:
    endpoint = Endpoint.parse("triton", None, "m", None, {"Authorization": "Bearer hush"})
    assert endpoint.headers == (("authorization", "Bearer hush"),)
    assert "hush" not in repr(endpoint) + str(endpoint)


@pytest.mark.parametrize(
    ("url", "environment", "proxy"),
    [
        ("triton", {"grpc_proxy": "http://p:1", "http_proxy": "http://q:1"}, "http://p:1"),
        ("triton", {"http_proxy": "http://p:1", "no_grpc_proxy": "triton"}, None),
        ("http://triton", {"http_proxy": "p:1"}, "http://p:1"),
        ("http://triton", {"https_proxy": "http://p:1"}, None),
        ("https://triton", {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ("10.1.2.3", {"http_proxy": "http://p:1", "no_proxy": "x, 10.0.0.0/8"}, None),
        ("http://10.1.2.3", {"http_proxy": "http://p:1", "no_proxy": "10.0.0.0/8"}, None),
        ("http://11.1.2.3", {"http_proxy": "http://p:1", "no_proxy": "10.0.0.0/8"}, "http://p:1"),
        ("http://a.triton", {"http_proxy": "http://p:1", "no_proxy": ".triton"}, None),
        *((url, dict.fromkeys(PROXIES[:4], "http://p:1"), None) for url in (
            "localhost", "127.0.0.1", "127.8.9.1:5", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "LOCALHOST.",
            "a.localhost", "http://localhost", "https://127.0.0.1:8/p", "unix:/tmp/x", "dns:///localhost:8001",
        )),
    ],
)  # fmt: skip
def test_which_proxy(url: str, environment: dict[str, str], proxy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Endpoint.parse(url, None, "m", None).proxy == proxy


def test_proxies_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://me:secret@p:1")
    with pytest.raises(InvalidInputError, match="is no http:// proxy") as caught:
        Endpoint.parse("http://triton", None, "m", None)
    assert "secret" not in str(caught.value)
    with pytest.raises(InvalidInputError, match="several addresses cannot go through the proxy"):
        Endpoint.parse(["h1", "h2"], None, "m", None)
    Endpoint.parse(["localhost:1", "localhost:2"], None, "m", None)


@pytest.mark.parametrize(
    ("code", "reason", "kind", "says"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses", ServerUnavailableError, "no server answers"),
        ("UNAVAILABLE", "Socket closed", ServerUnavailableError, "no server answers"),
        (
            "UNAVAILABLE",
            "[request id: <id>] Exceeds maximum queue size",
            ServerUnavailableError,
            "cannot take the request",
        ),
        ("UNAVAILABLE", "Request timeout expired", ServerUnavailableError, "cannot take the request"),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'x'", AccessDeniedError, "does not let this"),
        ("PERMISSION_DENIED", "RBAC: access denied", AccessDeniedError, "does not let this"),
        ("UNAUTHENTICATED", "no token", AccessDeniedError, "does not let this"),
        ("UNAVAILABLE", "Request for model 'm' has no available versions", ModelNotReadyError, "no version of model"),
        ("UNAVAILABLE", "Request for unknown model: 'm' version 2 is not at ready state", ModelNotReadyError, "ready"),
        ("UNIMPLEMENTED", "", InferenceError, "UNIMPLEMENTED"),
        ("HTTP 413", "too large", InferenceError, "HTTP 413"),
    ],
)
def test_refusals(code: str, reason: str, kind: type[Exception], says: str) -> None:
    error = Endpoint.parse("triton", None, "m", None).refused(code, reason)
    assert type(error) is kind
    assert says in str(error)
    assert ("not running" in str(error)) == (says == "no server answers")


@contextlib.contextmanager
def proxy_to(server: TritonServer, requests: list[str]) -> Iterator[int]:
    """A proxy that knows one server, whatever name is asked for; it takes CONNECT and whole URLs."""

    def handle(outer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += outer.recv(1 << 16)
            line, _, rest = head.partition(b"\r\n")
            requests.append(line.decode())
            method, target, version = line.split(b" ")
            place = server.grpc_url if b":8001" in target else server.http_url
            inner = socket.create_connection(("127.0.0.1", int(place.rpartition(":")[2])))
            if method == b"CONNECT":
                outer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                path = re.sub(rb"^http://[^/]+", b"", target)
                inner.sendall(b" ".join([method, path, version]) + b"\r\n" + rest.replace(b"http://far:8000", b""))
            threading.Thread(target=pump, args=(outer, inner), daemon=True).start()
            pump(inner, outer)

    with listening(handle) as port:
        yield port


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_proxies(server: TritonServer, protocol: Any, client_type: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []
    with proxy_to(server, requests) as port:
        for name in ("http_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://me:secret@127.0.0.1:{port}")
        with client_type(url_of(server, protocol), model="fake", protocol=protocol) as client:
            assert len(client.detect(scene())) == 3
        assert requests == [], "this machine is not reached through a proxy"
        with client_type("far.example", model="fake", protocol=protocol, retries=0) as client:
            assert client.model_config().name == "fake"
        wanted = (
            "CONNECT far.example:8001" if protocol == "grpc" else "GET http://far.example:8000/v2/models/fake/config"
        )
        assert requests[0].startswith(wanted)
    refusal = pytest.raises(ServerUnavailableError, match=r"through the proxy 'http://\.\.\.@127.0.0.1(.|\n)*no_proxy")
    with client_type("far.example", model="fake", protocol=protocol, retries=0) as client, refusal as caught:
        client.model_config()
    assert "secret" not in str(caught.value)


@pytest.fixture(scope="module")
def restricted(repository: Any) -> Iterator[TritonServer]:
    """Infers for those who have the token only."""
    options = ["--grpc-restricted-protocol=inference:token=sesame", "--http-restricted-api=inference:token=sesame"]
    with server_on(repository, *options) as server:
        yield server


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_tokens(restricted: TritonServer, protocol: Any, client_type: Any) -> None:
    url, name = url_of(restricted, protocol), "triton-grpc-protocol-token" if protocol == "grpc" else "token"
    for headers in (None, {name: "wrong"}):
        with client_type(url, model="fake", protocol=protocol, headers=headers, retries=5) as client:
            client.model_config()
            with pytest.raises(AccessDeniedError, match=r"does not let this client in(.|\n)*restricted(.|\n)*headers="):
                client.detect(scene())
    with client_type(url, model="fake", protocol=protocol, headers={name: "sesame"}) as client:
        assert len(client.detect(scene())) == 3


@pytest.mark.triton
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_a_base_path(server: TritonServer, client_type: Any) -> None:
    """As behind a gateway that serves several things; it wants a token, too."""
    wanted = b"/gate/way/v2/"

    def handle(outer: socket.socket) -> None:
        inner = socket.create_connection(("127.0.0.1", int(server.http_url.rpartition(":")[2])))
        threading.Thread(target=pump, args=(inner, outer), daemon=True).start()
        with contextlib.suppress(OSError):
            while data := outer.recv(1 << 16):
                if data.startswith((b"GET", b"POST")):
                    if wanted not in data or b"Authorization: Bearer x" not in data:
                        outer.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 4\r\n\r\nno\x1b!")
                        break
                    data = data.replace(wanted, b"/v2/", 1)
                inner.sendall(data)
        for end in (inner, outer):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    with listening(handle) as port:
        url, headers = f"http://127.0.0.1:{port}/gate/way", {"Authorization": "Bearer x"}
        with client_type(url, model="fake", headers=headers, shared_memory="system") as client:
            assert len(client.detect(scene())) == 3
        with client_type(url, model="fake") as client, pytest.raises(AccessDeniedError, match=r"no\\x1b!"):
            client.detect(scene())
