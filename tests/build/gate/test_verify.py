"""The gate on a real model in ONNX Runtime: it lets the right one through, and none of the planted faults."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from build import contract, session
from build.contract import Target
from build.errors import OptionError, VerifyError
from build.gate import verify
from build.graph.attach import attach, before_nms
from build.session import runner
from build.spec import Spec, load
from tests.build import tiny_model

Outputs = dict[str, np.ndarray]
Fault = Callable[[Outputs, int], Outputs]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model.write(tmp_path_factory.mktemp("models") / "tiny")
    path.write_text(path.read_text().replace("max_detections = 5", "max_detections = 40"))  # more than it finds
    return path


@pytest.fixture(scope="module")
def spec(path: Path) -> Spec:
    return load(path)


@pytest.fixture(scope="module")
def model(spec: Spec) -> onnx.ModelProto:
    return attach(spec)


@pytest.fixture(scope="module")
def good(model: onnx.ModelProto) -> session.Runner:
    return runner(model)


def report(
    spec: Spec, model: onnx.ModelProto, candidate: session.Runner, tmp_path: Path, **options: Any
) -> verify.Report:
    written = {"reference": model, "heads": before_nms(model)}
    runners = {name: runner(graph, optimised=False) for name, graph in written.items()}
    within = verify.tolerance(Target("onnxruntime"))
    return verify.gate(spec, "tiny", candidate, **runners, within=within, cache=tmp_path, **options)


def faulty(good: session.Runner, fault: Fault) -> session.Runner:
    calls = iter(range(10**6))

    def run(feeds: Any) -> Outputs:
        return fault({name: array.copy() for name, array in good(feeds).items()}, next(calls))

    return run


def test_a_good_model_passes(spec: Spec, model: onnx.ModelProto, good: session.Runner, tmp_path: Path) -> None:
    found = report(spec, model, good, tmp_path)
    assert found.require() is found
    assert [check.name for check in found.checks] == ["contract", "repeatability", "rows", "parity"]
    assert "photographs of matplotlib" in found.pictures
    assert "ITS ACCURACY WAS NOT MEASURED" in found.pictures
    assert " 0 detections" not in str(found)  # it was looked at on something
    assert json.loads(json.dumps(found.as_dict()))["passed"] is True


def swap_rows(outputs: Outputs, call: int) -> Outputs:
    return {name: array[[1, 0, *range(2, len(array))]] if len(array) > 1 else array for name, array in outputs.items()}


def swap_at_the_end(outputs: Outputs, call: int) -> Outputs:
    return {
        name: array[[*range(len(array) - 2), -1, -2]] if len(array) > 2 else array for name, array in outputs.items()
    }


def first_row_for_all(outputs: Outputs, call: int) -> Outputs:
    return {name: np.repeat(array[:1], len(array), 0) for name, array in outputs.items()}


def perturb_score(outputs: Outputs, call: int) -> Outputs:
    outputs["detection_scores"][0, 0] += np.float32(1e-4)
    return outputs


def move_box(outputs: Outputs, call: int) -> Outputs:
    outputs["detection_boxes"][:, 0] *= np.float32(0.999)
    return outputs


def lose_the_last(outputs: Outputs, call: int) -> Outputs:
    for row, number in enumerate(outputs["num_detections"][:, 0]):
        if number > 1:
            outputs["num_detections"][row] -= 1
            outputs["detection_boxes"][row, number - 1] = outputs["detection_scores"][row, number - 1] = 0
            outputs["detection_classes"][row, number - 1] = -1
    return outputs


def other_class(outputs: Outputs, call: int) -> Outputs:
    classes = outputs["detection_classes"]
    classes[classes >= 0] = 1 - classes[classes >= 0]
    return outputs


def flicker(outputs: Outputs, call: int) -> Outputs:
    outputs["detection_scores"][:, 0] = np.nextafter(outputs["detection_scores"][:, 0], np.float32(call % 2))
    return outputs


def leak(outputs: Outputs, call: int) -> Outputs:
    """The last bit of each row's best score depends on all rows, whatever their order."""
    rows = zip(*(outputs[name] for name in ("detection_boxes", "detection_scores")), strict=True)
    bits = outputs["detection_scores"][:, :1].view(np.int32)
    bits ^= sum(zlib.crc32(boxes.tobytes() + scores.tobytes()) for boxes, scores in rows) & 1
    return outputs


def stale_padding(outputs: Outputs, call: int) -> Outputs:
    outputs["detection_classes"][outputs["detection_classes"] < 0] = 0
    return outputs


def half_scores(outputs: Outputs, call: int) -> Outputs:
    return {**outputs, "detection_scores": outputs["detection_scores"].astype(np.float16)}


def not_finite(outputs: Outputs, call: int) -> Outputs:
    outputs["detection_boxes"][0, 0, 0] = np.nan
    return outputs


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (swap_rows, "rows"),
        (swap_at_the_end, "rows"),
        (first_row_for_all, "rows"),
        (leak, "rows"),
        (perturb_score, "parity"),
        (move_box, "parity"),
        (lose_the_last, "parity"),
        (other_class, "parity"),
        (flicker, "repeatability"),
        (stale_padding, "contract"),
        (half_scores, "contract"),
        (not_finite, "contract"),
    ],
)
def test_planted_faults_fail(
    fault: Fault, check: str, spec: Spec, model: onnx.ModelProto, good: session.Runner, tmp_path: Path
) -> None:
    if fault is half_scores:  # ends at the first check: the others need the contract's types
        found = verify.Report("tiny", "noise", (verify.check_contract(spec, faulty(good, fault), noise(spec)),))
    else:
        found = report(spec, model, faulty(good, fault), tmp_path)
    assert check in {one.name for one in found.checks if not one.passed}
    with pytest.raises(
        VerifyError, match=rf"failed its gate \(.*{check}.*nothing was published[\s\S]*what to do"
    ) as caught:
        found.require()
    assert "look" in str(caught.value) or "compare" in str(caught.value)


def noise(spec: Spec, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, spec.input.height, spec.input.width, 3), dtype=np.uint8)


def test_the_tolerances_are_those_that_were_agreed() -> None:
    """Whoever loosens one changes it here, too, and says why in the commit."""
    table = json.loads(verify.TOLERANCES.read_text())
    exact, close, far = (0, 1e-5, 1e-5, 0.0), (1, 5e-3, 1e-2, 0.01), (2, 2e-2, 5e-2, 0.03)
    # A logit that falls to the next of its 127 codes moves a score by a quarter of that step, two of them by a half.
    codes = (2, 2e-2, 1.2e-1, 0.03)
    agreed = {
        "onnxruntime": {"fp32": exact, "fp16": close, "bf16": far, "int8": codes},
        "tensorrt": {
            "fp32": (0, 1e-4, 1e-4, 0.0),
            "tf32": close,
            "fp16": close,
            "bf16": far,
            "int8": codes,
            "fp8": far,
        },
    }
    assert set(table) == {"about", *agreed}
    for runtime, precisions in agreed.items():
        assert set(table[runtime]) == set(precisions) == set(contract.precisions_of(runtime))
        for precision, numbers in precisions.items():
            assert dataclasses.astuple(verify.tolerance(Target(runtime, precision))) == numbers, (runtime, precision)


def test_unknown_and_damaged_tolerances(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="precision is 'int4', but the runtime tensorrt has fp32, tf32"):
        Target("tensorrt", "int4")
    damaged = tmp_path / "tolerances.json"
    damaged.write_text('{"tensorrt": {"fp32": {}}}')
    with pytest.raises(VerifyError, match=r"no tolerance for int8 on tensorrt \(it has fp32\)"):
        verify.tolerance(Target("tensorrt", "int8"), damaged)
    damaged.write_text('{"tensorrt": {"fp32": {"detection_boxes": 1}}}')
    with pytest.raises(VerifyError, match="cannot be used"):
        verify.tolerance(Target("tensorrt"), damaged)
    with pytest.raises(VerifyError, match="cannot be used"):
        verify.tolerance(Target("tensorrt"), tmp_path / "none.json")


def labelled(path: Path, count: int = 3) -> Spec:
    """The spec with pictures of twice the input's size and labels."""
    folder = path.parent / "pictures"
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(5)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    truth = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "width": 16, "height": 16} for i in range(count)],
        "annotations": [],
        "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}],
    }
    (folder / "instances.json").write_text(json.dumps(truth))
    other = path.with_name("labelled.toml")
    other.write_text(path.read_text() + '\n[data]\nheld_out = "pictures"\n')
    return load(other)


def test_accuracy_is_judged_on_coco_results(
    path: Path, model: onnx.ModelProto, good: session.Runner, tmp_path: Path
) -> None:
    spec, seen, ids = labelled(path), [], {}

    def judge(truth: dict[str, Any], results: list[dict[str, Any]]) -> float:
        seen.append(results)
        ids.update({each["name"]: each["id"] for each in truth["categories"]})
        ids.update({each["file_name"]: each["id"] for each in truth["images"]})
        return 0.5 if len(seen) % 2 else 0.51

    found = report(spec, model, good, tmp_path, judge=judge)
    assert found.checks[-1].name == "mAP"
    assert not found.checks[-1].passed  # 0.5 is less than 0.99 × 0.51
    assert "0.5000 against 0.5100" in found.checks[-1].detail
    assert {one["category_id"] for one in seen[0]} <= {ids["cat"], ids["dog"]}
    assert {one["image_id"] for one in seen[0]} == {ids[f"{i}.png"] for i in range(3)}
    assert [one["bbox"] for one in seen[0]] == [pytest.approx(one["bbox"], abs=1e-4) for one in seen[1]]
    assert max(one["bbox"][0] + one["bbox"][2] for one in seen[0]) > 8  # in the picture's own pixels
    assert "3 pictures of" in found.pictures


def test_accuracy_passes_and_cannot_be_nan(
    path: Path, model: onnx.ModelProto, good: session.Runner, tmp_path: Path
) -> None:
    spec = labelled(path)
    assert report(spec, model, good, tmp_path, judge=lambda *_: 0.5).passed
    assert not report(spec, model, good, tmp_path, judge=lambda *_: float("nan")).passed


@pytest.mark.parametrize("thresholds", [True, False])
def test_parity_is_not_shown_by_nothing(tmp_path: Path, thresholds: bool) -> None:
    """A threshold that no score reaches: lowered where requests can bring their own, else nothing is shown."""
    path = tiny_model.write(tmp_path / "tiny", thresholds=thresholds)
    path.write_text(path.read_text().replace("score_threshold = 0.1", "score_threshold = 1.0"))
    spec = load(path)
    model = attach(spec)
    (check,) = (check for check in report(spec, model, runner(model), tmp_path).checks if check.name == "parity")
    assert check.passed is thresholds
    assert ("at the lower score threshold 0." if thresholds else "NOT SHOWN") in check.detail
    assert not check.detail.startswith("0 detections")
    if thresholds:  # what differs there is noticed there
        moved = report(spec, model, faulty(runner(model), move_box), tmp_path)
        assert "parity" in {check.name for check in moved.checks if not check.passed}
