"""The balancers' recipes with the real programs: two servers, four clients, one server killed, ended or halted."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ssd_client import SSDClient

from models.shapes.scenes import scene
from tests.deploy.conftest import ROOT, Server, free_ports, get, need, parsed, run, running, wait

BALANCER = ROOT / "deploy" / "balancer"
CLIENTS = 4
pytestmark = [pytest.mark.triton, pytest.mark.long]


@dataclass
class Balancer:
    """A running balancer's addresses."""

    http: str
    grpc: str


@contextmanager
def haproxy(servers: list[Server], folder: Path) -> Iterator[Balancer]:
    """HAProxy as the recipe has it, on free ports."""
    http, grpc = free_ports(2)
    variables = {"SSD_BIND": "127.0.0.1", "SSD_HTTP_PORT": str(http), "SSD_GRPC_PORT": str(grpc)}
    for number, server in enumerate(servers, 1):
        variables[f"SSD_SERVER_{number}"] = server.http
        variables[f"SSD_SERVER_{number}_GRPC"] = server.grpc
        variables[f"SSD_SERVER_{number}_HEALTH"] = str(server.ports[0])
    variables = {**os.environ, **variables}
    config = BALANCER / "haproxy.cfg"
    checked = run("haproxy", "-c", "-f", config, env=variables)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr, checked.stderr
    with running([need("haproxy"), "-db", "-f", config], folder / "haproxy.log", env=variables):
        yield Balancer(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}")


@contextmanager
def envoy(servers: list[Server], folder: Path) -> Iterator[Balancer]:
    """Envoy as the recipe has it; only addresses and ports are replaced."""
    http, grpc, admin = free_ports(3)
    (config,) = parsed(BALANCER / "envoy.yaml")
    config["admin"]["address"]["socket_address"]["port_value"] = admin
    for listener, port in zip(config["static_resources"]["listeners"], (http, grpc), strict=True):
        listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    for number, cluster in enumerate(config["static_resources"]["clusters"]):
        for server, entry in zip(servers, cluster["load_assignment"]["endpoints"][0]["lb_endpoints"], strict=True):
            address = {"address": "127.0.0.1", "port_value": server.ports[number]}
            entry["endpoint"]["address"]["socket_address"] = address
    path = folder / "envoy.json"
    path.write_text(json.dumps(config))
    run("envoy", "--mode", "validate", "-c", path, check=True)
    command = [need("envoy"), "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]
    with running(command, folder / "envoy.log"):
        yield Balancer(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}")


BALANCERS: dict[str, Callable[..., Any]] = {"haproxy": haproxy, "envoy": envoy}


@dataclass
class Count:
    """What the clients saw."""

    answered: int = 0
    failed: list[str] = field(default_factory=list)
    slowest: float = 0.0


@contextmanager
def clients(address: str, protocol: str, retries: int) -> Iterator[Count]:
    """Four clients that ask without a pause."""
    count, stopped, lock = Count(), threading.Event(), threading.Lock()
    picture = scene("held_out", 0).image

    def ask() -> None:
        with SSDClient(address, protocol=protocol, model="shapes", timeout=30, retries=retries) as client:  # type: ignore[arg-type]
            while not stopped.is_set():
                started = time.monotonic()
                try:
                    client.detect(picture)
                    with lock:
                        count.answered += 1
                        count.slowest = max(count.slowest, time.monotonic() - started)
                except Exception as error:
                    with lock:
                        count.failed.append(f"{type(error).__name__}: {str(error)[:200]}")

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield count
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


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
