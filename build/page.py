"""A server to ask: the one that runs at an address, or a new one on the published models, as `invoke page` needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from build.errors import ServeError
from build.files import ARTIFACTS, REPOSITORY
from build.serve import TritonServer
from build.supervise import LOG

_PORT = "8001"
_PATIENCE = 3.0  # seconds


@contextlib.contextmanager
def server_at(
    address: str, repository: Path = REPOSITORY, *, artifacts: Path = ARTIFACTS, log: Path = LOG
) -> Iterator[tuple[str, bool]]:
    """The gRPC address of a running server, and whether it was started here.

    Args:
        address: of a server that runs, in any form that `SSDClient` takes for gRPC; "" = the one on this machine's
            usual port, else a new one.
        repository: what a new server serves. If it is empty, `shapes` is built first.
        artifacts: of that build.
        log: of a new server.

    Raises:
        ServeError: nothing answers at `address`, or a new server does not come up.
        SSDError: the build failed.
    """
    wanted = address or f"localhost:{_PORT}"
    if _answers(wanted):
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


def _answers(address: str) -> bool:
    """Whether a gRPC server is there, for the SDK as the gateway uses it."""
    from ssd_client.exceptions import InvalidInputError, RequestTimeoutError, ServerUnavailableError, SSDClientError
    from ssd_client.messages import Message
    from ssd_client.transport import Endpoint, transport_for
    from tritonclient.grpc import service_pb2

    try:
        endpoint = Endpoint.parse(address, "grpc", "any", None)
        with contextlib.closing(transport_for(endpoint)) as transport:
            transport.send(Message("ServerLive", service_pb2.ServerLiveRequest(), {}), _PATIENCE)
    except InvalidInputError as error:
        raise ServeError(f"--triton {address} is no address of a gRPC server: {error}") from None
    except (ServerUnavailableError, RequestTimeoutError):
        return False
    except SSDClientError:  # it answers, if only that it does not let us in
        return True
    return True
