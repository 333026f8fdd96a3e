"""Tasks that serve what is published, and say what state it is in."""

from __future__ import annotations

import os

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from .common import ARTIFACTS, REPOSITORY, explained, given


@task
@explained
def demo(c: Context, quick: bool = False) -> None:
    """The whole way: build, serve on a real Triton server, detect, evaluate, load; writes artifacts/demo/.

    --quick: fewer scenes and a shorter load, for a look in a few seconds; its figures are rough.
    """
    from perf.demo import demo as run

    run(REPOSITORY, ARTIFACTS, quick=quick)


@task(
    help={
        "host": "address to bind: 127.0.0.1, ::1; 0.0.0.0 and :: open it to the network",
        **{f"{which}_port": f"{which} port (0 = any free one)" for which in ("http", "grpc", "metrics")},
        "ssl_cert": "PEM file with the server's certificate: gRPC is encrypted, HTTP stays on this machine",
        "ssl_key": "PEM file with its key",
        "ssl_clients": "PEM file with the authorities whose client certificates are accepted (default: none is asked)",
        "repository": "serve a repository on S3 instead, and take up what is published there: s3://bucket/prefix",
    }
)
@explained
def serve(
    c: Context,
    host: str = "127.0.0.1",
    http_port: str = "8000",
    grpc_port: str = "8001",
    metrics_port: str = "8002",
    repository: str = "",
    ssl_cert: str = "",
    ssl_key: str = "",
    ssl_clients: str = "",
) -> None:
    """Serve model_repository/ on a real tritonserver until Ctrl-C; starts it again when it dies."""
    from build import exposure, supervise
    from build.publish import s3

    who = exposure.exposure(host, given(ssl_cert), given(ssl_key), given(ssl_clients))
    folder = s3.follow(repository, ARTIFACTS / "s3") if repository else REPOSITORY
    supervise.serve(folder, exposure=who, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)


@task(
    help={
        "triton": "host[:port] of a server's gRPC endpoint (default: the one on port 8001, else a new one)",
        "model": "the model of requests that name none (default: the first by name)",
        "host": "address to bind; 0.0.0.0 opens it to the network",
        "port": "of the page (0 = any free one)",
        "workers": "processes",
    }
)
@explained
def page(
    c: Context, triton: str = "", model: str = "", host: str = "127.0.0.1", port: str = "8080", workers: int = 1
) -> None:
    """A page for people, with a camera, and plain HTTP: a picture in, boxes out; starts a server where none runs."""
    from ssd_client.exceptions import SSDClientError
    from ssd_client.ports import port_of
    from ssd_gateway.cli import TOKEN, run
    from ssd_gateway.settings import Settings

    from build.page import server_at

    try:
        port_of(port, "--port")  # before a server starts
        with server_at(triton, REPOSITORY, artifacts=ARTIFACTS) as (address, started):
            settings = Settings(address, model, shared_memory=started, token=os.environ.get(TOKEN, ""))
            run(settings, host, port, workers)
    except SSDClientError as error:
        raise Exit(f"error: {error}", code=1) from None


@task
@explained
def doctor(c: Context, json: bool = False) -> None:
    """What is on this machine, what is published, and whether they fit; says what to do. Exit status 1 on a problem."""
    from build.doctor import doctor as run

    if run(as_json=json):
        raise Exit(code=1)
