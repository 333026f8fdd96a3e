"""A real tritonserver with the fake detector of `fake_model.py`, for all in the client that talks to a server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from numpy.typing import NDArray
from ssd_client import AsyncSSDClient, SSDClient
from tritonclient.grpc import model_config_pb2

from build.pipeline import build_engines
from build.serve import TritonServer
from tests.optional import optional

WIDTH, HEIGHT = 64, 48
PARAMETERS = {
    "contract": "1",
    "input_width": str(WIDTH),
    "input_height": str(HEIGHT),
    "color_order": "RGB",
    "resize": "stretch",
    "resample": "bilinear",
    "pad_value": "114",
    "labels": json.dumps(["red", "blue", "checksum"]),
    "score_threshold": "0.25",
    "iou_threshold": "0.45",
    "runtime_thresholds": "true",
    "max_detections": "10",
    "precision": "fp32",
    "runtime": "onnxruntime",
    "manifest_sha256": "0" * 64,
}
LETTERBOX = {**PARAMETERS, "resize": "letterbox", "color_order": "BGR", "runtime_thresholds": "false"}


def config_proto(name: str, parameters: dict[str, str], max_batch_size: int = 8) -> Any:
    """The ModelConfig message that Triton serves for these contract parameters."""
    config = model_config_pb2.ModelConfig(name=name, backend="python", max_batch_size=max_batch_size)
    config.input.add(name="images", data_type=model_config_pb2.TYPE_UINT8, dims=[HEIGHT, WIDTH, 3])
    if parameters.get("runtime_thresholds") == "true":
        config.input.add(name="score_threshold", data_type=model_config_pb2.TYPE_FP32, dims=[1])
        config.input.add(name="iou_threshold", data_type=model_config_pb2.TYPE_FP32, dims=[1])
    config.output.add(name="num_detections", data_type=model_config_pb2.TYPE_INT32, dims=[1])
    config.output.add(name="detection_boxes", data_type=model_config_pb2.TYPE_FP32, dims=[10, 4])
    config.output.add(name="detection_scores", data_type=model_config_pb2.TYPE_FP32, dims=[10])
    config.output.add(name="detection_classes", data_type=model_config_pb2.TYPE_INT32, dims=[10])
    config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=2 if name == "fake" else 1)
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def write_repository(repository: Path, *names: str) -> Path:
    """Two models that obey the contract, one without its parameters, one of a later contract; or those of `names`."""
    bare = {key: PARAMETERS[key] for key in ("score_threshold", "iou_threshold", "color_order")}
    models = {"fake": PARAMETERS, "letterbox": LETTERBOX, "bare": bare, "future": {**PARAMETERS, "contract": "2"}}
    for name in names or models:
        (repository / name / "1").mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("fake_model.py"), repository / name / "1" / "model.py")
        config = config_proto(name, models[name])
        (repository / name / "config.pbtxt").write_text(text_format.MessageToString(config))
    return repository


def server_on(repository: Path, *options: str, http_port: int = 0, grpc_port: int = 0) -> TritonServer:
    """Loads one model after the other: on a busy machine the stubs of all at once miss their own time limits."""
    arguments = ["--model-load-thread-count=1", *options]
    return TritonServer(repository, http_port=http_port, grpc_port=grpc_port, extra_args=arguments)


def url_of(server: TritonServer, protocol: str) -> str:
    return server.grpc_url if protocol == "grpc" else server.http_url


def server_regions(server: TritonServer) -> list[str]:
    """Names of the system shared memory regions that the server knows."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever the environment says
    with direct.open(f"http://{server.http_url}/v2/systemsharedmemory/status") as answer:
        return [region["name"] for region in json.load(answer)]


def scene(width: int = 200, height: int = 100) -> NDArray[np.uint8]:
    """A grey picture with a red patch at (40, 20)-(80, 60) and a blue one at (120, 40)-(180, 80), in 200 x 100."""
    image = np.full((height, width, 3), 128, np.uint8)
    x, y = width / 200, height / 100
    image[int(20 * y) : int(60 * y), int(40 * x) : int(80 * x)] = (255, 0, 0)
    image[int(40 * y) : int(80 * y), int(120 * x) : int(180 * x)] = (0, 0, 255)
    return image


def order(what: int, tenths: int = 0, batch: int = 1) -> NDArray[np.uint8]:
    """Rows whose first pixel gives the fake model an order: `fake_model.SLEEP`, `RAISE` or `DIE`."""
    images = np.zeros((batch, HEIGHT, WIDTH, 3), np.uint8)
    images[:, 0, 0] = (what, 1, tenths)
    return images


@contextlib.contextmanager
def listening(handle: Callable[[socket.socket], None]) -> Iterator[int]:
    """A TCP server on a free port that hands every connection to `handle` in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def pump(source: socket.socket, target: socket.socket) -> None:
    """Hands on what comes until one side ends, then ends the other."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    subprocess.run([*new, *subject], check=True, capture_output=True)
    return certificate, key


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """One that runs in a thread of its own until the tests end."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, event_loop()).result()


class Blocking:
    """AsyncSSDClient with SSDClient's methods, so that a test can use either. Safe from several threads."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._client = AsyncSSDClient(*args, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **options: run(getattr(self._client, name)(*args, **options))

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


CLIENTS = [SSDClient, Blocking]


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, for servers that are started for one test."""
    return write_repository(tmp_path_factory.mktemp("fake") / "repository", "fake")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """One server with all models for the tests that do not harm it."""
    with server_on(write_repository(tmp_path_factory.mktemp("fakes") / "repository")) as running:
        yield running


@pytest.fixture(scope="module")
def pyav() -> Iterator[Path]:
    """The folder of PyAV, which this process has, too."""
    folder = optional("video")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()  # the folder may have been looked for before it was there
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server with the real `shapes`."""
    folder = tmp_path_factory.mktemp("shapes")
    repository = folder / "model_repository"
    build_engines(["shapes"], "onnxruntime", repository=repository, artifacts=folder / "artifacts", rehearse=False)
    with TritonServer(repository) as running:
        yield running
