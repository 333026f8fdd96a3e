"""The command line: `python -m ssd_gateway`, a page and an HTTP service in front of a running Triton server.

Exit status: 0 stopped by a signal, 2 could not start.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssd_client.exceptions import InvalidInputError, SSDClientError
from ssd_client.options import access_options, add_access_options

from .settings import Settings

TOKEN = "SSD_GATEWAY_TOKEN"
_LOCAL = ("localhost", "127.0.0.1", "::1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None = those of the process.

    Returns:
        The exit status.
    """
    options = _parser().parse_args(argv)
    try:
        token = os.environ.get(TOKEN, "")
        if options.token_file is not None:
            token = options.token_file.read_text(encoding="utf-8-sig").strip()
            if not token:
                raise InvalidInputError(f"{options.token_file} is empty", fix="write the token into it")
        access = access_options(options)
        settings = Settings(
            triton=options.triton,
            model=options.model,
            shared_memory=options.shared_memory,
            timeout=options.timeout,
            read_timeout=options.read_timeout,
            max_bytes=options.max_bytes,
            max_pixels=options.max_pixels,
            max_requests=options.max_requests,
            threads=options.threads,
            token=token,
            tls=access["ssl"],
            headers=tuple(access["headers"].items()),
            hosts=tuple(options.allow_host),
        )
        run(settings, options.host, options.port, options.workers)
    except (SSDClientError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(settings: Settings, host: str = "127.0.0.1", port: int | str = 8080, workers: int = 1) -> None:
    """Print the address and answer there until Ctrl-C or SIGTERM.

    Args:
        settings: how the gateway works; without `hosts`, one on loopback may be called by loopback's names only.
        host: the interface.
        port: 0 = a free one.
        workers: processes.

    Raises:
        PortError: the address cannot be had.
        InvalidInputError: a setting or the port is wrong.
        SSDClientError: a package that the gateway needs is missing.
    """
    try:
        from . import server
    except ImportError as error:
        raise SSDClientError(
            f"the gateway needs a package that is not installed: {error.name}", fix="pip install './client[gateway]'"
        ) from None
    if workers < 1:
        raise InvalidInputError(f"workers is {workers}", fix="give at least 1")
    local = is_loopback(host)
    if local and not settings.hosts:
        settings = replace(settings, hosts=(*_LOCAL, *({host} - set(_LOCAL))))
    if not local and not settings.token:
        print(
            f"warning: anybody who reaches {host} may use this gateway\nwhat to do: set {TOKEN} or --token-file",
            file=sys.stderr,
        )
    with server.listening(host, port) as listener:
        name = f"[{host}]" if ":" in host else "localhost" if local else host
        address = f"http://{name}:{listener.getsockname()[1]}"
        print(f"page     {address}/\nservice  {address}/detect   described at {address}/openapi.json", flush=True)
        print(f"model server {settings.triton}; Ctrl-C stops the gateway", flush=True)
        server.serve(settings, listener, workers)
    print("stopped", flush=True)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m ssd_gateway",
        description="A page and a plain HTTP service in front of a Triton server with SSD on Triton's models.",
        epilog=f"A token that callers must bring is read from the variable {TOKEN} or from --token-file.",
    )
    add = parser.add_argument
    add(
        "--triton", default=defaults.triton, metavar="HOST[:PORT]", help="gRPC; default: %(default)s; also https://HOST"
    )
    add("--model", default="", metavar="NAME", help="for requests that name none; default: the first by name")
    add("--host", default="127.0.0.1", help="interface; 0.0.0.0 opens it to the network; default: %(default)s")
    add("--port", default="8080", help="0 = a free one; default: %(default)s")
    add("--allow-host", action="append", default=[], metavar="NAME", help="a name to be called by (repeatable)")
    add("--workers", type=int, default=1, metavar="N", help="processes; default: %(default)s")
    add("--threads", type=int, default=defaults.threads, metavar="N", help="in each worker; default: %(default)s")
    add("--shared-memory", action="store_true", help="hand pictures over in shared memory (Triton on this machine)")
    add("--timeout", type=float, default=defaults.timeout, metavar="S", help="for Triton; default: %(default)s")
    add("--read-timeout", type=float, default=defaults.read_timeout, metavar="S", help="for a request to be here")
    add("--max-bytes", type=int, default=defaults.max_bytes, metavar="N", help="of a body; default: %(default)s")
    add("--max-pixels", type=int, default=defaults.max_pixels, metavar="N", help="default: %(default)s")
    add("--max-requests", type=int, default=defaults.max_requests, metavar="N", help="at once; default: %(default)s")
    add("--token-file", type=Path, metavar="FILE", help="a file that holds the token")
    add_access_options(parser)
    return parser
