"""Runs a real tritonserver on the published models: a context manager for `invoke serve`, tests, demo and load.

    with TritonServer(Path("model_repository")) as server:
        ...  # server.http_url, server.grpc_url, server.version

build/tritonserver.py finds the program and explains its log; build/supervise.py keeps one running.
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
from build.contract import OUTPUTS
from build.errors import ServeError
from build.exposure import Exposure, ports_of
from build.publish import backend, picture
from build.publish import repository as store
from build.tritonserver import SHM_PREFIX, Installation

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tritonclient.grpc.model_config_pb2 import ModelConfig

NOT_LOADED = "not loaded"  # the state of a model of which the server says nothing
CANARY_TIMEOUT = 30  # seconds for the answer to a blank image

# The child asks the kernel to end it when its parent goes, then becomes tritonserver. A tiny program between the two
# does this without running code in a forked copy of a process that has threads. LD_PRELOAD is for tritonserver alone.
_LAUNCHER = """
import ctypes, os, resource, signal, sys
parent, preload, *command = sys.argv[1:]
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(parent):
    sys.exit("the parent is gone")
if preload:
    os.environ["LD_PRELOAD"] = preload
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each connection takes a descriptor
os.execv(command[0], command)
"""


class TritonServer:
    """A tritonserver on `repository`, started by `with` or `start()` and gone after it.

    The server ends with this process, however that ends, and with the thread that started it.

    Args:
        repository: the folder with the published models.
        backends: the folder of this project's backends; the server's own are added.
        exposure: who may reach it; this machine only unless told otherwise.
        http_port, grpc_port, metrics_port: 0 = a free one.
        poll_seconds: look this often for newly published versions and take them up; 0 = never.
        startup_timeout: seconds until a server that is not ready counts as failed.
        log: where the server's log goes; None = a temporary file that goes with the server.
        extra_args: more arguments for tritonserver.

    Raises:
        ServeError: a port is no port, or given twice.
    """

    def __init__(
        self,
        repository: Path | str,
        *,
        backends: Path = backend.BACKENDS,
        exposure: Exposure = Exposure(),  # noqa: B008
        http_port: int | str = 0,
        grpc_port: int | str = 0,
        metrics_port: int | str = 0,
        poll_seconds: int = 0,
        startup_timeout: float = 120.0,
        log: Path | None = None,
        extra_args: Sequence[str] = (),
    ) -> None:
        self.repository = Path(repository).resolve()
        self.backends = backends
        self.exposure = exposure
        self.startup_timeout = startup_timeout
        self.version = ""
        self.models: dict[str, str] = {}
        self._ports = ports_of({"http": http_port, "grpc": grpc_port, "metrics": metrics_port})
        self.poll_seconds = poll_seconds
        self._extra_args = list(extra_args)
        self._log = log
        self._log_begin = 0  # where in the log this start begins
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
        with contextlib.suppress(OSError), self.log_path.open(errors="replace") as log:
            log.seek(self._log_begin if self._log_begin <= self.log_path.stat().st_size else 0)
            return tritonserver.worth_reading(log.read().splitlines())
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
        self._check_models()
        configs = _published(self.repository)
        self._check_backend(configs)
        self._check_ports()
        installation = tritonserver.find()
        environment = tritonserver.environment()
        uses_tensorrt = any(config.platform == "tensorrt_plan" or config.backend == "tensorrt" for config in configs)
        options = tritonserver.usage(installation.binary, environment)
        if any(config.backend == "python" for config in configs):
            tritonserver.usage(installation.stub, environment)
        self._folder = tempfile.TemporaryDirectory(prefix="ssd-triton-")
        try:
            # Where no model needs ours, a server of its own keeps the backend folder that it was built with.
            ours = any(config.backend == backend.NATIVE for config in configs)
            command = self._command(installation, options, Path(self._folder.name), ours)
            preload = tritonserver.preload(Path(self._folder.name)) if uses_tensorrt else ""
            launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), preload]
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            with self.log_path.open("ab") as log:  # appending, so that it can be cut while it is written
                self._log_begin = log.tell()
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
            states = self.served()
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
        return self.exposure.reached_at(which, self._ports[which])

    def _check_models(self) -> None:
        """Holds what is published against its manifests."""
        for folder in sorted(path for path in self.repository.glob("*") if path.is_dir()):
            fault = store.fault(folder)
            if fault:
                fix = f"./invoke build-engines --model {picture.owner(folder) or folder.name} --force"
                raise ServeError(f"model {folder.name} is damaged: {fault}", fix=fix)

    def _check_backend(self, configs: Sequence[ModelConfig]) -> None:
        """Holds this project's backend against its manifest, where a model needs it."""
        needed = [config for config in configs if config.backend == backend.NATIVE]
        for config in list(needed):  # older builds published libraries beside model.onnx, where Triton looks first
            versions = config.version_policy.specific.versions
            if versions and store.carries_libraries(self.repository / config.name / str(versions[0])):
                needed.remove(config)
        if needed:
            fault = backend.damage(self.backends)
            if fault:
                raise ServeError(f"the backend {backend.NATIVE} cannot be used: {fault}", fix=backend.AGAIN)

    def _statistics(self, model: str) -> list[dict[str, Any]]:
        statistics: list[dict[str, Any]] = json.loads(self._http(f"v2/models/{model}/stats"))["model_stats"]
        return statistics

    def _check_ports(self) -> None:
        """Fills in free ports for those that are 0 and makes sure that the others are free."""
        with contextlib.ExitStack() as held:  # all at once, so that no two get the same free port
            for which, port in self._ports.items():
                host = self.exposure.address(which)
                probe = held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, port))
                except OSError as error:
                    raise ServeError(
                        f"port {port} for {which} on {host} cannot be used: {error.strerror or error}",
                        why=holder(port),
                        fix=f"stop that program, or choose another port: --{which}-port N (0 takes a free one)",
                    ) from None
                self._ports[which] = probe.getsockname()[1]

    def _command(self, installation: Installation, options: str, folder: Path, uses_ours: bool) -> list[str]:
        command = [
            str(installation.binary),
            f"--model-repository={self.repository}",
            "--disable-auto-complete-config",  # config.pbtxt is complete; asking each model costs seconds
            # One model that does not load would otherwise end the server before it could be asked for the reason.
            "--exit-on-error=false",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
        ]
        command += self.exposure.arguments(self._ports)
        if self.poll_seconds:
            command += ["--model-control-mode=poll", f"--repository-poll-secs={self.poll_seconds}"]
        if "--allow-client-shm" in options:  # from 2.68 on off by default; older servers refuse the flag
            command.append("--allow-client-shm=true")
        if installation.from_wheel or uses_ours:
            command.append(f"--backend-directory={installation.overlay(folder, self.backends)}")
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
        states = self.served()
        missing = {name: states.get(name, (NOT_LOADED, ""))[0] for name in names if not _ready(states, name)}
        if missing:
            raise self._failure("\n".join(f"model {name} did not load: {reason}" for name, reason in missing.items()))
        self.models = {name: states[name][1] for name in names}

    def served(self) -> dict[str, tuple[str, str]]:
        """Model → (READY or why not, version) of what the server has now, the served version where there is one.

        Raises:
            OSError: it does not answer.
        """
        states: dict[str, tuple[str, str]] = {}
        for entry in json.loads(self._http("v2/repository/index", b"")):
            state, name = entry.get("state", ""), entry["name"]
            if _ready(states, name):
                continue
            reason = tritonserver.first_part(entry.get("reason", ""))
            states[name] = (state if state == "READY" else reason or state or NOT_LOADED, entry.get("version", ""))
        return states

    def _http(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(
            f"http://{self.http_url}/{path}", data=body, headers=dict(self.exposure.headers)
        )
        # Never through a proxy that the environment names: the server is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=min(10, CANARY_TIMEOUT)) as answer:
            content: bytes = answer.read()
        return content

    def _infer_blank(self, model: str) -> None:
        import numpy as np
        from tritonclient import http, utils

        try:
            with contextlib.closing(
                http.InferenceServerClient(self.http_url, network_timeout=CANARY_TIMEOUT)
            ) as client:
                config = client.get_model_config(model)
                is_part = picture.MARK in config.get("parameters", {})
                if is_part and "ensemble_scheduling" not in config:
                    return  # the ensemble asks it
                kinds = {entry["name"]: entry["data_type"].removeprefix("TYPE_") for entry in config["input"]}
                blanks = {
                    entry["name"]: np.frombuffer(picture.BLANK, np.uint8)[None]
                    if is_part
                    else np.zeros([1, *map(int, entry["dims"])], utils.triton_to_np_dtype(kinds[entry["name"]]))
                    for entry in config["input"]
                }
                inputs = http_inputs(blanks, kinds)
                # Not num_detections: the backend's metric of detections counts the images of requests that ask for it.
                names = [entry["name"] for entry in config["output"] if entry["name"] != OUTPUTS[0]]
                answer = client.infer(model, inputs, outputs=[http.InferRequestedOutput(name) for name in names])
                for name in names:
                    answer.as_numpy(name)  # ValueError: fewer bytes than its shape needs
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


def http_inputs(arrays: Mapping[str, NDArray[Any]], kinds: Mapping[str, str]) -> list[Any]:
    """Arrays by input name as what tritonclient sends over HTTP; `kinds` has Triton's name of each one's type."""
    from tritonclient import http

    return [
        http.InferInput(name, list(array.shape), kinds[name]).set_data_from_numpy(array)
        for name, array in arrays.items()
    ]


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
