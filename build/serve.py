"""Runs a real tritonserver on the published models: `invoke serve`, and a context manager for tests, demo and load.

    with TritonServer(Path("model_repository")) as server:
        ...  # server.http_url, server.grpc_url, server.version

build/tritonserver.py finds the program and explains its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from build import tritonserver
from build.errors import ServeError
from build.files import ARTIFACTS, REPOSITORY
from build.tritonserver import SHM_PREFIX, Installation

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

LOG = ARTIFACTS / "logs" / "tritonserver.log"

# The child asks the kernel to end it when its parent goes, then becomes tritonserver. A tiny program between the two
# does this without running code in a forked copy of a process that has threads. LD_PRELOAD is for tritonserver alone.
_LAUNCHER = """
import ctypes, os, signal, sys
parent, preload, *command = sys.argv[1:]
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(parent):
    sys.exit("the parent is gone")
if preload:
    os.environ["LD_PRELOAD"] = preload
os.execv(command[0], command)
"""


class TritonServer:
    """A tritonserver on `repository`, started by `with` or `start()` and gone after it.

    The server ends with this process, however that ends, and with the thread that started it.

    Args:
        repository: the folder with the published models.
        host: the interface for HTTP, gRPC and metrics; this machine only unless told otherwise.
        http_port, grpc_port, metrics_port: 0 = a free one.
        poll_seconds: look this often for newly published versions and take them up; 0 = never.
        startup_timeout: seconds until a server that is not ready counts as failed.
        log: where the server's log goes; None = a temporary file that goes with the server.
        extra_args: more arguments for tritonserver.
    """

    def __init__(
        self,
        repository: Path | str,
        *,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        poll_seconds: int = 0,
        startup_timeout: float = 120.0,
        log: Path | None = None,
        extra_args: Sequence[str] = (),
    ) -> None:
        self.repository = Path(repository).resolve()
        self.host = host
        self.startup_timeout = startup_timeout
        self.version = ""
        self.models: dict[str, str] = {}
        self._ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self._poll_seconds = poll_seconds
        self._extra_args = list(extra_args)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._shm_prefix = f"{SHM_PREFIX}-{uuid.uuid4().hex[:12]}-"

    # -- what others need to know --------------------------------------------------------------------------------------

    @property
    def http_url(self) -> str:
        """`host:port` of the HTTP endpoint, as tritonclient takes it."""
        return self._url("http")

    @property
    def grpc_url(self) -> str:
        """`host:port` of the gRPC endpoint."""
        return self._url("grpc")

    @property
    def metrics_url(self) -> str:
        """The Prometheus metrics page."""
        return f"http://{self._url('metrics')}/metrics"

    @property
    def pid(self) -> int:
        """Process number of tritonserver.

        Raises:
            ServeError: it does not run.
        """
        if self._process is None:
            raise ServeError("tritonserver is not running", fix="use it inside `with TritonServer(...)`")
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """The server's log."""
        if self._log is not None:
            return self._log
        if self._folder is None:
            raise ServeError("tritonserver was not started, so there is no log")
        return Path(self._folder.name) / "tritonserver.log"

    def log_lines(self) -> list[str]:
        """The log, as far as it is worth reading."""
        with contextlib.suppress(OSError):
            return tritonserver.worth_reading(self.log_path.read_text(errors="replace").splitlines())
        return []

    def model_config(self, model: str) -> dict[str, Any]:
        """The model's configuration as the server completed it."""
        config: dict[str, Any] = json.loads(self._http(f"v2/models/{model}/config"))
        return config

    def requests(self, model: str) -> int:
        """How many requests the served version of `model` has answered without an error."""
        return sum(int(entry["inference_stats"]["success"]["count"]) for entry in self._statistics(model))

    def images(self, model: str) -> int:
        """How many images those requests held."""
        return sum(int(entry["inference_count"]) for entry in self._statistics(model))

    # -- start and stop ------------------------------------------------------------------------------------------------

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server and waits until every published model is ready.

        Raises:
            ServeError: it cannot start or does not get ready; the error gives the reason, and nothing is left running.
        """
        configs = _published(self.repository)
        self._check_ports()
        installation = tritonserver.find()
        environment = tritonserver.environment()
        uses_tensorrt = any(config.platform == "tensorrt_plan" or config.backend == "tensorrt" for config in configs)
        options = tritonserver.usage(installation.binary, environment)
        if any(config.backend == "python" for config in configs):
            tritonserver.usage(installation.stub, environment)
        self._folder = tempfile.TemporaryDirectory(prefix="ssd-triton-")
        try:
            command = self._command(installation, options, Path(self._folder.name))
            preload = tritonserver.preload(Path(self._folder.name)) if uses_tensorrt else ""
            launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), preload]
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    [*launcher, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            self._wait_ready([config.name for config in configs])
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = 20.0) -> None:
        """Ends the server and everything it started; kills it if it is not gone after `timeout` seconds."""
        process, self._process = self._process, None
        try:
            if process is not None:
                self._end(process, timeout)
        finally:
            for region in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
                region.unlink(missing_ok=True)
            if self._folder is not None:
                self._folder.cleanup()
                self._folder = None

    def check(self) -> None:
        """Makes sure that the server really answers: process, instances, readiness, one real inference per model.

        Triton's own health endpoints stay green when an instance of a model has died and every request it gets fails.

        Raises:
            ServeError: naming what is wrong.
        """
        self.check_alive()
        try:
            states = self._index()
        except OSError as error:
            # A process that was killed refuses connections a moment before it has ended.
            if self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)
            self.check_alive()
            raise ServeError(f"tritonserver runs, but does not answer: {error}", fix="see the server's log") from error
        bad = [f"{name}: {state}" for name, (state, _) in states.items() if name in self.models and state != "READY"]
        if bad:
            raise ServeError(f"not every model is ready: {'; '.join(bad)}", fix="see the server's log")
        for name in self.models:
            self._infer_blank(name)

    def check_alive(self) -> None:
        """The part of `check` that sends nothing: the process and every instance's process are there.

        Raises:
            ServeError: naming what died.
        """
        process = self._process
        if process is None or process.poll() is not None:
            code = "it was not started" if process is None else f"exit code {process.returncode}"
            raise ServeError(f"tritonserver is gone ({code})\n{self._tail()}", fix="start it again")
        dead = self._dead_stubs()
        if dead and self._process is not None:
            time.sleep(1.5)  # an instance that is being unloaded in good order is gone by then
            dead &= self._dead_stubs()
        if dead:
            raise ServeError(
                f"{len(dead)} instance(s) of a model died (process {', '.join(map(str, sorted(dead)))}); requests that "
                "reach them fail, and tritonserver does not start them again",
                why="the process was killed, most often for want of memory, or crashed in native code",
                fix="restart the server; if it happens again, publish with fewer instances or a smaller maximum batch",
            )

    # -- inside --------------------------------------------------------------------------------------------------------

    def _url(self, which: str) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{self._ports[which]}" if ":" in host else f"{host}:{self._ports[which]}"

    def _statistics(self, model: str) -> list[dict[str, Any]]:
        statistics: list[dict[str, Any]] = json.loads(self._http(f"v2/models/{model}/stats"))["model_stats"]
        return statistics

    def _check_ports(self) -> None:
        """Fills in free ports for those that are 0 and makes sure that the others are free."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with contextlib.ExitStack() as held:  # all at once, so that no two get the same free port
            for which, port in self._ports.items():
                probe = held.enter_context(socket.socket(family))
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.host, port))
                except OSError as error:
                    raise ServeError(
                        f"port {port} for {which} on {self.host} cannot be used: {os.strerror(error.errno or 0)}",
                        why=holder(port),
                        fix=f"stop that program, or choose another port: --{which}-port N (0 takes a free one)",
                    ) from None
                self._ports[which] = probe.getsockname()[1]

    def _command(self, installation: Installation, options: str, folder: Path) -> list[str]:
        command = [
            str(installation.binary),
            f"--model-repository={self.repository}",
            "--disable-auto-complete-config",  # config.pbtxt is complete; asking each model costs seconds
            # One model that does not load would otherwise end the server before it could be asked for the reason.
            "--exit-on-error=false",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
        ]
        for which, port in self._ports.items():
            command += [f"--{which}-address={self.host}", f"--{which}-port={port}"]
        if self._poll_seconds:
            command += ["--model-control-mode=poll", f"--repository-poll-secs={self._poll_seconds}"]
        if "--allow-client-shm" in options:  # from 2.68 on off by default; older servers refuse the flag
            command.append("--allow-client-shm=true")
        if installation.from_wheel:
            command.append(f"--backend-directory={installation.overlay(folder)}")
        return command + self._extra_args

    def _wait_ready(self, names: Sequence[str]) -> None:
        process = self._process
        assert process is not None
        deadline = time.monotonic() + self.startup_timeout
        while True:
            if process.poll() is not None:
                raise self._failure(f"tritonserver ended with code {process.returncode} before it was ready")
            with contextlib.suppress(OSError, ValueError):
                self.version = json.loads(self._http("v2"))["version"]
                break
            # A stub that cannot load a library leaves the server waiting for it forever.
            if any("error while loading shared libraries" in line for line in self.log_lines()):
                raise self._failure("tritonserver waits for a model's process that could not start")
            if time.monotonic() > deadline:
                raise self._failure(
                    f"tritonserver was not ready after {self.startup_timeout:g} s",
                    why="a model takes that long to load, or the machine is busy",
                    fix="free the machine, or give it a longer startup_timeout",
                )
            time.sleep(0.02)
        states = self._index()
        missing = {name: states.get(name, ("not loaded", ""))[0] for name in names if not _ready(states, name)}
        if missing:
            raise self._failure("\n".join(f"model {name} did not load: {reason}" for name, reason in missing.items()))
        self.models = {name: states[name][1] for name in names}

    def _index(self) -> dict[str, tuple[str, str]]:
        """Model → (READY or why not, version), the served version where there is one."""
        states: dict[str, tuple[str, str]] = {}
        for entry in json.loads(self._http("v2/repository/index", b"")):
            state, name = entry.get("state", ""), entry["name"]
            if _ready(states, name):
                continue
            reason = tritonserver.first_part(entry.get("reason", ""))
            states[name] = (state if state == "READY" else reason or state or "not loaded", entry.get("version", ""))
        return states

    def _http(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(f"http://{self.http_url}/{path}", data=body)
        # Never through a proxy that the environment names: the server is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as answer:
            content: bytes = answer.read()
        return content

    def _infer_blank(self, model: str) -> None:
        import numpy as np
        from tritonclient import http, utils

        try:
            with contextlib.closing(http.InferenceServerClient(self.http_url, network_timeout=60)) as client:
                config, inputs = client.get_model_config(model), []
                if any(-1 in map(int, entry["dims"]) for entry in config["input"]):
                    return  # takes a picture's file, and a blank is none (build/publish/picture.py)
                for entry in config["input"]:
                    kind = entry["data_type"].removeprefix("TYPE_")
                    blank = np.zeros([1, *map(int, entry["dims"])], utils.triton_to_np_dtype(kind))
                    inputs.append(http.InferInput(entry["name"], list(blank.shape), kind).set_data_from_numpy(blank))
                answer = client.infer(model, inputs)
                for entry in config["output"]:
                    answer.as_numpy(entry["name"])  # ValueError: fewer bytes than its shape needs
        except (utils.InferenceServerException, OSError, ValueError) as error:
            raise ServeError(f"model {model} does not answer: {error}", fix="see the server's log") from error

    def _dead_stubs(self) -> set[int]:
        """Children that ended and that the server, which does not know it, has not collected."""
        import psutil

        dead = set()
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.status() == psutil.STATUS_ZOMBIE:
                        dead.add(child.pid)
        return dead

    def _end(self, process: subprocess.Popen[bytes], timeout: float) -> None:
        try:
            process.terminate()
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also on a second Ctrl-C: stubs share the server's process group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _tail(self, lines: int = 10) -> str:
        """The last lines of the log; what it warns of, where it warns."""
        log = self.log_lines()
        log = [line for line in log if not line.startswith("I")] or log
        return "\n".join(["the log ends with:", *(f"  {tritonserver.first_part(line)}" for line in log[-lines:])])

    def _failure(
        self, what: str, *, why: str = "", fix: str = "publish the model again: ./invoke build-engines --force"
    ) -> ServeError:
        """An error with the end of the log, and with the cause where the log gives it away."""
        why, fix = tritonserver.cause("\n".join([what, *self.log_lines()])) or (why, fix)
        return ServeError(f"{what}\n{self._tail()}", why=why, fix=fix)


def serve(
    repository: Path | str = REPOSITORY,
    *,
    host: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    poll_seconds: int = 2,
    log: Path = LOG,
) -> None:
    """Serves until Ctrl-C or SIGTERM; shows the endpoints and what the server warns of, takes up what is published.

    Raises:
        ServeError: the server does not come up, goes away, or an instance of a model dies.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    # SIGINT as well: a shell hands it down ignored to what it starts in the background.
    previous = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    server = TritonServer(
        repository,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        poll_seconds=poll_seconds,
        log=log,
    )
    try:
        with server:
            table = Table(title=f"Triton {server.version}", title_justify="left", show_header=False)
            for name, version in server.models.items():
                table.add_row("model", f"{name}, version {version}")
            table.add_row("HTTP", f"http://{server.http_url}")
            table.add_row("gRPC", server.grpc_url)
            table.add_row("metrics", server.metrics_url)
            table.add_row("log", str(log))
            console.print(table)
            console.print("Ctrl-C stops it.")
            with log.open(errors="replace") as written:
                written.seek(0, os.SEEK_END)
                rest = ""
                while True:
                    time.sleep(1)
                    server.check_alive()
                    *lines, rest = (rest + written.read()).split("\n")
                    for line in tritonserver.worth_reading(lines):
                        if line[:1] in "EW":
                            console.print(line, markup=False, highlight=False)
    except KeyboardInterrupt:
        console.print("stopped")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _published(repository: Path) -> list[ModelConfig]:
    """The config of every model folder that has one; a folder without is a publish that never came to its end."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    configs = []
    for path in sorted(repository.glob("*/config.pbtxt")):
        config = ModelConfig()
        try:
            text_format.Parse(path.read_text(), config, allow_unknown_field=True)
        except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
            raise ServeError(
                f"{path} cannot be read: {error}", fix="publish the model again: ./invoke build-engines --force"
            ) from error
        config.name = config.name or path.parent.name
        configs.append(config)
    if not configs:
        raise ServeError(f"no model is published in {repository}", fix="publish one: ./invoke build-engines")
    return configs


def holder(port: int) -> str:
    """Who listens on `port`, as far as this user may know."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                name = psutil.Process(connection.pid).name() if connection.pid else "another user's program"
                return f"{name} (process {connection.pid or 'unknown'}) listens there"
    return ""


def _ready(states: Mapping[str, tuple[Any, ...]], name: str) -> bool:
    return name in states and states[name][0] == "READY"
