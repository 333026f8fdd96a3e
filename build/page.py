"""A server to ask: the one that runs at an address, or a new one on the published models, as `invoke page` needs it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from build.errors import ServeError
from build.files import ARTIFACTS, REPOSITORY
from build.serve import TritonServer
from build.supervise import LOG

_PORT = "8001"


@contextlib.contextmanager
def server_at(
    address: str, repository: Path = REPOSITORY, *, artifacts: Path = ARTIFACTS, log: Path = LOG
) -> Iterator[tuple[str, bool]]:
    """The gRPC address of a running server, and whether it was started here.

    Args:
        address: `host[:port]` of a server that runs; "" = the one on this machine's usual port, else a new one.
        repository: what a new server serves. If it is empty, `shapes` is built first.
        artifacts: of that build.
        log: of a new server.

    Raises:
        ServeError: nothing answers at `address`, or a new server does not come up.
        SSDError: the build failed.
    """
    host, _, port = (address or "localhost").partition(":")
    wanted = f"{host}:{port or _PORT}"
    if _answers(host, port or _PORT):
        yield wanted, False
        return
    if address:
        raise ServeError(
            f"nothing answers at {wanted}",
            why="the server does not run, or listens on another port (gRPC: usually 8001)",
            fix="start it, or leave --triton out: ./invoke page then starts one",
        )
    if not any(repository.glob("*/config.pbtxt")):
        from build import pipeline
        from build.gate.accuracy import mean_average_precision

        print(f"no model is published in {repository}: building the example, shapes", flush=True)
        pipeline.build_engines(["shapes"], repository=repository, artifacts=artifacts, judge=mean_average_precision)
    with TritonServer(repository, poll_seconds=2, log=log) as server:
        print(f"Triton {server.version} started with {', '.join(server.models)}; its log: {log}", flush=True)
        yield server.grpc_url, True


def _answers(host: str, port: str) -> bool:
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return True
    except (OSError, ValueError, OverflowError):
        return False
