"""The balancers' recipes with the real programs: two servers, four clients, one server killed, ended or halted."""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.balancing import BALANCERS, Balancer, clients
from tests.deploy.conftest import Server, get, wait

pytestmark = [pytest.mark.triton, pytest.mark.long]


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


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "SIGSTOP"])
def test_no_request_fails_when_one_server_goes(
    balancer: Balancer, servers: list[Server], protocol: str, end: str, record_property: Callable[[str, object], None]
) -> None:
    own = servers[1]
    with clients(balancer.grpc if protocol == "grpc" else balancer.http, protocol, retries=3) as count:
        wait("requests are answered", lambda: count.answered > 40, 60)
        own.send(signal.Signals[end])
        before = count.answered
        wait("the other server answers", lambda: count.answered > before + 60, 90)
        if end == "SIGSTOP":
            own.send(signal.SIGCONT)
        else:
            own.stop()
            own.start()
        before = count.answered
        wait("both answer", lambda: count.answered > before + 40, 90)
    record_property("answered", count.answered)
    print(f"{protocol}, {end}: {count.answered} answered, {len(count.failed)} failed, slowest {count.slowest:.2f} s")
    assert count.failed == []


def status(address: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> int:
    request = urllib.request.Request(f"http://{address}{path}", body, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_limits_hold(balancer: Balancer) -> None:
    for path in ("/v2/repository/index", "/v2/systemsharedmemory/status", "/v2/logging", "/metrics"):
        assert status(balancer.http, path) in (403, 404), path
    too_much = status(
        balancer.http, "/v2/models/shapes/infer", bytes(51 << 20), {"Content-Type": "application/octet-stream"}
    )
    assert too_much == 413
    assert status(balancer.http, "/v2/models/shapes") == 200
