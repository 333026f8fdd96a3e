"""Runs the gateway: one process that answers, or several on one address."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image
from ssd_client.exceptions import SSDClientError
from ssd_client.ports import port_of

from .metrics import SHARED
from .settings import Settings

_GRACE = 10.0  # seconds for the requests in hand when the gateway stops
_IDLE = 30.0  # seconds until a connection without a request is closed
_MOST_CONNECTIONS = 512  # of each worker
_LISTEN = 128
_WORKER = "import sys; from ssd_gateway.server import work; work(sys.stdin.read())"


class PortError(SSDClientError):
    """The address cannot be listened on."""


@contextlib.contextmanager
def listening(host: str, port: int | str) -> Iterator[socket.socket]:
    """A listening socket.

    Args:
        host: a name or an address of this machine.
        port: 0 = a free one.

    Raises:
        InvalidInputError: the port is none.
        PortError: the address cannot be had.
    """
    port = port_of(port, "--port")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_LISTEN)
        listener.setblocking(False)
    except OSError as error:
        raise PortError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}",
            why="another program uses the port, or this machine does not have the address",
            fix="choose another one: --port 0 takes a free one",
        ) from None
    with listener:
        yield listener


def serve(settings: Settings, listener: socket.socket, workers: int = 1) -> None:
    """Answer until SIGTERM or SIGINT; then finish what is in hand.

    Args:
        settings: how the gateway works.
        listener: where it listens.
        workers: processes that share the socket.
    """
    if workers == 1:
        asyncio.run(_answer(settings, listener, parent=None))
        return
    folder = tempfile.mkdtemp(prefix="ssd-gateway-")
    try:
        _supervise(settings, listener, workers, Path(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def work(text: str) -> None:
    """One worker of several.

    Args:
        text: JSON of the settings and of the socket's number.
    """
    order = json.loads(text)
    settings = Settings.from_json(order["settings"])
    with socket.socket(fileno=order["socket"]) as listener:
        asyncio.run(_answer(settings, listener, order["parent"]))


def _supervise(settings: Settings, listener: socket.socket, workers: int, folder: Path) -> None:
    """Keep `workers` processes running until a signal; one that ends is started again."""
    from prometheus_client import multiprocess

    order = json.dumps({"settings": settings.to_json(), "socket": listener.fileno(), "parent": os.getpid()})

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,  # not as arguments, which everybody may read: the token is in it
            pass_fds=[listener.fileno()],
            env={
                **os.environ,
                SHARED: str(folder),
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
            },
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then tells them
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(order)
            process.stdin.close()
        return process

    stopped: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: stopped.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    running = [start() for _ in range(workers)]
    try:
        while not stopped:
            time.sleep(0.2)
            for place, process in enumerate(running):
                if process.poll() is not None and not stopped:
                    print(f"worker {process.pid} ended with {process.returncode}; starting another", file=sys.stderr)
                    multiprocess.mark_process_dead(process.pid, str(folder))  # type: ignore[no-untyped-call]
                    time.sleep(0.5)
                    running[place] = start()
    finally:
        listener.close()  # or callers would go on to connect to it while nobody answers there any more
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _GRACE + 5
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


async def _answer(settings: Settings, listener: socket.socket, parent: int | None) -> None:
    """One process: answer until a signal, or until its parent is gone."""
    from .app import Gateway

    Image.MAX_IMAGE_PIXELS = None  # the limit is max_pixels
    # It logs a traceback for every request that is not HTTP. Faults of our own are logged by ssd_gateway.app.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    waiting: set[Any] = set()  # connections that have not sent a whole header yet
    runner = web.AppRunner(
        Gateway(settings, waiting.discard).app(),
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=_IDLE,
        lingering_time=settings.read_timeout,
        shutdown_timeout=_GRACE,
    )
    await runner.setup()
    assert runner.server is not None
    server = await loop.create_server(_guarded(runner.server, waiting, settings.read_timeout), sock=listener)
    try:
        while not stop.is_set() and parent in (None, os.getppid()):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), 1.0)
    finally:
        server.close()
        await runner.cleanup()


def _guarded(server: web.Server, waiting: set[Any], seconds: float) -> Callable[[], asyncio.Protocol]:
    """Makes connections, and closes those that send no header in time, or are too many."""

    def close(connection: Any) -> None:
        if connection in waiting:
            waiting.discard(connection)
            connection.force_close()

    def connect() -> asyncio.Protocol:
        connection = server()
        loop = asyncio.get_running_loop()
        waiting.add(connection)
        if len(server.connections) >= _MOST_CONNECTIONS:
            loop.call_soon(lambda: loop.call_soon(close, connection))  # after connection_made
        else:
            loop.call_later(seconds, close, connection)
        return connection

    return connect
