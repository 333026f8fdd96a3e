"""What the subcommands `video` and `batch` share on the command line: which server, which model, how patient."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .transport import TLS


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `client_options` reads."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="the model's name on the server")
    add("--url", default="localhost", metavar="HOST[:PORT]", help="port 8001 (grpc) or 8000 (http) unless given")
    add("--protocol", choices=("grpc", "http"), default="grpc", help="default: grpc")
    add("--score-threshold", type=float, metavar="T", help="keep scores above this, 0..1; default: the model's own")
    add("--iou-threshold", type=float, metavar="T", help="overlap that suppresses, 0..1; default: the model's own")
    add("--shared-memory", action="store_true", help="hand pictures over in shared memory (server on this machine)")
    add("--timeout", type=float, default=30.0, metavar="S", help="seconds for a request with its retries; default: 30")
    add("--retries", type=int, default=3, metavar="N", help="while the server is unavailable; default: 3")
    add("--tls", action="store_true", help="encrypt; the system's authorities are trusted unless --tls-ca")
    add("--tls-ca", type=Path, metavar="PEM", help="authorities to trust (implies --tls)")
    add("--tls-cert", type=Path, metavar="PEM", help="this client's certificate (implies --tls)")
    add("--tls-key", type=Path, metavar="PEM", help="its private key")


def client_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `SSDClient` that say where the server is and how to call it. They can be pickled."""
    tls = None
    if options.tls or options.tls_ca or options.tls_cert or options.tls_key:
        tls = TLS(options.tls_ca, options.tls_cert, options.tls_key)
    return {
        "url": options.url,
        "model": options.model,
        "protocol": options.protocol,
        "shared_memory": "system" if options.shared_memory else None,
        "timeout": options.timeout,
        "retries": options.retries,
        "ssl": tls,
    }
