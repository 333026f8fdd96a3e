"""The balancers' recipes with the real programs: two servers, four clients, one server killed, ended or halted."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ssd_client import TLS, SSDClient, SSDClientError

from models.shapes.scenes import scene
from tests.deploy.balancing import BALANCERS, Balancer, Certificate, clients
from tests.deploy.conftest import Server, get, two_servers, wait


@pytest.mark.parametrize("name", list(BALANCERS))
def test_the_program_takes_its_recipe_and_refuses_who_has_no_server(name: str, tmp_path: Path) -> None:
    absent = [Server("", tmp_path, tmp_path / "log") for _ in range(2)]
    with BALANCERS[name](absent, tmp_path) as balancer:
        wait("it answers 503", lambda: status(balancer.http, "/v2/models/shapes") == 503, 20)


@pytest.fixture(params=list(BALANCERS))
def balancer(request: pytest.FixtureRequest, servers: list[Server], tmp_path: Path) -> Iterator[Balancer]:
    """Each balancer in front of the two servers."""
    for server in servers:
        if server.process is None or server.process.poll() is not None:
            server.stop()
            server.start()
    with BALANCERS[request.param](servers, tmp_path) as own:
        wait("the balancer passes requests", lambda: get(f"http://{own.http}/v2/health/ready") == "", 30)
        yield own


@pytest.mark.triton
@pytest.mark.long
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "SIGSTOP"])
def test_no_request_fails_when_one_server_goes(
    balancer: Balancer, servers: list[Server], protocol: str, end: str, record_property: Callable[[str, object], None]
) -> None:
    own = servers[1]
    with clients(balancer.grpc if protocol == "grpc" else balancer.http, protocol, retries=3) as count:
        wait("requests are answered", lambda: count.answered > 40, 60)
        if end == "SIGTERM":
            balancer.state("drain")
            time.sleep(1)  # what it runs is answered
        own.send(signal.Signals[end])
        before = count.answered
        wait("the other server answers", lambda: count.answered > before + 60, 90)
        if end == "SIGSTOP":
            own.send(signal.SIGCONT)
        else:
            own.stop()
            own.start()
            balancer.state("ready")
        before = count.answered
        wait("both answer", lambda: count.answered > before + 40, 90)
    record_property("answered", count.answered)
    print(f"{protocol}, {end}: {count.answered} answered, {len(count.failed)} failed, slowest {count.slowest:.2f} s")
    assert count.failed == []


@pytest.mark.triton
@pytest.mark.long
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(("name", "drain"), [("envoy", 0), ("haproxy", 4)])
def test_a_rollout_costs_no_request_even_without_retries_in_the_client(
    name: str, drain: int, protocol: str, data_repository: Path, backend_folder: Path, tmp_path: Path
) -> None:
    """What a Deployment does to its pods: one server after the other gets SIGTERM and comes back with version 2.

    Envoy repeats what a server that ends refuses. HAProxy cannot repeat gRPC by its status, so there the servers drain.
    """
    newer = Path(shutil.copytree(data_repository, tmp_path / "newer"))
    (newer / "shapes" / "1").rename(newer / "shapes" / "2")
    config = newer / "shapes" / "config.pbtxt"
    config.write_text(config.read_text().replace("versions: 1", "versions: 2"))
    with (
        two_servers(data_repository, backend_folder, tmp_path, drain) as servers,
        BALANCERS[name](servers, tmp_path) as own,
    ):
        wait("the balancer passes requests", lambda: get(f"http://{own.http}/v2/health/ready") == "", 30)
        with clients(own.grpc if protocol == "grpc" else own.http, protocol, retries=0) as count:
            for server in servers:
                answered = count.answered
                wait("requests are answered", lambda answered=answered: count.answered > answered + 60, 60)
                server.send(signal.SIGTERM)
                assert server.process is not None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.process.wait(20)  # the grace period; what is left then is killed
                server.stop()
                server.repository = str(newer)
                server.start()
                time.sleep(2)  # until the balancer knows
        for server in servers:
            assert '"versions":["2"]' in get(f"http://{server.http}/v2/models/shapes")
    print(f"{name}, {protocol}: {count.answered} answered, {len(count.failed)} failed, slowest {count.slowest:.2f} s")
    assert count.failed == []


def status(address: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> int:
    """The status of an answer; 413 where the connection was closed while the body was sent."""
    request = urllib.request.Request(f"http://{address}{path}", body, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        if isinstance(error.reason, BrokenPipeError | ConnectionResetError):
            return 413
        raise


@pytest.mark.triton
@pytest.mark.long
def test_limits_hold(balancer: Balancer) -> None:
    for path in ("/v2/repository/index", "/v2/systemsharedmemory/status", "/v2/logging", "/metrics"):
        assert status(balancer.http, path) in (403, 404), path
    infer = "/v2/models/shapes/infer"
    binary = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "100"}
    assert status(balancer.http, infer, bytes(51 << 20), binary) == 413
    nested = b'{"inputs":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    assert status(balancer.http, infer, nested) == 413
    assert status(balancer.http, infer, nested, {**binary, "Inference-Header-Content-Length": "400011"}) == 413
    assert status(balancer.http, infer, b"x" * 100, {**binary, "Content-Encoding": "gzip"}) in (400, 415)
    assert status(balancer.http, "/v2/models/shapes") == 200
    host, port = balancer.http.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        started = time.monotonic()
        slow.sendall(b"GET /v2/models/shapes HTTP/1.1\r\nHost: a\r\n")
        slow.recv(1000)  # an answer or the end
        assert 3 < time.monotonic() - started < 12


@pytest.mark.triton
@pytest.mark.long
@pytest.mark.parametrize("name", list(BALANCERS))
def test_both_ports_speak_tls_where_asked(name: str, servers: list[Server], tmp_path: Path) -> None:
    certificate = Certificate(tmp_path).make()
    picture = scene("held_out", 0).image
    with BALANCERS[name](servers, tmp_path, certificate) as balancer:
        for protocol, address in (("grpc", balancer.grpc), ("http", balancer.http)):
            secure = SSDClient(address, protocol=protocol, model="shapes", ssl=TLS(certificate.chain))  # type: ignore[arg-type]
            with secure as client:
                assert len(client.detect(picture)) > 0
            with (
                SSDClient(address, protocol=protocol, model="shapes", retries=0) as plain,
                pytest.raises(SSDClientError),
            ):  # type: ignore[arg-type]
                plain.detect(picture)
