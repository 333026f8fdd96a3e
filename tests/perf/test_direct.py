"""The floor: what it counts, whose threads it takes, and that nothing that fails goes unseen."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from build.errors import ServeError
from build.serve import TritonServer
from build.session import runner
from build.tensorrt import plan
from build.tensorrt.cuda import Cuda
from perf import direct
from perf.direct import Direct, Runner
from tests.build.tensorrt.test_plan import NEW, FakeCudart, fake, manifest

FEEDS = direct.feeds([np.full((2, 2, 3), value, np.uint8) for value in range(6)], batch_size=3)


class Sleeper:
    """Takes 5 ms for a request and counts how many it has at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __call__(self, feed: dict[str, Any]) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        self.seen.add(int(feed["images"][0, 0, 0, 0]))
        time.sleep(0.005)
        self.now -= 1


def test_counts_images_of_every_client() -> None:
    runners = [Sleeper(), Sleeper()]
    baseline = Direct(runners, FEEDS, threads=2, clients=4)
    # Two at a time, 5 ms each, 3 images in each; sleeping too long makes it fewer, and nothing makes it more.
    assert 300 < baseline.throughput(0.3) < 1250
    assert [runner.most for runner in runners] == [1, 1]
    assert runners[0].seen | runners[1].seen == {0, 3}
    assert (str(baseline), baseline.batch_size) == ("2 x 2", 3)


def test_fewer_clients_than_runners_leave_some_idle() -> None:
    baseline = Direct([Sleeper() for _ in range(4)], FEEDS, clients=1)
    assert baseline.throughput(0.2) < 625


def test_latency_is_that_of_the_single_runner() -> None:
    single = Sleeper()
    latency = Direct([single, lambda feed: None], FEEDS).latency(0)
    assert list(latency) == ["p50", "p90", "p99"]
    assert 5 <= latency["p50"] <= latency["p90"] <= latency["p99"]
    assert single.seen == {0, 3}


def test_a_failing_runner_is_no_slow_one() -> None:
    calls = 0
    lock = threading.Lock()

    def fails(feed: object) -> None:
        nonlocal calls
        with lock:
            calls += 1
        if calls > 5:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Direct([fails], FEEDS).throughput(0.2)


@pytest.mark.parametrize(("batch_size", "requests"), [(1, 6), (3, 2), (4, 2), (8, 1)])
def test_requests_hold_every_image(batch_size: int, requests: int) -> None:
    images = [np.full((2, 2, 3), value, np.uint8) for value in range(6)]
    requests_sent = direct.feeds(images, {"score_threshold": 0.25}, batch_size)
    assert len(requests_sent) == requests
    for feed in requests_sent:
        assert (feed["images"].shape, feed["images"].dtype) == ((batch_size, 2, 2, 3), np.uint8)
        assert feed["score_threshold"].tolist() == [[0.25]] * batch_size
    assert set(np.concatenate([feed["images"] for feed in requests_sent])[:, 0, 0, 0]) == set(range(6))


def test_thresholds_only_where_the_model_takes_them() -> None:
    config = SimpleNamespace(runtime_thresholds=True, score_threshold=0.3, iou_threshold=0.5)
    assert direct.thresholds(config) == {"score_threshold": 0.3, "iou_threshold": 0.5}  # type: ignore[arg-type]
    config.runtime_thresholds = False
    assert direct.thresholds(config) == {}  # type: ignore[arg-type]


def test_split_of_the_servers_threads() -> None:
    groups = [{"count": 2, "kind": "KIND_CPU"}, {"count": 1}]
    assert direct.split({"instance_group": groups, "parameters": {"threads": {"string_value": "3"}}}) == (3, 3)
    assert direct.split({"instance_group": [{}], "parameters": {}}) == (1, 1)
    runners = {"runners": {"string_value": "2"}}  # another instance only has the next request ready
    assert direct.split({"instance_group": [{"count": 3}], "parameters": runners}) == (2, 1)


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """An ONNX file: images → their sum."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["real"], ["sum"]),
        ],
        "sums",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 2, 2, 3])],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, None)],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_every_split_has_all_threads(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def session(model: onnx.ModelProto, *, threads: int) -> Runner:
        asked.append(threads)
        return runner(model, threads=threads)

    monkeypatch.setattr(direct, "runner", session)
    monkeypatch.setattr(direct, "TRIAL_S", 0.05)
    best = direct.fastest(sums, FEEDS, 2, 2)
    assert sorted(asked) == [1, 2, 2, 4]  # the four of one thread share a session
    assert best.sessions * best.threads == 4
    assert best.latency(0.01)["p50"] > 0


def test_the_single_stream_has_an_instances_threads(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def session(model: onnx.ModelProto, *, threads: int) -> Runner:
        return lambda feed: time.sleep(0.001 * threads) or {}  # many sessions win

    monkeypatch.setattr(direct, "runner", session)
    monkeypatch.setattr(direct, "TRIAL_S", 0.1)
    best = direct.fastest(sums, FEEDS, 1, 4)
    assert (best.sessions, best.threads) == (4, 1)
    assert best.latency(0)["p50"] >= 4


def test_a_plan_has_the_same_interface(tmp_path: Path) -> None:
    """On stand-ins of CUDA and TensorRT: the API's shape, no GPU."""
    path = tmp_path / "model.plan"
    path.write_bytes(b"plan")
    cudart = FakeCudart()
    with (
        plan.Plan(path, manifest(b"plan", NEW), trt=fake(NEW), cuda=Cuda(cudart)) as first,
        plan.Plan(path, manifest(b"plan", NEW), trt=fake(NEW), cuda=Cuda(cudart)) as second,
    ):
        baseline = Direct([first, second], FEEDS)
        assert baseline.throughput(0.05) > 0
        assert baseline.latency(0.01)["p99"] > 0
    assert not cudart.memory


@pytest.mark.triton
def test_beside_a_server(triton_server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssd_client import SSDClient

    with SSDClient(triton_server.grpc_url, model="shapes") as client:
        config = client.model_config()
    monkeypatch.setattr(direct, "REQUESTS", 2)  # whichever split is the fastest
    instances, threads = direct.split(triton_server.model_config("shapes"))
    images = [np.zeros((300, 300, 3), np.uint8)] * 2
    with direct.beside(triton_server, "shapes", images, config, batch_size=2) as baseline:
        assert baseline.sessions * baseline.threads == instances * threads
        assert baseline.throughput(0.2) > 0
        assert baseline.latency(0.1)["p50"] > 0


def test_a_server_without_its_files(tmp_path: Path) -> None:
    server: Any = SimpleNamespace(
        repository=tmp_path,
        models={"shapes": "1"},
        model_config=lambda model: {"instance_group": [{}], "parameters": {}},
    )
    config: Any = SimpleNamespace(runtime_thresholds=False)
    with (
        pytest.raises(ServeError, match=r"neither model\.onnx nor model\.plan"),
        direct.beside(server, "shapes", [np.zeros((2, 2, 3), np.uint8)], config),
    ):
        pass


def test_the_engine_in_process_is_the_one_that_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, int, int, str]] = []

    def fake_openvino(path: Path, count: int, threads: int, precision: str) -> list[Runner]:
        asked.append((path, count, threads, precision))
        return [lambda feed: None] * count

    monkeypatch.setattr(direct.openvino, "runners", fake_openvino)
    path = tmp_path / "model.onnx"
    serving = {"backend": "ssd_onnxruntime", "engine": "openvino"}
    path.with_name("manifest.json").write_text(json.dumps({"serving": serving, "precision": "fp32"}))
    baseline = direct.fastest(path, FEEDS, 2, 1)
    assert sorted(asked) == [(path, 1, 2, "f32"), (path, 2, 1, "f32")]
    assert str(baseline) in ("1 x 2", "2 x 1")
