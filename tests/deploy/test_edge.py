"""deploy/edge/haproxy.cfg on a real HAProxy: the attacks of docs/security.md end at it, and detection requests pass."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from build.contract import Target
from build.errors import ServeError
from build.graph.attach import attach
from build.publish import backend, repository
from build.serve import TritonServer
from build.spec import load
from tests.build import tiny_model
from tests.deploy.edge import ATTACKS, Edge, haproxy, send

NO_HAPROXY = shutil.which("haproxy") is None and not Path("/usr/sbin/haproxy").is_file()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the tiny model."""
    folder = tmp_path_factory.mktemp("edge")
    spec = load(tiny_model.write(folder / "models" / "tiny"))
    built = folder / "built.onnx"
    built.write_bytes(attach(spec).SerializeToString())
    root = folder / "model_repository"
    repository.publish(spec, built, root, Target("onnxruntime"), served_by=backend.prepare())
    return root


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[TritonServer]:
    with TritonServer(tiny) as server:
        yield server
        server.check()


@pytest.fixture(scope="module")
def edge(server: TritonServer) -> Iterator[Edge]:
    if NO_HAPROXY:
        pytest.skip("needs HAProxy 2.6 or later: apt-get install haproxy")
    with haproxy(server) as edge:
        yield edge


@pytest.mark.triton
@pytest.mark.parametrize("what", ATTACKS)
def test_an_attack_ends_at_the_proxy(edge: Edge, server: TritonServer, what: str) -> None:
    attack, status = ATTACKS[what]
    before = psutil.Process(server.pid).memory_info().rss
    assert attack(edge.http).split()[1] == status
    server.check()
    assert psutil.Process(server.pid).memory_info().rss < before + (30 << 20)


HEAD = "POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\n"
REFUSED = {
    "model control": ("POST /v2/repository/models/tiny/unload HTTP/1.1\r\nHost: a\r\nContent-Length: 0", "403"),
    "statistics": ("GET /v2/models/tiny/stats HTTP/1.1\r\nHost: a", "403"),
    "logging": ("POST /v2/logging HTTP/1.1\r\nHost: a\r\nContent-Length: 0", "403"),
    "generate": ("POST /v2/models/tiny/generate HTTP/1.1\r\nHost: a\r\nContent-Length: 0", "403"),
    "another path to it": ("POST //v2/systemsharedmemory/status HTTP/1.1\r\nHost: a\r\nContent-Length: 0", "403"),
    "no length": (HEAD.rstrip(), "411"),
    "a long JSON part": (f"{HEAD}Content-Length: 99999\r\nInference-Header-Content-Length: 20000", "413"),
    "two lengths": (
        f"{HEAD}Content-Length: 9\r\n{'Inference-Header-Content-Length: 1' + chr(13) + chr(10)}"
        "Inference-Header-Content-Length: 2",
        "400",
    ),
    "a length that is none": (f"{HEAD}Content-Length: 9\r\nInference-Header-Content-Length: -1", "400"),
    "100 MB": (f"{HEAD}Content-Length: 100000000\r\nInference-Header-Content-Length: 10", "413"),
}


@pytest.mark.triton
@pytest.mark.parametrize("what", REFUSED)
def test_what_no_detection_needs_is_refused(edge: Edge, what: str) -> None:
    head, status = REFUSED[what]
    assert send(edge.http, head).split()[1] == status


@pytest.mark.triton
def test_the_deepest_json_that_passes_does_no_harm(edge: Edge, server: TritonServer) -> None:
    data = b'{"inputs":' + b"[" * (16384 - 10)
    assert "500" in send(edge.http, f"{HEAD}Content-Length: {len(data)}", data)
    server.check()


@pytest.mark.triton
def test_detection_requests_pass(edge: Edge) -> None:
    for module, port in ((triton_http, edge.http), (triton_grpc, edge.grpc)):
        with closing(module.InferenceServerClient(f"127.0.0.1:{port}")) as client:
            assert client.is_server_live()
            assert client.is_model_ready("tiny")
            config = client.get_model_config("tiny")
            assert config
            inputs = [
                module.InferInput(name, list(array.shape), kind).set_data_from_numpy(array)
                for name, kind, array in (
                    ("images", "UINT8", np.zeros((4, 8, 8, 3), np.uint8)),
                    ("score_threshold", "FP32", np.full((4, 1), 0.1, np.float32)),
                    ("iou_threshold", "FP32", np.full((4, 1), 0.5, np.float32)),
                )
            ]
            answer = client.infer("tiny", inputs)
            assert answer.as_numpy("detection_boxes").shape == (4, 5, 4)


@pytest.mark.triton
def test_over_grpc_nothing_else_passes(edge: Edge) -> None:
    with closing(triton_grpc.InferenceServerClient(f"127.0.0.1:{edge.grpc}")) as client:
        for call in (
            lambda: client.register_system_shared_memory("edge", "/edge", 4),
            lambda: client.unload_model("tiny"),
            lambda: client.update_log_settings({"log_info": False}),
            client.get_inference_statistics,
            lambda: client.infer("tiny", [], compression_algorithm="gzip"),
        ):
            with pytest.raises(InferenceServerException, match=r"PERMISSION_DENIED|INTERNAL|Bad Request|403|400"):
                call()


@pytest.mark.triton
@pytest.mark.long
@pytest.mark.parametrize("what", ATTACKS)
def test_without_a_proxy_the_same_does_harm(tiny: Path, what: str) -> None:
    """The control: what the tests above would not notice if the attacks did nothing."""
    with TritonServer(tiny) as server:
        before = psutil.Process(server.pid).memory_info().rss
        ATTACKS[what][0](int(server.http_url.split(":")[1]))
        if what == "gzip bomb":
            assert psutil.Process(server.pid).memory_info().rss > before + (100 << 20)
        else:
            with pytest.raises(ServeError, match="tritonserver is gone"):
                server.check()
