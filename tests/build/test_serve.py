"""The real server: the same bits as in process, errors that stay where they belong, and nothing left behind."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from numpy.typing import NDArray
from ssd_client import SSDClient
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from build.errors import ServeError
from build.publish import backend
from build.serve import TritonServer
from models.shapes.scenes import scene
from tests.conftest import unregister

ROOT = Path(__file__).parents[2]
OUTPUTS = ["num_detections", "detection_boxes", "detection_scores", "detection_classes"]
KINDS = {np.dtype(np.uint8): "UINT8", np.dtype(np.float32): "FP32", np.dtype(np.int32): "INT32"}
TRANSPORTS = ["http", "grpc", "http-shm", "grpc-shm"]
MODULES = {"http": triton_http, "grpc": triton_grpc}

Arrays = dict[str, NDArray[Any]]


@functools.cache
def pixels(number: int) -> NDArray[np.uint8]:
    """A held-out scene."""
    return np.asarray(scene("held_out", number).image)


def feeds(batch: int, first: int = 0) -> Arrays:
    """Real scenes, with thresholds that differ from row to row and are low enough for many detections."""
    images = np.stack([pixels(first + row) for row in range(batch)])
    scores = np.linspace(0.02, 0.14, batch, dtype=np.float32)[:, None]
    return {"images": images, "score_threshold": scores, "iou_threshold": 0.75 - scores}


def ask(server: TritonServer, transport: str, arrays: Arrays, model: str = "shapes") -> Arrays:
    """One request by HTTP or gRPC, its inputs inline or in shared memory."""
    protocol, _, memory = transport.partition("-")
    module = MODULES[protocol]
    with closing(module.InferenceServerClient(server.http_url if protocol == "http" else server.grpc_url)) as client:
        inputs, regions = [], []
        for name, array in arrays.items():
            entry = module.InferInput(name, list(array.shape), KINDS[array.dtype])
            if memory:
                region = f"test-{os.getpid()}-{name}"
                handle = shm.create_shared_memory_region(region, f"/{region}", array.nbytes)
                regions.append((region, handle))
                shm.set_shared_memory_region(handle, [array])
                client.register_system_shared_memory(region, f"/{region}", array.nbytes)
                entry.set_shared_memory(region, array.nbytes)
            else:
                entry.set_data_from_numpy(array)
            inputs.append(entry)
        try:
            answer = client.infer(model, inputs, outputs=[module.InferRequestedOutput(name) for name in OUTPUTS])
        finally:
            for region, handle in regions:
                try:
                    unregister(client, region)
                finally:
                    shm.destroy_shared_memory_region(handle)
    return {name: answer.as_numpy(name) for name in OUTPUTS}


def same_bits(left: Arrays, right: Arrays) -> bool:
    return all(
        left[name].shape == right[name].shape
        and left[name].dtype == right[name].dtype
        and left[name].tobytes() == right[name].tobytes()
        for name in OUTPUTS
    )


@pytest.fixture(scope="module")
def in_process(repository: Path) -> Callable[[Arrays], Arrays]:
    """The published ONNX file in this process, with ONNX Runtime's defaults; equal inputs are computed once."""
    session = onnxruntime.InferenceSession(
        str(repository / "shapes" / "1" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    answers: dict[bytes, Arrays] = {}

    def run(arrays: Arrays) -> Arrays:
        key = b"".join(array.tobytes() for array in arrays.values())
        if key not in answers:
            answers[key] = dict(zip(OUTPUTS, session.run(OUTPUTS, arrays), strict=True))
        return answers[key]

    return run


@pytest.mark.triton
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_served_bits_are_those_of_the_same_file_in_process(
    server: TritonServer, in_process: Callable[[Arrays], Arrays], transport: str, batch: int
) -> None:
    arrays = feeds(batch)
    served = ask(server, transport, arrays)
    assert served["num_detections"].min() > 0, "nothing was compared"
    assert same_bits(served, in_process(arrays))


@pytest.mark.triton
def test_any_row_of_any_batch_equals_the_same_image_alone(server: TritonServer) -> None:
    arrays = feeds(8, first=8)
    together = ask(server, "grpc", arrays)
    for row in range(8):
        alone = ask(server, "grpc", {name: array[row : row + 1] for name, array in arrays.items()})
        assert same_bits(alone, {name: array[row : row + 1] for name, array in together.items()}), f"row {row}"


def _without(name: str) -> Arrays:
    return {key: array for key, array in feeds(1).items() if key != name}


def _with(name: str, array: NDArray[Any], batch: int = 1) -> Arrays:
    return {**feeds(batch), name: array}


BAD = {
    "wrong shape": (_with("images", np.zeros((1, 299, 300, 3), np.uint8)), r"299"),
    "three dimensions": (_with("images", np.zeros((300, 300, 3), np.uint8)), r"batch size does not match"),
    "wrong type": (_with("images", np.zeros((1, 300, 300, 3), np.float32)), r"'?TYPE_UINT8|UINT8"),
    "empty batch": (
        {name: array[:0] for name, array in feeds(1).items()},
        r"(?i)batch|shape|byte",
    ),
    "batch above the maximum": ({name: np.repeat(a, 33, 0) for name, a in feeds(1).items()}, r"must be <= 32"),
    "missing input": (_without("iou_threshold"), r"expected 3 inputs but got 2"),
    "unequal batches": (_with("score_threshold", np.zeros((2, 1), np.float32)), r"batch"),
    "NaN threshold": (_with("score_threshold", np.full((1, 1), np.nan, np.float32)), r"score_threshold must .*nan"),
    "threshold above 1": (_with("iou_threshold", np.full((1, 1), 1.5, np.float32)), r"iou_threshold must .*1\.5"),
    "threshold below 0": (_with("iou_threshold", np.full((1, 1), -0.5, np.float32)), r"iou_threshold must .*-0\.5"),
}


@pytest.mark.triton
@pytest.mark.parametrize("transport", ["http", "grpc"])
@pytest.mark.parametrize("what", BAD)
def test_bad_requests_get_an_error_and_the_server_goes_on(
    server: TritonServer, in_process: Callable[[Arrays], Arrays], transport: str, what: str
) -> None:
    arrays, message = BAD[what]
    with pytest.raises(InferenceServerException, match=message):
        ask(server, transport, arrays)
    good = feeds(1)
    assert same_bits(ask(server, transport, good), in_process(good))


@pytest.mark.triton
@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_unknown_model(triton_server: TritonServer, transport: str) -> None:
    with pytest.raises(InferenceServerException, match="unknown model: 'nope'"):
        ask(triton_server, transport, feeds(1), model="nope")
    triton_server.check()


@pytest.mark.triton
def test_the_server_tells_what_it_is(triton_server: TritonServer) -> None:
    assert triton_server.models == {"shapes": "1"}
    assert tuple(map(int, triton_server.version.split(".")[:2])) >= (2, 51)
    assert psutil.Process(triton_server.pid).name() == "tritonserver"
    assert not [line for line in triton_server.log_lines() if line[:1] == "E"]
    with urllib.request.urlopen(triton_server.metrics_url) as page:
        assert b"nv_inference_request_success" in page.read()


@pytest.mark.triton
def test_a_batch_is_one_request_of_many_images(triton_server: TritonServer) -> None:
    requests, images = triton_server.requests("shapes"), triton_server.images("shapes")
    with SSDClient(triton_server.grpc_url, model="shapes") as client:
        client.infer(np.zeros((3, 300, 300, 3), np.uint8))
    deadline = time.monotonic() + 10  # a request is counted when its answer is on its way
    while triton_server.requests("shapes") == requests and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (triton_server.requests("shapes") - requests, triton_server.images("shapes") - images) == (1, 3)


@pytest.mark.triton
def test_it_listens_on_this_machine_only(triton_server: TritonServer) -> None:
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.Process(triton_server.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


# -- servers that a test may harm: each gets its own, on a copy ------------------------------------------------------


@pytest.fixture
def copied(repository: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(repository, tmp_path / "model_repository"))


@pytest.fixture
def copied_python(python_repository: Path, tmp_path: Path) -> Path:
    """With instances that are processes."""
    return Path(shutil.copytree(python_repository, tmp_path / "model_repository"))


@pytest.mark.triton
@pytest.mark.parametrize("which", ["http", "grpc", "metrics"])
def test_a_taken_port_is_reported_before_anything_starts(repository: Path, which: str, traces: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = TritonServer(repository, **{f"{which}_port": port})
        with pytest.raises(ServeError, match=rf"port {port} for {which} .*\n.*process {os.getpid()}") as caught:
            server.start()
    assert f"--{which}-port" in str(caught.value)
    assert not traces.processes()


@pytest.mark.triton
def test_a_corrupt_model_is_explained(copied: Path, traces: Any) -> None:
    """One that was never published, since what was published is held against its manifest."""
    version = copied / "shapes" / "1"
    (version / "manifest.json").unlink()
    (version / "model.onnx").write_bytes(b"this is no ONNX")
    config = copied / "shapes" / "config.pbtxt"
    config.write_text(config.read_text().replace("model_sha256", "unknown"))
    with pytest.raises(ServeError, match=r"(?s)model shapes did not load: .*protobuf parsing failed.*build-engines"):
        TritonServer(copied).start()
    assert traces.gone(0)


@pytest.mark.triton
def test_a_missing_backend_is_explained(copied: Path, traces: Any) -> None:
    for config in copied.rglob("config.pbtxt"):
        config.write_text(re.sub('backend: "[a-z_]+"', 'backend: "nothing"', config.read_text()))
    with pytest.raises(ServeError, match=r"(?s)without the nothing backend.*--runtime onnxruntime"):
        TritonServer(copied).start()


@pytest.fixture
def backends(native: None, tmp_path: Path) -> Path:
    """A copy of the folder of backends."""
    return Path(shutil.copytree(backend.BACKENDS, tmp_path / "backends"))


@pytest.mark.parametrize("lost", ["libtriton_ssd_onnxruntime.so", "libonnxruntime.so.1", "manifest.json"])
def test_a_damaged_backend_is_named_before_anything_starts(copied: Path, backends: Path, lost: str) -> None:
    path = backends / backend.NATIVE / lost
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ServeError, match=r"(?s)ssd_onnxruntime cannot be used: .*ssd_onnxruntime.*build-engines"):
        TritonServer(copied, backends=backends).start()


@pytest.mark.triton
def test_what_an_older_build_published_is_served_without_a_backend_folder(
    copied: Path, backends: Path, traces: Any
) -> None:
    """Its libraries lie beside model.onnx."""
    for name in (backend.LIBRARY, backend.RUNTIME):
        shutil.move(backends / backend.NATIVE / name, copied / "shapes" / "1" / name)
    with TritonServer(copied, backends=backends / "nowhere") as server:
        server.check()


@pytest.mark.triton
def test_a_backend_that_cannot_be_loaded_is_explained(copied: Path, backends: Path, traces: Any) -> None:
    """Whole as it was installed, but for another machine."""
    library = backends / backend.NATIVE / "libonnxruntime.so.1"
    library.write_bytes(b"no library")
    facts = json.loads((library.parent / "manifest.json").read_bytes())
    facts["files"][library.name] = hashlib.sha256(b"no library").hexdigest()
    (library.parent / "manifest.json").write_text(json.dumps(facts))
    reason = "ONNX Runtime cannot be loaded, publish the model again: .*libonnxruntime"
    with pytest.raises(ServeError, match=rf"(?s)model shapes did not load.*{reason}"):
        TritonServer(copied, backends=backends).start()


def flip(path: Path, byte: int, bit: int) -> None:
    """Turns one bit of a file."""
    data = bytearray(path.read_bytes())
    data[byte % len(data)] ^= 1 << bit
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "model.onnx, a bit": lambda model: flip(model / "1" / "model.onnx", 4_000_000, 3),
    "model.onnx, half": lambda model: os.truncate(model / "1" / "model.onnx", 3_000_000),
    "labels.txt, a bit": lambda model: flip(model / "1" / "labels.txt", 5, 0),
    "manifest.json, a bit": lambda model: flip(model / "1" / "manifest.json", 500, 0),
    "the version's config.pbtxt, a bit": lambda model: flip(model / "1" / "config.pbtxt", 400, 0),
    "config.pbtxt, a bit": lambda model: flip(model / "config.pbtxt", 1500, 1),
    "config.pbtxt, empty": lambda model: (model / "config.pbtxt").write_text(""),
    "config.pbtxt, half": lambda model: os.truncate(model / "config.pbtxt", 700),
    "config.pbtxt, gone": lambda model: (model / "config.pbtxt").unlink(),
    "version folder, gone": lambda model: (model / "1").rename(model / "9"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_model_is_not_served(repository: Path, tmp_path: Path, what: str) -> None:
    copied = Path(shutil.copytree(repository, tmp_path / "model_repository"))
    DAMAGES[what](copied / "shapes")
    with pytest.raises(ServeError, match=r"model shapes is damaged: (?s:.*)build-engines --model shapes --force"):
        TritonServer(copied).start()


def test_no_model_published(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"no model is published in .*\n.*invoke build-engines"):
        TritonServer(tmp_path).start()


@pytest.mark.parametrize("text", ["max_batch_size: many", "\xff\xfe"])
def test_unreadable_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "config.pbtxt").write_text(text)
    with pytest.raises(ServeError, match=r"shapes/config\.pbtxt cannot be read"):
        TritonServer(tmp_path).start()


@pytest.mark.triton
def test_leftovers_do_no_harm_and_a_new_version_is_taken_up_without_losing_a_request(
    copied: Path, in_process: Callable[[Arrays], Arrays], traces: Any
) -> None:
    (copied / "unfinished" / "1").mkdir(parents=True)
    (copied / ".hidden").mkdir()
    shutil.copytree(copied / "shapes" / "1", copied / "shapes" / ".staging")
    shutil.copytree(copied / "shapes" / "1", copied / "shapes" / "2")  # whole, but not what config.pbtxt names
    arrays = feeds(1)
    expected = in_process(arrays)
    with TritonServer(copied, poll_seconds=1) as server:
        assert server.models == {"shapes": "1"}
        server.check()
        config = copied / "shapes" / "config.pbtxt"
        new = config.with_name("new")
        new.write_text(config.read_text().replace("versions: 1", "versions: 2"))
        new.replace(config)
        deadline = time.monotonic() + 30
        served = "1"
        while served != "2" and time.monotonic() < deadline:
            assert same_bits(ask(server, "grpc", arrays), expected)
            with urllib.request.urlopen(f"http://{server.http_url}/v2/models/shapes") as answer:
                served = json.load(answer)["versions"][-1]
        assert served == "2"
        server.check()


@pytest.mark.triton
def test_a_dead_instance_and_then_a_killed_server_are_noticed_and_cleaned_up(copied_python: Path, traces: Any) -> None:
    """The instance's death is noticed where Triton's own health endpoint stays green."""
    with TritonServer(copied_python) as server:
        server.check()
        assert traces.regions()
        stubs = [child for child in psutil.Process(server.pid).children() if child.name().startswith("triton_python")]
        stubs[0].kill()
        while stubs[0].status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with urllib.request.urlopen(f"http://{server.http_url}/v2/health/ready") as answer:
            assert answer.status == 200
        with pytest.raises(ServeError, match=rf"1 instance.* died \(process {stubs[0].pid}\)"):
            server.check()
        os.kill(server.pid, signal.SIGKILL)
        while psutil.Process(server.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with pytest.raises(ServeError, match="tritonserver is gone"):
            server.check()
    assert traces.gone(5)
