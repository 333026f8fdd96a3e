"""Whether what LoadGen was answered is right: every answer of a run, the accuracy log's mAP, and both modes alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.contract import Target
from build.errors import DataError
from build.gate.scoring import Detected, coco_results
from build.gate.verify import Tolerance, tolerance
from perf.direct import feeds, sessions, thresholds
from perf.mlperf.child import OUTCOME, payload
from perf.mlperf.runs import ACCURACY

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from ssd_client import ModelConfig

    from build.gate.accuracy import Accuracy
    from build.gate.datasets import Pictures

    Arrays = Mapping[str, NDArray[Any]]

EXAMPLES = 3


class Reference:
    """What the served file answers to pictures in this process.

    Args:
        path: the served model.onnx, or the model.plan beside its manifest.json (runs on its GPU).
        config: the model's, as its server tells it.
        pictures: files in LoadGen's order.
        score_threshold: of LoadGen's requests.

    Raises:
        VerifyError: there is no tolerance for this runtime and precision.
    """

    def __init__(self, path: Path, config: ModelConfig, pictures: Sequence[str], score_threshold: float | None):
        self._path, self._config, self._pictures = path, config, pictures
        self._thresholds = thresholds(config, score_threshold)
        self._within = tolerance(Target(config.runtime, config.precision))
        self._known: dict[int, Arrays] = {}

    def check(self, folder: Path, result: dict[str, Any]) -> list[str]:
        """Compares every answer of a run with the served file's, within the gate's tolerance.

        Args:
            folder: of the run, with its outcome.json.
            result: of `runs.run`; `wrong` becomes how many answers are.

        Returns:
            What is wrong as one problem; empty where nothing is.

        Raises:
            EngineError: the plan cannot run here.
        """
        outcome = folder / OUTCOME  # there is none of a child that died
        answers = json.loads(outcome.read_text())["answers"] if outcome.is_file() else []
        self._learn(sorted({index for index, _, _ in answers} - self._known.keys()))
        sentences = []
        for index, data, count in answers:
            answer = outputs_of(data)
            fault = difference(answer, self._known[index], self._within)
            if fault and len(answer["detection_scores"]):  # no detections look like every picture without any
                others = (key for key, due in self._known.items() if not difference(answer, due, self._within))
                owner = next(others, None)
                fault += "" if owner is None else f"; this is picture {owner}'s answer: answers or rows were swapped"
            sentences += [f"picture {index}: {fault}"] * count if fault else []
        result["wrong"], told = len(sentences), "; ".join(sentences[:EXAMPLES])
        return [f"{len(sentences)} of {result['answered']} answers were wrong: {told}"] if sentences else []

    def _learn(self, new: Sequence[int]) -> None:
        from ssd_client.preprocess import input_array

        if not new:
            return
        loaded = [input_array(self._pictures[index], self._config.preprocessing) for index in new]
        requests = feeds([image for image, _ in loaded], self._thresholds)
        for index, outputs, (_, placement) in zip(new, self._run(requests), loaded, strict=True):
            self._known[index] = outputs_of(payload(index, outputs, 0, placement).tobytes().hex())

    def _run(self, requests: Sequence[dict[str, Any]]) -> Iterable[Arrays]:
        if self._path.suffix == ".onnx":
            return map(sessions(self._path, 1)[0], requests)
        from build.tensorrt.plan import Plan
        from build.tensorrt.plugins import PLUGIN

        engine = json.loads(self._path.with_name("manifest.json").read_bytes())["engine"]
        with Plan(self._path, engine, plugin=PLUGIN) as plan:
            return [plan(request) for request in requests]


def difference(answer: Arrays, wanted: Arrays, within: Tolerance) -> str:
    """How one picture's detections differ from the expected ones, as a piece of a sentence; empty where they do not.

    There must be as many, of the same classes, and each box and score within the tolerance. Neighbours in the order may
    change places where their scores are that close.

    Args:
        answer, wanted: detection_boxes [n,4], detection_scores [n] and detection_classes [n].
        within: how far boxes and scores may be off.
    """
    import numpy as np

    names = ("detection_boxes", "detection_scores", "detection_classes")
    (boxes, scores, classes), (box_due, score_due, class_due) = ([each[n] for n in names] for each in (answer, wanted))
    if len(scores) != len(score_due):
        return f"{len(scores)} detections instead of {len(score_due)}"
    off_box = np.abs(boxes[:, None] - box_due).max(-1)
    off_score = np.abs(scores[:, None] - score_due)
    # In this form NaN never matches.
    near = (off_box <= within.detection_boxes) & (off_score <= within.detection_scores)
    same, free = near & (classes[:, None] == class_due), set(range(len(scores)))
    for i in range(len(scores)):
        partner = next((j for j in (i, *free) if j in free and same[i, j]), None)
        if partner is None:
            off = f"its box off by {off_box[i, i]:.2g}, its score {scores[i]:.3g} instead of {score_due[i]:.3g}"
            return f"detection {i}: class {classes[i]} instead of {class_due[i]}, {off}"
        free.remove(partner)
    return ""


def outputs_of(data: str) -> dict[str, NDArray[Any]]:
    """A payload as LoadGen logs it, in hexadecimal digits → detections, with boxes in 0..1 of the picture."""
    import numpy as np

    rows = np.frombuffer(bytes.fromhex(data), np.float32).reshape(-1, 7)
    classes = rows[:, 6].astype(np.int32) - 1
    return {"detection_boxes": rows[:, [2, 1, 4, 3]], "detection_scores": rows[:, 5], "detection_classes": classes}


def logged(folder: Path) -> dict[int, str]:
    """What LoadGen's accuracy log holds: sample index → payload in hexadecimal digits, the first of each."""
    known: dict[int, str] = {}
    for entry in json.loads((folder / ACCURACY).read_text() or "[]"):
        known.setdefault(int(entry["qsl_idx"]), entry["data"])
    return known


def evaluate(folder: Path, pictures: Pictures) -> Accuracy:
    """COCO's figures of an accuracy run's log, by the project's own judge.

    Raises:
        DataError: pictures are missing from the log, or have no labels.
    """
    from build.gate import accuracy

    rows = logged(folder)
    missing = len(pictures) - len(rows)
    if missing or pictures.truth is None:
        what = f"{folder / ACCURACY} lacks {missing} of {len(pictures)} pictures"
        raise DataError(what, why="requests failed or it was ended")
    sizes = {image["id"]: (image["width"], image["height"]) for image in pictures.truth["images"]}
    detected = []
    for index, image_id in enumerate(pictures.image_ids):
        outputs = outputs_of(rows[index])
        boxes = outputs["detection_boxes"] * [*sizes[image_id], *sizes[image_id]]
        detected.append(Detected(boxes, outputs["detection_scores"], outputs["detection_classes"]))
    return accuracy.evaluate(pictures.truth, coco_results(pictures, detected))


def same_in_both(performance: Path, accuracy: Path) -> dict[str, Any]:
    """Whether a performance run was answered as the accuracy run was, bit for bit, as MLPerf's TEST01 asks.

    Returns:
        `compared`: answers that LoadGen logged in both; `different`: which pictures' differ.
    """
    first, second = logged(performance), logged(accuracy)
    both = sorted(first.keys() & second.keys())
    return {"compared": len(both), "different": [index for index in both if first[index] != second[index]]}
