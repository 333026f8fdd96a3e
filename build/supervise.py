"""`invoke serve`: a tritonserver that is watched, started again when it dies, and whose log stays small."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from build import tritonserver
from build.errors import ServeError
from build.exposure import TOKEN_FILE, TOKEN_HEADER, Exposure
from build.files import ARTIFACTS, REPOSITORY, relative
from build.serve import NOT_LOADED, TritonServer

if TYPE_CHECKING:
    from rich.console import Console

LOG = ARTIFACTS / "logs" / "tritonserver.log"
LOG_LIMIT = 16 << 20  # bytes; one older log of this size is kept beside it
CANARY_SECONDS = 10.0
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
STOP_PATIENCE = 3.0  # seconds for one that failed to end in good order
STEADY = 60.0  # seconds after which a server that dies is started again without waiting longer than the first time
FAILED_CANARIES = 2  # one after the other; then the server is started again

_LINES_A_SECOND = 20
_READ = 1 << 20
_ON_ITS_WAY = ("LOADING", "UNLOADING")
_TO_LOAD = 3.0  # seconds after a look at the repository, until a model that is there is LOADING
_BUSY = ("maximum queue size", "Request timeout expired", "timed out")


def serve(
    repository: Path | str = REPOSITORY,
    *,
    exposure: Exposure = Exposure(),  # noqa: B008
    http_port: int | str = 8000,
    grpc_port: int | str = 8001,
    metrics_port: int | str = 8002,
    poll_seconds: int = 2,
    log: Path = LOG,
    log_limit: int = LOG_LIMIT,
    canary_seconds: float = CANARY_SECONDS,
) -> None:
    """Serves until Ctrl-C or SIGTERM.

    Shows endpoints, what the server warns of, and which versions it takes up. Sends every model a blank image now and
    then. A server that died, lost an instance or does not answer is started again, after a wait that doubles each time.

    Args:
        repository: the folder with the published models.
        exposure: who may reach it.
        http_port, grpc_port, metrics_port: 0 = a free one.
        poll_seconds: look this often for newly published versions.
        log: the server's log.
        log_limit: bytes; a longer log becomes `<log>.1`.
        canary_seconds: between two blank images.

    Raises:
        ServeError: the server does not come up the first time.
    """
    from rich.console import Console

    console = Console(soft_wrap=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    server = TritonServer(
        repository,
        exposure=exposure,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        poll_seconds=poll_seconds,
        log=log,
    )
    try:
        with _signals(), server:
            _introduce(server, console, poll_seconds, log)
            wait = FIRST_WAIT
            while True:
                started = time.monotonic()
                watch = Watch(server, console, log, log_limit, canary_seconds)
                try:
                    watch.until_it_fails()
                except ServeError as error:
                    _say(console, str(error))
                finally:
                    watch.close()
                wait = FIRST_WAIT if time.monotonic() - started > STEADY else wait
                wait = _start_again(server, console, wait)
    except KeyboardInterrupt:
        _say(console, "stopped")


class Watch:
    """Looks at one life of a server.

    Args:
        server: it runs.
        console: where findings are shown.
        log: the server's log.
        log_limit: bytes.
        canary_seconds: between two blank images.
    """

    def __init__(
        self, server: TritonServer, console: Console, log: Path, log_limit: int, canary_seconds: float
    ) -> None:
        self._server, self._console = server, console
        self._log, self._log_limit = log, log_limit
        self._log_at = log.stat().st_size
        self._canary_seconds = canary_seconds
        self._pool = ThreadPoolExecutor(1, "canary")
        self._canary: Future[None] | None = None
        self._next_canary = time.monotonic() + canary_seconds
        self._failed = 0
        self._answered = -1
        self._versions = dict(server.models)
        self._refused: dict[str, str] = {}
        self._unseen: dict[str, float] = {}  # since when the server has not looked at a new model

    def until_it_fails(self) -> None:
        """Looks every second.

        Raises:
            ServeError: the server has to be started again; says why.
        """
        while True:
            time.sleep(1)
            self._show_log()
            rotate(self._log, self._log_limit)
            self._server.check_alive()
            self._look_at_versions()
            self._look_at_canary()

    def close(self) -> None:
        """Waits for nothing: a canary that is on its way ends with its server."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _look_at_versions(self) -> None:
        try:
            served = self._server.served()
        except (OSError, ValueError):
            return  # a server that does not answer fails its canary
        for name, (state, version) in served.items():
            before = self._versions.get(name)
            if state == "READY":
                if version != before:
                    was = f"; before it was version {before}" if before else ""
                    _say(self._console, f"{name}: version {version} is served now{was}")
                    self._versions[name] = version
                self._refused.pop(name, None)
                self._unseen.pop(name, None)
            elif state == NOT_LOADED and self._is_new(name):
                continue
            elif state not in _ON_ITS_WAY and state != self._refused.get(name):
                self._refused[name] = state
                _say(self._console, f"{name}: version {version or '?'} is not served: {state}")
        for name in [name for name in self._versions if served.get(name, ("", ""))[0] not in ("READY", *_ON_ITS_WAY)]:
            del self._versions[name]
            _say(self._console, f"{name}: is not served any more")
        self._server.models = dict(self._versions)  # what the next canary asks

    def _is_new(self, name: str) -> bool:
        """Whether the server may not have looked at a model yet."""
        now = time.monotonic()
        return now - self._unseen.setdefault(name, now) < self._server.poll_seconds + _TO_LOAD

    def _look_at_canary(self) -> None:
        if self._canary is None:
            if time.monotonic() >= self._next_canary:
                self._canary = self._pool.submit(self._server.check)
            return
        if not self._canary.done():
            return
        error, self._canary = self._canary.exception(), None
        self._next_canary = time.monotonic() + self._canary_seconds
        if error is None:
            self._failed = 0
            return
        if not isinstance(error, ServeError):
            raise error
        if self._is_busy(str(error)):
            _say(self._console, "the server is overloaded: it answers others, but not the blank image that checks it")
            return
        self._failed += 1
        if self._failed >= FAILED_CANARIES:
            raise error
        _say(self._console, f"{error}\nasked again in {self._canary_seconds:g} s")

    def _is_busy(self, error: str) -> bool:
        """Whether a canary failed because others are served before it."""
        if not any(sign in error for sign in _BUSY):
            return False
        try:
            answered = sum(self._server.requests(name) for name in self._server.models)
        except (OSError, ValueError, KeyError):
            return False
        before, self._answered = self._answered, answered
        return answered != before

    def _show_log(self) -> None:
        size = self._log.stat().st_size
        with self._log.open("rb") as file:
            file.seek(self._log_at if self._log_at <= size else 0)
            data = file.read(_READ)
            whole = data[: data.rfind(b"\n") + 1] if len(data) < _READ else data
            self._log_at = file.tell() - len(data) + len(whole)
        lines = tritonserver.worth_reading(whole.decode(errors="replace").splitlines())
        lines = [line for line in lines if line[:1] in "EW"]
        for line in lines[:_LINES_A_SECOND]:
            _say(self._console, line)
        skipped = len(lines) - _LINES_A_SECOND
        if skipped > 0 or len(data) == _READ:
            self._log_at = max(self._log_at, size)
            more = f"{skipped} more lines" if skipped > 0 and len(data) < _READ else "many more lines"
            _say(self._console, f"... and {more} in {relative(self._log)}")


def rotate(log: Path, limit: int) -> None:
    """Makes a log that is longer than `limit` bytes the older one, `<log>.1`, and begins it anew.

    The server keeps its file open for appending, so the file is copied and cut, not renamed. Lines of the moment
    between may be lost.
    """
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > limit:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)


def _start_again(server: TritonServer, console: Console, wait: float) -> float:
    """Stops what is left of a server and starts it, again and again until it is up.

    Returns:
        The seconds to wait before the next time.
    """
    server.stop(timeout=STOP_PATIENCE)
    while True:
        _say(console, f"the server is started again in {wait:g} s")
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)
        try:
            server.start()
        except ServeError as error:
            _say(console, str(error))
        else:
            versions = ", ".join(f"{name} version {version}" for name, version in server.models.items())
            _say(console, f"the server is up again: {versions}")
            return wait


def _introduce(server: TritonServer, console: Console, poll_seconds: int, log: Path) -> None:
    from rich.table import Table

    exposure = server.exposure
    table = Table(title=f"Triton {server.version}", title_justify="left", show_header=False)
    for name, version in server.models.items():
        table.add_row("model", f"{name}, version {version}")
    table.add_row("HTTP", f"http://{server.http_url}")
    table.add_row("gRPC", f"{server.grpc_url}{' (TLS)' if exposure.tls else ''}")
    table.add_row("metrics", server.metrics_url)
    table.add_row("log", str(log))
    console.print(table)
    for line in exposure.warnings():
        console.print(line, style="bold yellow" if line.startswith("WARNING") else None, markup=False, highlight=False)
    if exposure.token:
        _say(
            console,
            f"shared memory, model control, trace and logging need the header {TOKEN_HEADER} (gRPC: "
            f"triton-grpc-protocol-{TOKEN_HEADER}) with the token in {relative(TOKEN_FILE)}",
        )
    _say(
        console,
        f"It looks every {poll_seconds} s for what is published to {relative(server.repository)} "
        "(./invoke build-engines, also --rollback) and takes it up without losing a request.",
    )
    _say(console, "Ctrl-C stops it.")


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does; and Ctrl-C, too: a shell hands it down ignored to background jobs."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)
