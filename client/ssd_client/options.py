"""The options of the command lines that say which server, how to get in and how patient to be. All of them are here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .exceptions import InvalidInputError
from .transport import TLS


def add_access_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `access_options` reads."""
    add = parser.add_argument
    add("--header", action="append", default=[], metavar="'NAME: VALUE'", help="send this to Triton with every request")
    add("--tls", action="store_true", help="encrypt; the system's authorities are trusted unless --tls-ca")
    add("--tls-ca", type=Path, metavar="PEM", help="authorities to trust (implies --tls)")
    add("--tls-cert", type=Path, metavar="PEM", help="this client's certificate (implies --tls)")
    add("--tls-key", type=Path, metavar="PEM", help="its private key")


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `client_options` reads, and the thresholds."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="the model's name on the server")
    add(
        "--url",
        default="localhost",
        metavar="HOST[:PORT]",
        help="default: localhost, port 8001 (grpc) or 8000 (http); also https://HOST/PREFIX, dns:///NAME:PORT, and "
        "several with commas between them (grpc)",
    )
    add("--protocol", choices=("grpc", "http"), help="default: grpc, and http for URLs that begin with http")
    add("--score-threshold", type=float, metavar="T", help="keep scores above this, 0..1; default: the model's own")
    add("--iou-threshold", type=float, metavar="T", help="overlap that suppresses, 0..1; default: the model's own")
    add("--shared-memory", action="store_true", help="hand pictures over in shared memory (server on this machine)")
    add("--timeout", type=float, default=30.0, metavar="S", help="seconds for a request with its retries; default: 30")
    add("--try-timeout", type=float, metavar="S", help="seconds for one try; default: --timeout, or a part of it")
    add("--retries", type=int, default=3, metavar="N", help="while the server is unavailable; default: 3")
    add_access_options(parser)


def access_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments `ssl` and `headers` of `SSDClient`.

    Raises:
        InvalidInputError: a header has no colon.
    """
    tls = None
    if options.tls or options.tls_ca or options.tls_cert or options.tls_key:
        tls = TLS(options.tls_ca, options.tls_cert, options.tls_key)
    return {"ssl": tls, "headers": dict(_header(text) for text in options.header)}


def client_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `SSDClient` that say where the server is and how to call it. They can be pickled.

    Raises:
        InvalidInputError: a header has no colon.
    """
    return {
        "url": options.url,
        "model": options.model,
        "protocol": options.protocol,
        "shared_memory": "system" if options.shared_memory else None,
        "timeout": options.timeout,
        "try_timeout": options.try_timeout,
        "retries": options.retries,
        **access_options(options),
    }


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon:
        raise InvalidInputError(f"--header {name[:20]!r} has no colon", fix="give --header 'NAME: VALUE'")
    return name.strip(), value.strip()
