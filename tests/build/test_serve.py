"""The real server: the same bits as in process, errors that stay where they belong, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
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

from build import serve
from build.errors import ServeError
from build.serve import TritonServer
from models.shapes.scenes import scene

ROOT = Path(__file__).parents[2]
OUTPUTS = ["num_detections", "detection_boxes", "detection_scores", "detection_classes"]
KINDS = {np.dtype(np.uint8): "UINT8", np.dtype(np.float32): "FP32", np.dtype(np.int32): "INT32"}
WAYS = ["http", "grpc", "http-shm", "grpc-shm"]
MODULES = {"http": triton_http, "grpc": triton_grpc}

Arrays = dict[str, NDArray[Any]]


def feeds(batch: int, first: int = 0) -> Arrays:
    """Real scenes, with thresholds that differ from row to row and are low enough for many detections."""
    images = np.stack([np.asarray(scene("held_out", first + row).image) for row in range(batch)])
    scores = np.linspace(0.02, 0.14, batch, dtype=np.float32)[:, None]
    return {"images": images, "score_threshold": scores, "iou_threshold": 0.75 - scores}


def ask(server: TritonServer, way: str, arrays: Arrays, model: str = "shapes") -> Arrays:
    """One request by HTTP or gRPC, its inputs inline or in shared memory."""
    protocol, _, memory = way.partition("-")
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
                client.unregister_system_shared_memory(region)
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
    """The published ONNX file in this process, with ONNX Runtime's defaults."""
    session = onnxruntime.InferenceSession(
        str(repository / "shapes" / "1" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    return lambda arrays: dict(zip(OUTPUTS, session.run(OUTPUTS, arrays), strict=True))


@pytest.fixture(params=["ssd_onnxruntime", "python"])
def server(request: pytest.FixtureRequest) -> TritonServer:
    """The server of each backend in turn; they must not differ in anything."""
    if request.param == "python":
        chosen: TritonServer = request.getfixturevalue("python_server")
    else:
        request.getfixturevalue("native")
        chosen = request.getfixturevalue("triton_server")
    assert chosen.model_config("shapes")["backend"] == request.param
    return chosen


@pytest.mark.triton
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("way", WAYS)
def test_served_bits_are_those_of_the_same_file_in_process(
    server: TritonServer, in_process: Callable[[Arrays], Arrays], way: str, batch: int
) -> None:
    arrays = feeds(batch)
    served = ask(server, way, arrays)
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
@pytest.mark.parametrize("way", ["http", "grpc"])
@pytest.mark.parametrize("what", BAD)
def test_bad_requests_get_an_error_and_the_server_goes_on(
    server: TritonServer, in_process: Callable[[Arrays], Arrays], way: str, what: str
) -> None:
    arrays, message = BAD[what]
    with pytest.raises(InferenceServerException, match=message):
        ask(server, way, arrays)
    good = feeds(1)
    assert same_bits(ask(server, way, good), in_process(good))


@pytest.mark.triton
@pytest.mark.parametrize("way", ["http", "grpc"])
def test_unknown_model(triton_server: TritonServer, way: str) -> None:
    with pytest.raises(InferenceServerException, match="unknown model: 'nope'"):
        ask(triton_server, way, feeds(1), model="nope")
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
    (copied / "shapes" / "1" / "model.onnx").write_bytes(b"this is no ONNX")
    with pytest.raises(ServeError, match=r"(?s)model shapes did not load: .*Protobuf parsing failed.*build-engines"):
        TritonServer(copied).start()
    assert traces.gone(0)


@pytest.mark.triton
def test_a_missing_backend_is_explained(copied: Path, traces: Any) -> None:
    config = copied / "shapes" / "config.pbtxt"
    config.write_text(re.sub('backend: "[a-z_]+"', 'backend: "nothing"', config.read_text()))
    with pytest.raises(ServeError, match=r"(?s)without the nothing backend.*--runtime onnxruntime"):
        TritonServer(copied).start()


@pytest.mark.triton
@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ("libtriton_ssd_onnxruntime.so", r"the version folder lacks its libtriton_ssd_onnxruntime\.so"),
        ("libonnxruntime.so.1", r"ONNX Runtime cannot be loaded, publish the model again: .*libonnxruntime\.so\.1"),
    ],
)
def test_a_lost_library_is_named(native: None, copied: Path, lost: str, reason: str, traces: Any) -> None:
    (copied / "shapes" / "1" / lost).unlink()
    with pytest.raises(ServeError, match=rf"(?s)model shapes did not load.*{reason}.*build-engines --force"):
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
def test_leftovers_of_a_killed_publish_do_no_harm(copied: Path, traces: Any) -> None:
    (copied / "unfinished" / "1").mkdir(parents=True)
    (copied / ".hidden").mkdir()
    shutil.copytree(copied / "shapes" / "1", copied / "shapes" / ".staging")
    shutil.copytree(copied / "shapes" / "1", copied / "shapes" / "2")  # whole, but not what config.pbtxt names
    with TritonServer(copied) as server:
        assert server.models == {"shapes": "1"}
        server.check()


@pytest.mark.triton
def test_a_new_version_is_taken_up_without_losing_a_request(
    copied: Path, in_process: Callable[[Arrays], Arrays], traces: Any
) -> None:
    shutil.copytree(copied / "shapes" / "1", copied / "shapes" / "2")
    arrays = feeds(1)
    expected = in_process(arrays)
    with TritonServer(copied, poll_seconds=1) as server:
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
def test_a_dead_instance_is_found_where_triton_says_that_all_is_well(copied_python: Path, traces: Any) -> None:
    with TritonServer(copied_python) as server:
        server.check()
        stubs = [child for child in psutil.Process(server.pid).children() if child.name().startswith("triton_python")]
        stubs[0].kill()
        while stubs[0].status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with urllib.request.urlopen(f"http://{server.http_url}/v2/health/ready") as answer:
            assert answer.status == 200
        with pytest.raises(ServeError, match=rf"1 instance.* died \(process {stubs[0].pid}\)"):
            server.check()


@pytest.mark.triton
def test_a_killed_server_is_noticed_and_cleaned_up(copied_python: Path, traces: Any) -> None:
    with TritonServer(copied_python) as server:
        assert traces.regions()
        os.kill(server.pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while psutil.Process(server.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(ServeError, match="tritonserver is gone"):
            server.check()
    assert traces.gone(5)


@pytest.fixture
def served(python_repository: Path, traces: Any, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`build.serve.serve` in a process of its own, ready, with instances that are processes, too."""
    code = (
        f"from pathlib import Path; import build.serve as s; s.SHM_PREFIX = {traces.token!r}; s.serve("
        f"{str(python_repository)!r}, http_port=0, grpc_port=0, metrics_port=0, log=Path({str(tmp_path / 'log')!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    shown = ""
    while "Ctrl-C stops it.\n" not in shown:
        line = process.stdout.readline()
        assert line, f"it did not come up: {shown}"
        shown += line
    assert traces.regions()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.triton
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_it_cleanly(served: subprocess.Popen[str], traces: Any, number: signal.Signals) -> None:
    served.send_signal(number)
    rest, _ = served.communicate(timeout=120)
    assert (served.returncode, rest.split()[-1]) == (0, "stopped")
    assert traces.gone(0), (traces.processes(), traces.regions())


@pytest.mark.triton
def test_the_server_does_not_outlive_a_killed_parent(served: subprocess.Popen[str], traces: Any) -> None:
    served.kill()
    served.wait()
    assert traces.gone(20), (traces.processes(), traces.regions())


@pytest.mark.triton
def test_serve_ends_with_an_error_when_an_instance_dies(served: subprocess.Popen[str], traces: Any) -> None:
    for process in psutil.Process(served.pid).children(recursive=True):
        if process.name().startswith("triton_python"):
            process.kill()
    rest, _ = served.communicate(timeout=120)
    assert served.returncode != 0
    assert "2 instance(s) of a model died" in rest or "1 instance(s) of a model died" in rest


# -- programs that stand in for tritonserver where the real one cannot be made to fail -------------------------------


def _program(folder: Path, script: str) -> None:
    folder.mkdir(exist_ok=True)
    program = folder / "tritonserver"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def make(script: str) -> None:
        _program(tmp_path / "bin", script)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    return make


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A repository with one model for TensorRT."""
    (tmp_path / "plans" / "shapes").mkdir(parents=True)
    (tmp_path / "plans" / "shapes" / "config.pbtxt").write_text('name: "shapes" platform: "tensorrt_plan"')
    return tmp_path / "plans"


HELP = 'case "$1" in --help) exit 1;; esac;'
REFUSALS = {
    "a library": ("tritonserver: error while loading shared libraries: libfoo.so.1: cannot open", "libfoo.so.1 is not"),
    "glibc": ("tritonserver: /lib/libc.so.6: version \\`GLIBC_2.99' not found", "needs GLIBC_2.99"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_the_loader_refuses_is_said_before_the_start(
    stand_in: Callable[[str], None], plan: Path, what: str
) -> None:
    printed, expected = REFUSALS[what]
    stand_in(f'echo "{printed}" >&2; exit 127')
    with pytest.raises(ServeError, match=f"(?s)cannot run on this machine.*{expected}"):
        TritonServer(plan).start()


CAUSES = {
    "port race": (
        "failed to start HTTP service: Unavailable - Socket '127.0.0.1:8000' already in use",
        "another program",
    ),
    "plugin": ("could not find any supported creator for SSDNMS, plugin namespace: , version 1", "libssd_nms.so"),
    "memory": ("Failed to initialize the shared memory: No space left on device", "/dev/shm is too small"),
}


@pytest.mark.parametrize("what", CAUSES)
def test_the_likely_cause_of_an_early_end(stand_in: Callable[[str], None], plan: Path, what: str) -> None:
    printed, expected = CAUSES[what]
    stand_in(f'{HELP} echo "{printed}"; exit 3')
    with pytest.raises(ServeError, match=r"(?s)ended with code 3 before it was ready\nthe log ends with:") as caught:
        TritonServer(plan).start()
    assert printed.split(":")[0] in str(caught.value)
    assert expected in str(caught.value)


def test_a_server_that_hangs_ends_at_the_timeout(stand_in: Callable[[str], None], plan: Path, traces: Any) -> None:
    stand_in(f"{HELP} echo thinking; exec sleep 100")
    with pytest.raises(ServeError, match=r"(?s)not ready after 3 s.*thinking"):
        TritonServer(plan, startup_timeout=3).start()
    assert traces.gone(0)


def test_a_stub_that_lacks_a_library_does_not_hang_the_start(stand_in: Callable[[str], None], plan: Path) -> None:
    stand_in(
        f"{HELP} echo 'x: error while loading shared libraries: libpython3.99.so.1.0: cannot open'; exec sleep 100"
    )
    started = time.monotonic()
    with pytest.raises(ServeError, match=r"(?s)could not start.*libpython3\.99\.so\.1\.0"):
        TritonServer(plan).start()
    assert time.monotonic() - started < 10


def test_a_server_that_ignores_sigterm_is_killed(stand_in: Callable[[str], None], plan: Path, traces: Any) -> None:
    stand_in(f"{HELP} trap '' TERM; echo up; while :; do sleep 0.1; done")
    server = TritonServer(plan, startup_timeout=60)

    def start() -> None:
        with suppress(ServeError):
            server.start()

    starter = threading.Thread(target=start)
    starter.start()
    while not (server._process and "up" in server.log_lines()):
        time.sleep(0.01)
    started = time.monotonic()
    server.stop(timeout=0.3)
    assert time.monotonic() - started < 5
    starter.join(10)
    assert traces.gone(1)


@pytest.mark.parametrize(
    ("platform", "built", "loaded"),
    [
        ("tensorrt_plan", True, True),
        ("tensorrt_plan", False, False),
        ("onnxruntime_onnx", True, False),
    ],
)
def test_the_plugin_is_preloaded_for_plans_only(
    stand_in: Callable[[str], None],
    plan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    built: bool,
    loaded: bool,
) -> None:
    config = plan / "shapes" / "config.pbtxt"
    config.write_text(f'name: "shapes" platform: "{platform}"')
    plugin = tmp_path / "libssd_nms.so"
    if built:
        plugin.touch()
    monkeypatch.setattr(serve, "PLUGIN", plugin)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    stand_in(f'{HELP} echo "preload=[$LD_PRELOAD]"; exit 3')
    with pytest.raises(ServeError) as caught:
        TritonServer(plan).start()
    assert f"preload=[{plugin if loaded else ''}]" in str(caught.value)
    assert "LD_PRELOAD" not in os.environ


@pytest.mark.parametrize(("offered", "passed"), [("--allow-client-shm", True), ("--other", False)])
def test_client_shared_memory_is_allowed_where_the_server_knows_the_flag(
    stand_in: Callable[[str], None], plan: Path, offered: str, passed: bool
) -> None:
    stand_in(f'case "$1" in --help) echo "{offered} <boolean>"; exit 1;; esac; echo "$@"; exit 3')
    with pytest.raises(ServeError) as caught:
        TritonServer(plan).start()
    assert ("--allow-client-shm=true" in str(caught.value)) is passed


def test_the_server_on_path_comes_first(stand_in: Callable[[str], None], tmp_path: Path) -> None:
    wheel = serve.find_tritonserver()
    stand_in("exit 0")
    assert serve.find_tritonserver().binary == tmp_path / "bin" / "tritonserver"
    assert wheel.from_wheel or shutil.which("tritonserver", path=os.environ["PATH"].split(":", 1)[1])


@pytest.mark.triton
def test_a_batch_is_one_request_of_many_images(triton_server: TritonServer) -> None:
    requests, images = triton_server.requests("shapes"), triton_server.images("shapes")
    with SSDClient(triton_server.grpc_url, model="shapes") as client:
        client.infer(np.zeros((3, 300, 300, 3), np.uint8))
    assert (triton_server.requests("shapes") - requests, triton_server.images("shapes") - images) == (1, 3)
