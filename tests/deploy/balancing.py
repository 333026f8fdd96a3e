"""The balancers' recipes, started with the real programs, and clients behind them."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from ssd_client import SSDClient

from models.shapes.scenes import scene
from tests.deploy.conftest import ROOT, Server, free_ports, need, parsed, run, running

BALANCER = ROOT / "deploy" / "balancer"
CLIENTS = 4


@dataclass
class Balancer:
    """A running balancer's addresses."""

    http: str
    grpc: str
    admin: Path | None = None

    def state(self, state: str, server: str = "two") -> None:
        """Takes a server out (drain) or in (ready), where the recipe says to do so before a server ends."""
        if self.admin is None:
            return
        for backend in ("http_servers", "grpc_servers"):
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(str(self.admin))
                control.sendall(f"set server {backend}/{server} state {state}\n".encode())
                assert control.recv(1000).strip() == b""


@dataclass(frozen=True)
class Certificate:
    """Of localhost, signed by itself."""

    folder: Path

    @property
    def chain(self) -> Path:
        return self.folder / "tls.crt"

    def make(self) -> Certificate:
        names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        files = ["-keyout", self.folder / "tls.key", "-out", self.chain]
        run("openssl", "req", *kind, *names, *files, check=True)
        both = self.chain.read_bytes() + (self.folder / "tls.key").read_bytes()
        (self.folder / "both.pem").write_bytes(both)
        return self


@contextmanager
def haproxy(servers: list[Server], folder: Path, tls: Certificate | None = None) -> Iterator[Balancer]:
    """HAProxy as the recipe has it, on free ports."""
    http, grpc = free_ports(2)
    variables = {"SSD_BIND": "127.0.0.1", "SSD_HTTP_PORT": str(http), "SSD_GRPC_PORT": str(grpc)}
    for number, server in enumerate(servers, 1):
        variables[f"SSD_SERVER_{number}"] = server.http
        variables[f"SSD_SERVER_{number}_GRPC"] = server.grpc
        variables[f"SSD_SERVER_{number}_HEALTH"] = str(server.ports[3 if server.drain else 0])
        if server.drain:
            variables["SSD_HEALTH_PATH"] = "/readyz"
    if tls is not None:
        variables["SSD_TLS"] = f"ssl crt {tls.folder / 'both.pem'}"
    with tempfile.TemporaryDirectory(prefix="ssd-") as short:  # a socket's path may have 107 bytes
        admin = Path(short) / "admin"
        with _haproxy({**os.environ, **variables, "SSD_ADMIN_SOCKET": str(admin)}, folder):
            yield Balancer(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", admin)


@contextmanager
def _haproxy(variables: dict[str, str], folder: Path) -> Iterator[None]:
    config = BALANCER / "haproxy.cfg"
    checked = run("haproxy", "-c", "-f", config, env=variables)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr, checked.stderr
    with running([need("haproxy"), "-db", "-f", config], folder / "haproxy.log", env=variables):
        yield


@contextmanager
def envoy(servers: list[Server], folder: Path, tls: Certificate | None = None) -> Iterator[Balancer]:
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
    if tls is not None:
        text = (BALANCER / "envoy_tls.yaml").read_text().replace("/etc/ssl/ssd", str(tls.folder))
        (folder / "tls.yaml").write_text(text)
        (added,) = parsed(folder / "tls.yaml")
        for listener in config["static_resources"]["listeners"]:
            listener["filter_chains"][0] |= added
    path = folder / "envoy.json"
    path.write_text(json.dumps(config))
    run("envoy", "--mode", "validate", "-c", path, check=True)
    command = [need("envoy"), "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]
    with running(command, folder / "envoy.log"):
        yield Balancer(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}")


BALANCERS: dict[str, Callable[..., Any]] = {"haproxy": haproxy, "envoy": envoy}


@dataclass
class Count:
    """What the clients saw, and the picture that they send from now on."""

    picture: Image.Image
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    slowest: float = 0.0


@contextmanager
def clients(address: str, protocol: str, retries: int) -> Iterator[Count]:
    """Four clients that ask without a pause."""
    count, stopped, lock = Count(scene("held_out", 0).image), threading.Event(), threading.Lock()

    def ask() -> None:
        with SSDClient(address, protocol=protocol, model="shapes", timeout=30, retries=retries) as client:  # type: ignore[arg-type]
            while not stopped.is_set():
                started = time.monotonic()
                try:
                    client.detect(count.picture)
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
