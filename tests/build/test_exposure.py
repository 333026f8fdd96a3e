"""Who may reach a server: addresses of both families, TLS, and endpoints that need a token."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from build import exposure
from build.errors import ServeError
from build.exposure import Exposure, Tls
from build.serve import TritonServer

PORTS = {"http": 1, "grpc": 2, "metrics": 3}


@pytest.mark.parametrize(
    ("host", "open_", "http", "grpc", "client"),
    [
        ("127.0.0.1", False, "127.0.0.1", "127.0.0.1", "127.0.0.1:1"),
        ("0.0.0.0", True, "0.0.0.0", "0.0.0.0", "127.0.0.1:1"),
        ("::1", False, "ipv6:::1", "[::1]", "[::1]:1"),
        ("::", True, "ipv6:::", "[::]", "[::1]:1"),
        ("10.1.2.3", True, "10.1.2.3", "10.1.2.3", "10.1.2.3:1"),
    ],
)
def test_addresses_as_triton_takes_them(host: str, open_: bool, http: str, grpc: str, client: str) -> None:
    asked = Exposure(host)
    arguments = asked.arguments(PORTS)
    assert f"--http-address={http}" in arguments
    assert f"--metrics-address={http}" in arguments
    assert f"--grpc-address={grpc}" in arguments
    assert asked.open is open_
    assert bool(asked.warnings()) is open_
    assert asked.reached_at("http", 1) == client


def test_with_tls_only_grpc_is_open(tmp_path: Path) -> None:
    tls = Tls(tmp_path / "cert", tmp_path / "key", tmp_path / "clients")
    arguments = Exposure("0.0.0.0", tls).arguments(PORTS)
    assert {"--http-address=127.0.0.1", "--metrics-address=127.0.0.1", "--grpc-address=0.0.0.0"} <= set(arguments)
    assert "--grpc-use-ssl-mutual=true" in arguments


def test_a_server_for_others_gets_a_token_that_only_its_user_reads(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "token"
    assert exposure.exposure("127.0.0.1", token_file=file).token == ""
    assert not file.exists()
    first = exposure.exposure("0.0.0.0", token_file=file)
    assert len(first.token) >= 24
    assert file.stat().st_mode & 0o777 == 0o600
    assert exposure.exposure("::", token_file=file).token == first.token
    file.write_text("short")
    with pytest.raises(ServeError, match="holds no token"):
        exposure.exposure("0.0.0.0", token_file=file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cert": "a"}, "needs a certificate and its key, given is --ssl-cert"),
        ({"clients": "a"}, "given is --ssl-clients"),
        ({"cert": "/gone.pem", "key": "/gone.key"}, "gone.pem: there is no such file"),
    ],
)
def test_tls_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ServeError, match=message):
        exposure.exposure("127.0.0.1", **options)


def test_a_name_becomes_the_address_that_triton_takes() -> None:
    assert exposure.exposure("localhost").host == "127.0.0.1"
    for host in ("999.1.1.1", "", "no such host"):
        with pytest.raises(ServeError, match="which is no address and no name of one"):
            exposure.exposure(host)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """A certificate for localhost that signs itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    tls = Tls(folder / "cert.pem", folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(tls.key), "-out", str(tls.certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return tls


@pytest.mark.triton
def test_an_encrypted_server_on_ipv6_with_a_token(repository: Path, certificate: Tls) -> None:
    """One server for all three: detection is open to those who trust the certificate, administration asks a token."""
    asked = Exposure("::", certificate, "a-token-of-some-length")
    with TritonServer(repository, exposure=asked) as server:
        server.check()
        root = certificate.certificate.read_bytes()
        grpc_port = server.grpc_url.rsplit(":", 1)[1]
        options = triton_grpc.InferenceServerClient(
            f"localhost:{grpc_port}", ssl=True, root_certificates=str(certificate.certificate)
        )
        with closing(options) as client:
            assert client.is_model_ready("shapes")
            with pytest.raises(InferenceServerException, match="restricted"):
                client.get_system_shared_memory_status()
            headers = {f"triton-grpc-protocol-{exposure.TOKEN_HEADER}": asked.token}
            assert client.get_system_shared_memory_status(headers=headers) is not None
        assert ssl.PEM_cert_to_DER_cert(root.decode())
        plain = triton_grpc.InferenceServerClient(f"localhost:{grpc_port}")
        with closing(plain) as client, pytest.raises(InferenceServerException, match="UNAVAILABLE"):
            client.is_server_live(client_timeout=5)
        index = f"http://{server.http_url}/v2/repository/index"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(index, b"")
        request = urllib.request.Request(index, b"", dict(asked.headers))
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)[0]["name"] == "shapes"


@pytest.mark.triton
def test_a_server_on_ipv6_alone(repository: Path) -> None:
    with TritonServer(repository, exposure=Exposure("::1")) as server:
        assert server.http_url.startswith("[::1]:")
        server.check()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"http_port": 99_999}, "--http-port is '99999'"),
        ({"grpc_port": "-1"}, "--grpc-port is '-1'"),
        ({"metrics_port": "web"}, "--metrics-port is 'web'"),
        ({"http_port": 8000, "grpc_port": "8000"}, "--http-port and --grpc-port are both 8000"),
    ],
)
def test_ports_are_checked_before_anything_starts(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=words):
        TritonServer(tmp_path, **given)
    TritonServer(tmp_path, http_port="0", grpc_port=0, metrics_port=65_535)
