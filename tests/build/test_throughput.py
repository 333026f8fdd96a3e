"""Which engine serves more pictures: real servers on two files, of which one is slow, broken or unable to answer."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import helper, numpy_helper

from build import throughput
from build.contract import Target
from build.errors import ServeError
from build.graph.attach import attach
from build.publish import backend
from build.publish.engines import Choice
from build.spec import Spec, load
from tests.build import tiny_model

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return load(tiny_model.write(tmp_path / "models" / "tiny"))


@pytest.fixture
def both(spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The file of each engine, of which ONNX Runtime's is the slower one; ONNX Runtime runs both here."""
    model = attach(spec)
    for engine in ("openvino", "onnxruntime"):
        (tmp_path / f"{engine}.onnx").write_bytes(model.SerializeToString())
        slow(model)
    served_by = backend.prepare()
    monkeypatch.setattr(backend, "prepare", lambda *arguments: served_by)
    monkeypatch.setattr(throughput, "ROUNDS", 3)
    monkeypatch.setattr(throughput, "SECONDS", 0.05)
    return {engine: tmp_path / f"{engine}.onnx" for engine in ("onnxruntime", "openvino")}


def slow(model: onnx.ModelProto) -> None:
    """Adds milliseconds of work to the scores, which stay the same."""
    (node,) = (node for node in model.graph.node if "detection_scores" in node.output)
    node.output[list(node.output).index("detection_scores")] = "scores"
    size = 600
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((size, size), np.float32), "zeros"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 1], np.int64), "axes"))
    steps = [
        helper.make_node("ReduceSum", ["scores"], ["total"], keepdims=0),
        helper.make_node("Add", ["total", "zeros"], ["x0"]),
    ]
    steps += [helper.make_node("MatMul", [f"x{number}", "zeros"], [f"x{number + 1}"]) for number in range(4)]
    steps += [helper.make_node("ReduceSum", ["x4", "axes"], ["none"], keepdims=0)]
    model.graph.node.extend([*steps, helper.make_node("Add", ["scores", "none"], ["detection_scores"])])


def compare(spec: Spec, paths: dict[str, Path]) -> Choice:
    return throughput.compare(spec, Target("onnxruntime"), IMAGES, paths)


@pytest.mark.triton
def test_the_engine_that_serves_more_is_tried_first_and_both_figures_told(spec: Spec, both: dict[str, Path]) -> None:
    choice = compare(spec, both)
    assert choice.order == ("openvino", "onnxruntime")
    assert choice.served_ips["openvino"] > 1.5 * choice.served_ips["onnxruntime"] > 0
    assert all(f"{engine} {rate:.0f}" in choice.why for engine, rate in choice.served_ips.items())
    assert not choice.ms


@pytest.mark.triton
def test_an_engine_that_cannot_serve_its_file_is_not_chosen(spec: Spec, both: dict[str, Path]) -> None:
    both["openvino"].write_bytes(b"no model")
    choice = compare(spec, both)
    assert (choice.order, choice.served_ips) == (("onnxruntime",), {})
    assert "openvino does not serve this file: " in choice.why


def test_an_engine_that_fails_under_load_is_not_chosen(
    spec: Spec, both: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []

    def load(server: str, *arguments: object) -> float:
        loads.append(server)
        if loads.count("openvino") == 3:
            raise ServeError("it ended with code -11")
        return 100.0

    monkeypatch.setattr(throughput, "_start", lambda stack, spec, target, engine, *more: engine)
    monkeypatch.setattr(throughput, "_load", load)
    choice = compare(spec, both)
    assert choice.order == ("onnxruntime",)
    assert choice.why == "openvino does not serve this file: it ended with code -11"
    assert loads[:6] == ["onnxruntime", "openvino"] * 3, "the load goes to one after the other"


@contextlib.contextmanager
def answering(*statuses: int) -> Iterator[tuple[Any, list[str]]]:
    """A server that answers with these statuses in turn, 5 ms each, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            time.sleep(0.005)
            self.send_response(statuses[len(asked) % len(statuses)])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        try:
            yield SimpleNamespace(http_url=f"127.0.0.1:{server.server_port}", pid=os.getpid()), asked
        finally:
            server.shutdown()


def test_what_other_programs_had_of_the_processors_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_others", lambda pid: time.perf_counter() / 2)
    with answering(200) as (server, asked):
        begun = time.perf_counter()
        rate = throughput._load(server, "a model", [(b"", {})], 1, 0.1)
        passed = time.perf_counter() - begun
    assert rate > 0.95 * len(asked) / (passed / 2)
    assert set(asked) == {"/v2/models/a%20model/infer"}


def test_a_short_queue_refuses_some_and_only_answers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_others", lambda pid: 0.0)
    with answering(503, 200) as (server, asked):
        begun = time.perf_counter()
        rate = throughput._load(server, "tiny", [(b"", {})], 1, 0.1)
        assert rate <= (len(asked) / 2 + 1) / 0.1
        assert rate >= (len(asked) // 2) / (time.perf_counter() - begun)
    for statuses, complaint in (((503,), "refused every request"), ((400,), "answers with status 400")):
        with answering(*statuses) as (server, asked), pytest.raises(ServeError, match=complaint):
            throughput._load(server, "tiny", [(b"", {})], 2, 0.02)


def test_other_programs_are_those_that_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the processors that we may use, neither idle nor waiting nor a guest's time, which is user time as well."""
    usable = os.sched_getaffinity(0)
    kind = type(psutil.cpu_times())
    fields = {"user": 6.0, "nice": 1.0, "system": 2.0, "idle": 50.0, "iowait": 7.0, "steal": 1.0, "guest": 3.0}
    busy, foreign = (kind(**{name: fields.get(name, 0.0) for name in kind._fields}) for _ in range(2))
    foreign = foreign._replace(user=1000.0)
    each = [busy if number in usable else foreign for number in range(max(usable) + 2)]
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: each)
    own = {os.getpid(): (1.0, 0.5, 9.0), 7: (2.0, 0.5, 9.0)}  # user, system, and of children
    monkeypatch.setattr(
        psutil, "Process", lambda *pid: SimpleNamespace(cpu_times=lambda: own[pid[0] if pid else os.getpid()])
    )
    assert throughput._others(7) == pytest.approx(10.0 - 4.0 / len(usable))
