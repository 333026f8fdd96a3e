"""Checked answers on servers that are well, that lie and that die."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ssd_client import ModelConfig, SSDClient
from ssd_client.preprocess import input_array

from build.contract import Target
from build.errors import ServeError
from build.gate.verify import tolerance
from build.serve import TritonServer
from models.shapes.scenes import scene
from perf import answers
from perf.analyzer import run, write_input
from perf.answers import AnswerCheck, Expected, difference, expected_answers
from perf.load import Load, Point
from tests.perf import faulty

WITHIN = tolerance(Target("onnxruntime"))

# -- one answer --------------------------------------------------------------------------------------------------------


def answer(number: int, seed: int = 0, most: int = 6) -> dict[str, NDArray[Any]]:
    """Outputs of one picture with `number` detections."""
    rng = np.random.default_rng(seed)
    kept = np.arange(most) < number
    return {
        "num_detections": np.array([number], np.int32),
        "detection_boxes": np.where(kept[:, None], rng.random((most, 4)), 0).astype(np.float32),
        "detection_scores": np.where(kept, np.sort(rng.random(most))[::-1], 0).astype(np.float32),
        "detection_classes": np.where(kept, rng.integers(0, 3, most), -1).astype(np.int32),
    }


def test_the_same_answer_has_no_difference() -> None:
    assert difference(answer(4), answer(4), WITHIN) == ""
    assert difference(answer(0), answer(0, seed=1), WITHIN) == ""
    assert difference(answer(6), answer(6), WITHIN) == ""


def test_what_is_within_the_tolerance_is_no_difference() -> None:
    given = answer(4)
    given["detection_boxes"][:4] += 0.9 * WITHIN.detection_boxes
    given["detection_scores"][:4] -= 0.9 * WITHIN.detection_scores
    assert difference(given, answer(4), WITHIN) == ""


def test_scores_that_are_as_good_as_equal_may_change_places() -> None:
    wanted = answer(4)
    wanted["detection_scores"][1:3] = 0.5
    given = {name: array.copy() for name, array in wanted.items()}
    for name in ("detection_boxes", "detection_classes"):
        given[name][[1, 2]] = given[name][[2, 1]]
    assert difference(given, wanted, WITHIN) == ""
    wanted["detection_scores"][1] = 0.6
    given["detection_scores"][1] = 0.6
    assert difference(given, wanted, WITHIN) != ""


FAULTS = {
    "detection_boxes": (0.21, r"box 1 is off by 0\.21"),
    "detection_scores": (-1e-3, r"score 1 is 0\.\d+ instead of 0\.\d+"),
    "detection_classes": (1, r"detection 1 is of class \d instead of \d"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_wrong_value(name: str) -> None:
    change, sentence = FAULTS[name]
    given = answer(4)
    given[name][1] += np.asarray(change, given[name].dtype)
    text = difference(given, answer(4), WITHIN)
    assert re.fullmatch(sentence, text), text


def test_nan_is_wrong() -> None:
    for name in ("detection_boxes", "detection_scores"):
        given = answer(4)
        given[name][0] = np.nan
        assert "0 is" in difference(given, answer(4), WITHIN)


def test_two_boxes_cannot_stand_for_one() -> None:
    given = answer(2)
    for name in ("detection_boxes", "detection_scores", "detection_classes"):
        given[name][1] = given[name][0]
    assert difference(given, answer(2), WITHIN)


def test_another_number_and_leftovers() -> None:
    assert difference(answer(2), answer(5), WITHIN) == "2 detections instead of 5"
    given = answer(3)
    given["detection_scores"][4] = 0.1
    assert difference(given, answer(3), WITHIN) == "what follows its 3 detections is not empty"


# -- under load --------------------------------------------------------------------------------------------------------

FAULTY = {"swaps": faulty.SWAP}


def copy_model(repository: Path, target: Path, name: str, fault: str) -> None:
    """`shapes` under another name, with `fault` in its backend."""
    shutil.copytree(repository / "shapes", target / name)
    for path in (target / name).rglob("config.pbtxt"):
        path.write_text(path.read_text().replace('name: "shapes"', f'name: "{name}"', 1))
    faulty.spoil(target / name, fault)


@pytest.fixture(scope="module")
def faulty_server(python_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("faulty")
    for name, fault in FAULTY.items():
        copy_model(python_repository, folder, name, fault)
    with TritonServer(folder) as server:
        yield server


Known = tuple[list[NDArray[np.uint8]], Expected, Path]


@pytest.fixture(scope="module")
def known(triton_server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Known:
    """Eight pictures, what the published model says of them, and perf_analyzer's input of the same pictures."""
    with SSDClient(triton_server.grpc_url, model="shapes") as client:
        config = client.model_config()
    images = [input_array(scene("held_out", index).image, config.preprocessing)[0] for index in range(8)]
    expected = expected_answers(triton_server.repository / "shapes" / "1", config, images)
    values = {"score_threshold": config.score_threshold, "iou_threshold": config.iou_threshold}
    return images, expected, write_input(tmp_path_factory.mktemp("load") / "input.json", images, values)


def every_latency(url: str, model: str, data: Path, seconds: float) -> Point:
    """A point that knows every request, which perf_analyzer 2.51 now and then fails to write out."""
    for _ in range(3):
        point = run(url, model, data, Load(concurrency=2, shared_memory="system"), seconds=seconds, retries=0)
        if point.latencies_ms:
            return point
    raise AssertionError("three times no latencies")


@pytest.mark.triton
def test_expected_answers_are_those_of_the_pictures(known: Known) -> None:
    _, expected, _ = known
    assert expected.within == WITHIN
    assert expected.max_batch_size == 32
    assert len(expected.rows) == 8
    assert sum(int(row["num_detections"][0]) for row in expected.rows) >= 8
    for i, row in enumerate(expected.rows):
        assert [bool(difference(row, other, WITHIN)) for other in expected.rows] == [k != i for k in range(8)]


@pytest.mark.triton
@pytest.mark.parametrize("shared_memory", [None, "system"])
def test_a_healthy_server_under_load(triton_server: TritonServer, known: Known, shared_memory: Any) -> None:
    images, expected, data = known
    url = triton_server.grpc_url
    with AnswerCheck(url, "shapes", images, expected, rate=20, clients=20, shared_memory=shared_memory) as check:
        point = every_latency(url, "shapes", data, 1.5)
    result = check.result
    assert result["checked"] >= 10
    assert result == {"checked": result["checked"], "wrong": 0, "dropped": 0, "late": 0, "examples": []}
    assert len(point.latencies_ms) >= 20


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_swapped_rows_are_found_and_named(faulty_server: TritonServer, known: Known, protocol: str) -> None:
    images, expected, _ = known
    url = faulty_server.grpc_url if protocol == "grpc" else faulty_server.http_url
    with AnswerCheck(url, "swaps", images, expected, rate=50, clients=100, protocol=protocol) as check:  # type: ignore[arg-type]
        time.sleep(1)
    result = check.result
    assert result["wrong"] > 0
    assert result["dropped"] == 0
    # Rows 1 and 2 of every batch of 4 are swapped, 3 and 4 are not, and a single picture cannot be.
    assert result["wrong"] <= 0.5 * result["checked"]
    assert len(result["examples"]) == min(result["wrong"], answers.EXAMPLES)
    for k, example in enumerate(result["examples"]):
        mine, others = k % 2 + 1, 2 - k % 2
        assert example.startswith(f"picture {mine} of a batch of 4: "), example
        assert example.endswith(f"looks like picture {others}'s answer: rows were swapped"), example


@pytest.mark.triton
def test_a_server_that_hangs_and_dies(repository: Path, known: Known) -> None:
    images, expected, _ = known
    with TritonServer(repository) as server:
        asked = AnswerCheck(server.grpc_url, "shapes", images, expected, rate=20, timeout=1, clients=100)
        begun = time.monotonic()
        with asked as check:
            time.sleep(0.5)
            os.kill(server.pid, signal.SIGSTOP)
            time.sleep(1.5)
            os.kill(server.pid, signal.SIGKILL)
            time.sleep(0.5)
        assert time.monotonic() - begun < 5
    result = check.result
    assert result["checked"] > 0
    assert result["wrong"] == 0
    assert result["dropped"] >= 3
    assert any("pictures without an answer: no answer from" in example for example in result["examples"])
    assert any("pictures without an answer: no server answers at" in example for example in result["examples"])


def fake_known(count: int = 4) -> tuple[list[NDArray[np.uint8]], Expected]:
    images = [np.full((2, 2, 3), i, np.uint8) for i in range(count)]
    return images, Expected(tuple(answer(3, seed=i) for i in range(count)), WITHIN, 8)


class FakeClient:
    """Answers picture i with answer(3, seed=i), but for what a test changes."""

    seconds = 0.0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    async def model_config(self) -> None:
        pass

    async def infer(self, batch: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        rows = [answer(3, seed=self.seed(int(image[0, 0, 0]))) for image in batch]
        await answers.asyncio.sleep(self.seconds)
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def seed(self, picture: int) -> int:
        return picture

    async def close(self) -> None:
        pass


def ask(monkeypatch: pytest.MonkeyPatch, client: type[FakeClient], seconds: float = 0.3, **options: Any) -> Any:
    monkeypatch.setattr("ssd_client.AsyncSSDClient", client)
    with AnswerCheck("url", "model", *fake_known(), **{"rate": 100, "clients": 100, **options}) as check:
        time.sleep(seconds)
    return check.result


def test_late_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FakeClient):
        seconds = 0.02

    assert ask(monkeypatch, Slow)["late"] == 0
    assert ask(monkeypatch, Slow, late_ms=1000)["late"] == 0
    result = ask(monkeypatch, Slow, late_ms=10)
    assert 0 < result["late"] <= result["checked"] / 5 + 1  # singles alone
    assert result["wrong"] == 0


def test_the_answer_to_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixed(FakeClient):
        def seed(self, picture: int) -> int:
            return (picture + 1) % 4

    result = ask(monkeypatch, Mixed, batch_size=1)
    assert result["wrong"] == result["checked"] > 0
    assert result["examples"][0].endswith("looks like the answer to another request")
    assert len(result["examples"]) <= answers.EXAMPLES


def test_it_asks_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FakeClient):
        seconds = 0.05

    result = ask(monkeypatch, Slow, seconds=0.6, clients=1)  # 50 ms in every 1 s
    assert result["checked"] == 4


def test_a_request_without_an_end_ends_the_block_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(FakeClient):
        seconds = 1000

    monkeypatch.setattr(answers, "GRACE", 0.2)
    begun = time.monotonic()
    result = ask(monkeypatch, Hanging, timeout=0.1)
    assert time.monotonic() - begun < 3
    assert result["dropped"] == 1
    assert "no end of the request" in result["examples"][0]
    assert "checked answers" not in [thread.name for thread in threading.enumerate()]


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    images, expected = fake_known()
    with AnswerCheck(f"127.0.0.1:{port}", "shapes", images, expected, rate=20, clients=100) as check:
        time.sleep(0.5)
    assert check.result["dropped"] > 4
    assert check.result["checked"] == 0
    assert len(check.result["examples"]) >= 1
    assert "no server answers" in check.result["examples"][0]


CONFIG = ModelConfig(
    name="m",
    max_batch_size=8,
    input_width=2,
    input_height=2,
    color_order="RGB",
    resize="stretch",
    resample="bilinear",
    pad_value=0,
    labels=("a",),
    score_threshold=0.25,
    iou_threshold=0.45,
    runtime_thresholds=True,
    max_detections=6,
    precision="fp16",
    runtime="tensorrt",
    manifest_sha256="",
)


def test_expected_answers_of_a_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class FakePlan:
        def __init__(self, path: Path, engine: dict[str, Any], plugin: Path) -> None:
            assert (path.name, engine, plugin.name) == ("model.plan", {"tensorrt": "10.9"}, "libssd_nms.so")

        def __enter__(self) -> FakePlan:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __call__(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            assert inputs["score_threshold"].tolist() == [[0.25]]
            return {name: array[None] for name, array in answer(int(inputs["images"][0, 0, 0, 0])).items()}

    monkeypatch.setattr("build.tensorrt.plan.Plan", FakePlan)
    (tmp_path / "model.plan").touch()
    (tmp_path / "manifest.json").write_text('{"engine": {"tensorrt": "10.9"}}')
    expected = expected_answers(tmp_path, CONFIG, fake_known()[0])
    assert [int(row["num_detections"][0]) for row in expected.rows] == [0, 1, 2, 3]
    assert expected.within == tolerance(Target("tensorrt", "fp16"))


def test_nothing_to_compare_with(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"neither model\.onnx nor model\.plan"):
        expected_answers(tmp_path, CONFIG, fake_known()[0])
