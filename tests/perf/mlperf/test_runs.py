"""LoadGen on a real server, and what must void a run: no answer, two answers, wrong answers, Ctrl-C."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ssd_client import ModelConfig, SSDClient
from ssd_client.preprocess import Placement
from ssd_client.rule import Preprocessing

from build import spec
from build.errors import DataError
from build.gate import datasets
from build.gate.datasets import Pictures
from build.serve import TritonServer
from perf import direct
from perf.mlperf import answers, child, runs
from perf.mlperf.child import Served
from perf.mlperf.runs import SCENARIOS, Pace
from perf.served_accuracy import evaluate_served

ROOT = Path(__file__).resolve().parents[3]
PACE = Pace(20.0, 80.0)  # optimistic is enough: what it does is plan queries
COUNT = 24
# One scenario that waits for each answer and one with several workers; the two others take the same ways.
PLANTED = [
    pytest.param(name, marks=[] if name in ("single-stream", "offline") else [pytest.mark.long]) for name in SCENARIOS
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    shapes = spec.load(ROOT / "models" / "shapes" / "spec.toml")
    few = replace(shapes, data=replace(shapes.data, held_out_count=COUNT))
    return datasets.held_out(few, tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def config(triton_server: TritonServer) -> ModelConfig:
    with SSDClient(triton_server.grpc_url, model="shapes") as client:
        return client.model_config()


@pytest.fixture(scope="module")
def served(triton_server: TritonServer, config: ModelConfig, pictures: Pictures) -> Served:
    return Served.of(config, triton_server.http_url, pictures.paths, 0.01, timeout=5.0)


@pytest.fixture(scope="module")
def reference(triton_server: TritonServer, config: ModelConfig, served: Served) -> answers.Reference:
    path = direct.served_file(triton_server, "shapes")
    return answers.Reference(path, config, served.pictures, served.score_threshold)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer queries than LoadGen needs to call a run VALID: enough to see what else is wrong with it."""
    monkeypatch.setattr(runs, "SCENARIOS", {name: replace(how, queries=1) for name, how in SCENARIOS.items()})


@pytest.mark.triton
@pytest.mark.parametrize("scenario", ["single-stream", "offline"])
def test_a_valid_run(served: Served, reference: answers.Reference, tmp_path: Path, scenario: str) -> None:
    result = runs.run(served, scenario, tmp_path, seconds=0.8, pace=runs.pace(served, 0.4))
    if "too short" not in str(result["problems"]):  # a machine that became twice as fast meanwhile
        assert (result["valid"], result["problems"]) == (True, [])
    assert result["failed"] == 0
    assert result["answered"] >= 8
    assert reference.check(tmp_path, result) == []
    assert all((tmp_path / name).is_file() for name in runs.LOGS)
    summary = (tmp_path / runs.SUMMARY).read_text()
    assert f"Result is : {result['loadgen']}" in summary
    if scenario == "single-stream":
        figures = result["figures"]
        assert f"90th percentile latency (ns) : {round(figures['p90_ms'] * 1e6)}" in summary or "Early" in summary
        assert figures["early_stopping_ms"] >= figures["p90_ms"]
        assert 0 < figures["p50_ms"] <= figures["p90_ms"] <= figures["p99_ms"] <= figures["max_ms"]
    else:
        assert f"Samples per second: {result['figures']['samples_per_second']:.6g}"[:23] in summary


@pytest.mark.triton
@pytest.mark.usefixtures("short")
def test_too_few_queries_are_not_valid(served: Served, tmp_path: Path) -> None:
    result = runs.run(served, "server", tmp_path, seconds=0.5, pace=PACE, bound_ms=1000)
    assert (result["valid"], result["loadgen"], result["failed"]) == (False, "INVALID", 0)
    assert "too few queries for its percentile" in result["problems"][0]
    assert result["figures"]["p99_ms"] > 0


@pytest.mark.triton
def test_accuracy_mode_is_the_products_own(served: Served, pictures: Pictures, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seconds": 0.5, "pace": PACE}
    whole = runs.run(served, "offline", tmp_path / "accuracy", mode="AccuracyOnly", **settings)
    assert whole["problems"] == []
    judged = answers.evaluate(tmp_path / "accuracy", pictures)
    with SSDClient(served.url, model="shapes", protocol="http") as client:
        assert pictures.truth is not None
        own = evaluate_served(client, pictures.paths, pictures.truth)
    assert judged.map == pytest.approx(own.map, abs=1e-3)
    assert judged.images == COUNT
    assert as_the_public_script(tmp_path / "accuracy", pictures) == pytest.approx(judged.map, abs=1e-6)
    # The compliance test's question: does a performance run answer what the accuracy run answered?
    runs.run(served, "single-stream", tmp_path / "performance", **settings)
    same = answers.same_in_both(tmp_path / "performance", tmp_path / "accuracy")
    assert same["different"] == []
    log = tmp_path / "accuracy" / runs.ACCURACY
    rows = json.loads(log.read_text())
    log.write_text(json.dumps([{**row, "data": row["data"][:-2] + "00"} for row in rows[1:]]))
    assert (
        len(answers.same_in_both(tmp_path / "performance", tmp_path / "accuracy")["different"]) >= same["compared"] - 1
    )
    with pytest.raises(DataError, match=f"lacks 1 of {COUNT} pictures"):
        answers.evaluate(tmp_path / "accuracy", pictures)


def as_the_public_script(folder: Path, pictures: Pictures) -> float:
    """mAP as MLPerf's accuracy script computes it from the log: 7 FP32 a box, boxes 0..1, the label is the category."""
    from build.gate import accuracy

    assert pictures.truth is not None
    images, detections = pictures.truth["images"], []
    for entry in json.loads((folder / runs.ACCURACY).read_text()):
        data = np.frombuffer(bytes.fromhex(entry["data"]), np.float32)
        for i in range(0, len(data), 7):
            index, ymin, xmin, ymax, xmax, score, label = data[i : i + 7]
            assert int(index) == entry["qsl_idx"]
            image = images[int(index)]
            ymin, ymax = ymin * image["height"], ymax * image["height"]
            xmin, xmax = xmin * image["width"], xmax * image["width"]
            box = [float(xmin), float(ymin), float(xmax - xmin), float(ymax - ymin)]
            row = {"image_id": image["id"], "category_id": int(label), "bbox": box, "score": float(score)}
            detections.append(row)
    return accuracy.mean_average_precision(pictures.truth, detections)


def test_a_payload_is_in_the_pictures_own_frame() -> None:
    placement = Placement((200, 100), (1.5, 1.5), (0, 75), (300, 300))  # letterboxed into 300 x 300
    outputs = {
        "num_detections": np.array([[1]], np.int32),
        "detection_boxes": np.array([[[0.25, 0.25, 0.5, 0.75], [0, 0, 0, 0]]], np.float32),
        "detection_scores": np.array([[0.5, 0]], np.float32),
        "detection_classes": np.array([[3, -1]], np.int32),
    }
    (row,) = child.payload(7, outputs, 0, placement)
    # index, ymin, xmin, ymax, xmax, score, class + 1
    np.testing.assert_allclose(row, [7, 0, 0.25, 1, 0.5, 0.5, 4], atol=1e-6)
    back = answers.outputs_of(row.tobytes().hex())
    assert back["detection_classes"].tolist() == [3]
    np.testing.assert_allclose(back["detection_boxes"], [[0.25, 0, 0.5, 1]], atol=1e-6)


@pytest.fixture
def null(pictures: Pictures) -> Served:
    rule = asdict(Preprocessing(64, 64, "stretch", "bilinear", 114, "RGB"))
    return Served("shapes", "", [str(path) for path in pictures.paths], rule, 8, 0.01, timeout=0.1)


def test_the_null_system_shows_what_loadgen_costs(null: Served, tmp_path: Path) -> None:
    result = runs.run(null, "multi-stream", tmp_path, seconds=0.2, pace=PACE, null=True)
    assert result["exit_code"] == 0
    assert result["failed"] == 0
    assert result["figures"]["p50_ms"] < 10


# -- planted faults ----------------------------------------------------------------------------------------------------


@contextmanager
def between(url: str, fault: Callable[[int, bytes], bytes | None]) -> Iterator[str]:
    """A server that passes everything on to the real one, but for what `fault` makes of an inference's answer.

    Args:
        url: of the real one.
        fault: (number of the inference from 1, its answer) → what is answered; None = nothing, ever.
    """
    numbers, lock, ended = iter(range(1, 1_000_000)), threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            connection = http.client.HTTPConnection(url)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            if self.path.endswith("/infer"):
                with lock:
                    number = next(numbers)
                changed = fault(number, data)
                if changed is None:
                    ended.wait(60)
                    return
                data = changed
            self.send_response(answer.status)
            for name in ("Content-Type", "Inference-Header-Content-Length"):
                if answer.headers.get(name):
                    self.send_header(name, answer.headers[name])
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()


@pytest.mark.triton
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("scenario", PLANTED)
def test_a_request_that_is_never_answered(served: Served, tmp_path: Path, scenario: str) -> None:
    with between(served.url, lambda number, data: None if number == 3 else data) as url:
        asked = replace(served, url=url, timeout=2.5 if scenario == "offline" else 1.0)  # batches of 8, 4 at a time
        result = runs.run(asked, scenario, tmp_path, seconds=0.5, pace=PACE, bound_ms=5000)
    assert not result["valid"]
    assert 1 <= result["failed"] <= 8  # the pictures of one request
    assert any("without an answer: RequestTimeoutError" in problem for problem in result["problems"]), result
    assert result["exit_code"] == 0
    assert all((tmp_path / name).is_file() for name in runs.LOGS)


@pytest.mark.triton
@pytest.mark.usefixtures("short")
def test_wrong_boxes_under_load(served: Served, reference: answers.Reference, tmp_path: Path) -> None:
    answered: list[bytes] = []

    def another_ones(number: int, data: bytes) -> bytes:
        answered.append(data)
        return answered[0] if number % 4 == 0 else data

    with between(served.url, another_ones) as url:
        result = runs.run(replace(served, url=url), "single-stream", tmp_path, seconds=1.0, pace=PACE)
    (problem,) = reference.check(tmp_path, result)
    assert result["loadgen"]  # it knows nothing of answers
    assert 0 < result["wrong"] <= result["answered"] / 4
    assert problem.startswith(f"{result['wrong']} of {result['answered']} answers were wrong: picture ")
    assert "'s answer: answers or rows were swapped" in problem


def program(tmp_path: Path, change: str) -> list[str]:
    """A child with a change to its own code."""
    path = tmp_path / "changed.py"
    path.write_text(
        "import os, sys, time\nfrom pathlib import Path\nfrom perf.mlperf import child\n"
        f"{change}\nos._exit(child.main(Path(sys.argv[1])))\n"
    )
    return ["env", f"PYTHONPATH={ROOT}:{ROOT / 'client'}", sys.executable, str(path)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            "complete = child.complete\nchild.complete = lambda answers: (complete(answers), complete(answers))",
            r"logged \d+ ERROR|by signal",
        ),
        ("child.complete = lambda answers: None", "did not end by its deadline: a request was never answered"),
        ("os.abort()", "was ended by signal 6"),
        ("raise SystemExit('oh')", "ended with exit code 1: oh"),
    ],
    ids=["two answers", "no answer", "abort", "exit"],
)
@pytest.mark.usefixtures("short")
def test_a_child_that_answers_twice_or_hangs_or_dies(
    null: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, problem: str
) -> None:
    if problem.startswith("did not end"):
        monkeypatch.setattr(runs, "_GRACE_S", 1.5)
    how: dict[str, Any] = {"seconds": 0.1, "pace": PACE, "null": True, "program": program(tmp_path, change)}
    result = runs.run(null, "single-stream", tmp_path / "logs", **how)
    assert not result["valid"]
    assert any(re.search(problem, said) for said in result["problems"]), result["problems"]
    if "ERROR" in problem:
        assert (tmp_path / "logs" / runs.DETAIL).is_file()


_INTERRUPTED = """
import json, sys
from pathlib import Path
from ssd_client import ModelConfig, SSDClient
from perf.mlperf import runs
from perf.mlperf.child import Served
url, scenario, folder, *pictures = sys.argv[1:]
with SSDClient(url, model="shapes", protocol="http") as client:
    config = client.model_config()
served = Served.of(config, url, pictures, 0.01)
try:
    runs.run(served, scenario, Path(folder), seconds=60, pace=runs.Pace(20.0, 80.0))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.triton
@pytest.mark.parametrize("scenario", PLANTED)
def test_ctrl_c(served: Served, pictures: Pictures, tmp_path: Path, scenario: str) -> None:
    regions = set(Path("/dev/shm").iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED, served.url, scenario, str(tmp_path), *map(str, pictures.paths)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / runs.DETAIL).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.7)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert "Segmentation" not in said
    assert "core dumped" not in said
    assert all((tmp_path / name).is_file() for name in runs.LOGS)
    assert json.loads((tmp_path / child.OUTCOME).read_text())["stopped"]
    assert not list(tmp_path.glob("core*"))
    left = [path.name for path in set(Path("/dev/shm").iterdir()) - regions if path.name.startswith("ssd_client")]
    assert not [name for name in left if not psutil.pid_exists(int(name.split("_")[3]))], left  # others may work here


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_of_the_scenarios() -> None:
    pace = Pace(latency_ms=10.0, images_per_second=160.0)
    values, expected = runs.settings_of("single-stream", pace, 20)
    assert (values["min_duration_ms"], values["min_query_count"], expected) == (20000, 64, 20)
    assert values["single_stream_expected_latency_ns"] < 10e6  # better than measured: LoadGen must not run out
    values, expected = runs.settings_of("multi-stream", pace, 20)
    assert values["multi_stream_samples_per_query"] == 8
    assert expected == pytest.approx(662 * 8 / 160)  # longer than asked: a p99 needs so many queries
    values, expected = runs.settings_of("server", pace, 20)
    assert (values["server_target_qps"], values["server_target_latency_ns"]) == (96.0, 100e6)
    assert runs.settings_of("server", pace, 20, bound_ms=40, rate=50)[0]["server_target_qps"] == 50
    assert runs.settings_of("offline", pace, 20)[0]["offline_expected_qps"] > 160
