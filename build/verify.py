"""The gate between a built model and its publishing; `invoke verify` puts what is published to it again.

It knows nothing of runtimes: a `Runner` takes inputs by name and gives outputs by name, be it a plan on a GPU, ONNX
Runtime in this process or a server. What is checked, each on its own line of the report:

- contract: shapes, types, order, padding and ranges of docs/design.md;
- repeatability: the same batch again gives the same bits;
- rows: a picture's bits do not depend on its place in the batch, nor on its neighbours and their thresholds;
- parity: against the reference, one picture at a time, within build/tolerances.json;
- mAP, where the pictures are labelled: at least [quantization] gate of what the FP32 graph has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import datasets, graph, ssd_nms
from build.errors import VerifyError
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray
    from rich.console import Console

    Arrays = Mapping[str, NDArray[Any]]
    Runner = Callable[[Arrays], Arrays]
    Judge = Callable[[dict[str, Any], list[dict[str, Any]]], float]

TOLERANCES = Path(__file__).with_name("tolerances.json")
PICTURES = 32
PAIRED_IOU = 0.5
CURVE_THRESHOLD = 0.01  # mAP wants the whole precision-recall curve
_ROWS = 8


@dataclass(frozen=True)
class Tolerance:
    """How far outputs may be from the reference's, over all pictures.

    Detections of a picture are paired by class and the best IoU of at least 0.5. One without a partner does not count
    where its score lies within the scores' tolerance of what decides whether it is kept: the threshold, or the last
    score of a full list.

    Attributes:
        num_detections: the most detections without a partner on one picture.
        detection_boxes: the largest difference of a coordinate of a pair, in 0..1 of the image.
        detection_scores: the largest difference of the scores of a pair.
        detection_classes: the largest share of detections without a partner among all.
    """

    num_detections: int
    detection_boxes: float
    detection_scores: float
    detection_classes: float


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, whether it held, the figures, and where to look if it did not."""

    name: str
    passed: bool
    detail: str
    look: str = ""

    def __str__(self) -> str:
        mark = "ok  " if self.passed else "FAIL"
        return f"{mark} {self.name}: {self.detail}" + ("" if self.passed else f"; {self.look}")


@dataclass(frozen=True)
class Report:
    """What the gate found.

    Attributes:
        what: the model, its runtime and precision.
        pictures: what it was looked at on.
        checks: in the order in which they were made.
    """

    what: str
    pictures: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For a manifest or JSON."""
        return {
            "what": self.what,
            "pictures": self.pictures,
            "passed": self.passed,
            "checks": {check.name: {"passed": check.passed, "detail": check.detail} for check in self.checks},
        }

    def __str__(self) -> str:
        return "\n".join([f"{self.what}, on {self.pictures}", *(f"  {check}" for check in self.checks)])

    def require(self, then: str = "nothing was published") -> Report:
        """Itself, if everything held.

        Args:
            then: what follows where something did not.

        Raises:
            VerifyError: something did not; says what and where to look.
        """
        if self.passed:
            return self
        failed = [check for check in self.checks if not check.passed]
        raise VerifyError(
            f"{self.what} failed its gate ({', '.join(check.name for check in failed)}); {then}:\n"
            + "\n".join(f"  {check}" for check in self.checks),
            fix="; ".join(dict.fromkeys(check.look for check in failed)),
        )


def tolerance(runtime: str, precision: str, path: Path = TOLERANCES) -> Tolerance:
    """The committed tolerance.

    Raises:
        VerifyError: there is none for this runtime and precision, or the file is damaged.
    """
    try:
        table = json.loads(path.read_text())
        found = table[runtime].get(precision)
        if found is not None and set(found) != {item.name for item in fields(Tolerance)}:
            raise ValueError(f"{runtime} {precision} has the keys {sorted(found)}")
    except (OSError, ValueError, KeyError) as error:
        raise VerifyError(f"{path}: cannot be used: {error!r}", fix="restore it from the repository") from None
    if found is None:
        known = ", ".join(table[runtime])
        raise VerifyError(
            f"{path.name} has no tolerance for {precision} on {runtime} (it has {known})",
            fix="measure how far it is from the reference, and add the line with the reason",
        )
    return Tolerance(**found)


def onnxruntime_runner(model: onnx.ModelProto, *, optimised: bool = True) -> Runner:
    """ONNX Runtime on the CPU of this process; not optimised, it runs the graph node by node as it is written."""
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return run


def gate(
    spec: Spec,
    what: str,
    candidate: Runner,
    model: onnx.ModelProto,
    within: Tolerance,
    *,
    baseline: onnx.ModelProto | None = None,
    judge: Judge | None = None,
    cache: Path,
    count: int = PICTURES,
    max_batch: int | None = None,
) -> Report:
    """Puts a built model to the gate.

    Args:
        spec: of the model; its [data] held_out names the pictures.
        what: the model, its runtime and precision, for the report.
        candidate: what was built.
        model: the graph that it was built from: the reference, run by ONNX Runtime as it is written.
        within: the tolerance of parity.
        baseline: the FP32 graph that mAP is measured against; None = `model` is it.
        judge: mAP of COCO detections against COCO ground truth; None = mAP is not looked at.
        cache: where a generator of pictures writes them.
        count: how many pictures.
        max_batch: the largest batch that the candidate is fast enough to be looked at with; None = 8.

    Returns:
        The report; `require` raises if something did not hold.

    Raises:
        DataError: the pictures that the spec names cannot be used.
    """
    images, pictures = images_for(spec, cache, count)
    rows = min(max_batch or _ROWS, spec.serving.max_batch_size, len(images))
    reference = onnxruntime_runner(model, optimised=False)
    checks = [
        check_contract(spec, candidate, images[:rows]),
        check_repeatability(spec, candidate, images[:rows]),
        check_rows(spec, candidate, images[:rows]),
        check_parity(spec, candidate, reference, images, within, rows),
    ]
    if judge and pictures and pictures.truth:
        against = onnxruntime_runner(baseline) if baseline is not None else reference
        checks.append(check_accuracy(spec, candidate, against, pictures, judge, rows))
    on = (
        f"{len(images)} pictures of {pictures.name}"
        if pictures
        else f"{len(images)} pictures of noise ([data] held_out names none)"
    )
    return Report(what, on, tuple(checks))


def images_for(spec: Spec, cache: Path, count: int) -> tuple[NDArray[np.uint8], datasets.Pictures | None]:
    """UINT8 [n,H,W,3] of the first `count` held-out pictures, with these; noise and None where the spec names none.

    Raises:
        DataError: the pictures that the spec names cannot be used.
    """
    pictures = None
    if spec.data.held_out:
        few = replace(spec, data=replace(spec.data, held_out_count=min(count, spec.data.held_out_count)))
        pictures = datasets.held_out(few, cache)
    return _images(spec, pictures, count), pictures


def check_contract(spec: Spec, candidate: Runner, images: NDArray[np.uint8]) -> Check:
    """Names, shapes, types, order and padding of the outputs."""
    import numpy as np

    outputs = candidate(feeds(spec, images))
    rows, most = len(images), spec.nms.max_detections
    wanted = dict(
        zip(
            ssd_nms.OUTPUTS,
            (("int32", (rows, 1)), ("float32", (rows, most, 4)), ("float32", (rows, most)), ("int32", (rows, most))),
            strict=True,
        )
    )
    found = {name: (str(array.dtype), array.shape) for name, array in outputs.items()}
    if found != wanted:
        return Check("contract", False, f"it answers {found}, not {wanted}", "compare the graph with docs/design.md")
    number, boxes, scores, classes = (outputs[name] for name in ssd_nms.OUTPUTS)
    kept = np.arange(most) < number
    faults = {
        "num_detections beyond K": ((number < 0) | (number > most)).any(),
        "padding that is not zero": boxes[~kept].any() or scores[~kept].any() or (classes[~kept] != -1).any(),
        "classes beyond labels.txt": (classes[kept] < 0).any() or (classes[kept] >= len(spec.labels)).any(),
        "scores out of order": (np.diff(np.where(kept, scores, 0), axis=1) > 0).any(),
        "scores at or below the threshold": (scores[kept] <= np.float32(spec.nms.score_threshold)).any(),
        "values that are not finite": not (np.isfinite(boxes).all() and np.isfinite(scores).all()),
    }
    if spec.nms.clip_boxes:
        faults["boxes beyond the image"] = (boxes < 0).any() or (boxes > 1).any()
    bad = [fault for fault, there in faults.items() if there]
    detail = ", ".join(bad) or f"{int(number.sum())} detections on {rows} pictures in order"
    return Check("contract", not bad, detail, "look at the SSDNMS node and its plugin (docs/design.md, SSDNMS)")


def check_repeatability(spec: Spec, candidate: Runner, images: NDArray[np.uint8], times: int = 3) -> Check:
    """The same batch gives the same bits."""
    first, given = _copied(candidate(feeds(spec, images))), feeds(spec, images)
    for _ in range(times - 1):
        different = _different(first, candidate(given))
        if different:
            detail = f"{', '.join(different)} changed when the same batch ran again"
            return Check("repeatability", False, detail, "look for atomics, uninitialised memory or a race")
    return Check("repeatability", True, f"{times} runs, equal bits")


def check_rows(spec: Spec, candidate: Runner, images: NDArray[np.uint8]) -> Check:
    """A picture's bits depend neither on its place in the batch nor on its neighbours; thresholds travel with it."""
    import numpy as np

    look = "one row of a batch leaks into another: look at the plugin's offsets, and at TensorRT issues 4813 and 4853"
    rows = len(images)
    if rows == 1:
        return Check("rows", True, "nothing to compare: the largest batch is 1")
    varied = np.linspace(spec.nms.score_threshold, min(1.0, spec.nms.score_threshold + 0.3), rows)
    given = feeds(spec, images, varied)
    first = _copied(candidate(given))
    for name, order in (("turned round", np.arange(rows)[::-1]), ("moved by one", np.roll(np.arange(rows), 1))):
        moved = candidate({key: np.ascontiguousarray(array[order]) for key, array in given.items()})
        different = _different({key: array[order] for key, array in first.items()}, moved)
        if different:
            return Check("rows", False, f"{', '.join(different)} changed when the rows were {name}", look)
    random = np.random.default_rng(1)
    for row in (0, rows - 1):
        other = {**given, graph.IMAGES: random.integers(0, 256, images.shape, dtype=np.uint8)}
        other[graph.IMAGES][row] = images[row]
        alone = candidate(other)
        different = [name for name in first if first[name][row].tobytes() != np.asarray(alone[name][row]).tobytes()]
        if different:
            return Check("rows", False, f"{', '.join(different)} of row {row} changed with its neighbours", look)
    return Check("rows", True, f"{rows} rows in 3 orders and with other neighbours, equal bits")


def check_parity(
    spec: Spec, candidate: Runner, reference: Runner, images: NDArray[np.uint8], within: Tolerance, rows: int
) -> Check:
    """Against the reference, which sees one picture at a time; the candidate sees it alone, then in batches."""
    wanted = [reference(feeds(spec, images[i : i + 1])) for i in range(len(images))]
    batches = [
        range(start, min(start + size, len(images))) for size in {1, rows} for start in range(0, len(images), size)
    ]
    worst, lonely, total, boxes, scores = 0, 0, 0, 0.0, 0.0
    for batch in batches:
        outputs = candidate(feeds(spec, images[batch.start : batch.stop]))
        for row, picture in enumerate(batch):
            pairs = _pair(
                spec, {k: v[row] for k, v in outputs.items()}, {k: v[0] for k, v in wanted[picture].items()}, within
            )
            worst, lonely, total = max(worst, pairs.lonely), lonely + pairs.lonely, total + pairs.total
            boxes, scores = max(boxes, pairs.boxes), max(scores, pairs.scores)
    share = lonely / total if total else 0.0
    found = Tolerance(worst, boxes, scores, share)
    beyond = [item.name for item in fields(Tolerance) if not getattr(found, item.name) <= getattr(within, item.name)]
    figures = ", ".join(
        f"{item.name} {getattr(found, item.name):.2g} (at most {getattr(within, item.name):.2g})"
        for item in fields(Tolerance)
    )
    detail = f"{total} detections; {figures}"
    return Check("parity", not beyond, detail, f"compare the raw heads of both sides; beyond are {', '.join(beyond)}")


def check_accuracy(
    spec: Spec, candidate: Runner, baseline: Runner, pictures: datasets.Pictures, judge: Judge, rows: int
) -> Check:
    """mAP against that of the FP32 graph on the same labelled pictures."""
    assert pictures.truth is not None
    found, wanted = (judge(pictures.truth, coco(spec, runner, pictures, rows)) for runner in (candidate, baseline))
    least = spec.quantization.gate * wanted
    if math.isnan(found) or math.isnan(wanted):
        return Check("mAP", False, f"it cannot be measured ({found} against {wanted})", "label the pictures")
    detail = f"{found:.4f} against {wanted:.4f} of the FP32 graph (at least {least:.4f})"
    if not wanted:
        detail += ": the FP32 graph itself finds nothing of what is labelled"
    return Check("mAP", found >= least, detail, "take a higher precision, or leave sensitive layers in it")


def coco(spec: Spec, runner: Runner, pictures: datasets.Pictures, rows: int) -> list[dict[str, Any]]:
    """COCO results of labelled pictures, in their own pixels.

    Raises:
        DataError: a picture cannot be read.
    """
    import numpy as np

    results = []
    for start in range(0, len(pictures), rows):
        part = range(start, min(start + rows, len(pictures)))
        prepared = [datasets.to_input(datasets.open_picture(pictures.paths[i]), spec.input) for i in part]
        images = np.stack([image for image, _ in prepared])
        outputs = runner(feeds(spec, images, np.full(len(part), CURVE_THRESHOLD)))
        number, boxes, scores, classes = (outputs[name] for name in ssd_nms.OUTPUTS)
        for row, picture in enumerate(part):
            scale, offset = prepared[row][1]
            for i in range(int(number[row, 0])):
                corners = boxes[row, i].astype(np.float64).reshape(2, 2) * scale + offset
                (x1, y1), (x2, y2) = corners.tolist()
                results.append(
                    {
                        "image_id": pictures.image_ids[picture],
                        "category_id": pictures.category_ids[int(classes[row, i])],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "score": float(scores[row, i]),
                    }
                )
    return results


def feeds(spec: Spec, images: NDArray[np.uint8], scores: NDArray[Any] | None = None) -> dict[str, NDArray[Any]]:
    """The inputs for pictures, with the spec's thresholds, or one score threshold for each, where they are inputs."""
    import numpy as np

    given: dict[str, NDArray[Any]] = {graph.IMAGES: images}
    if spec.nms.runtime_thresholds:
        shape = (len(images), 1)
        score = np.full(len(images), spec.nms.score_threshold) if scores is None else scores
        given["score_threshold"] = score.astype(np.float32).reshape(shape)
        given["iou_threshold"] = np.full(shape, spec.nms.iou_threshold, np.float32)
    return given


@dataclass(frozen=True)
class _Pairs:
    """How two lists of detections of one picture differ."""

    lonely: int
    total: int
    boxes: float
    scores: float


def _pair(spec: Spec, found: Arrays, wanted: Arrays, within: Tolerance) -> _Pairs:
    import numpy as np

    sides = []
    for outputs in (found, wanted):
        number = int(outputs["num_detections"][0])
        sides.append([outputs[name][:number].astype(np.float64) for name in ssd_nms.OUTPUTS[1:]])
    (boxes, scores, classes), (boxes_wanted, scores_wanted, classes_wanted) = sides
    overlaps = _ious(boxes, boxes_wanted) * (classes[:, None] == classes_wanted)
    partner: dict[int, int] = {}
    for i in range(len(boxes)):
        free = [j for j in range(len(boxes_wanted)) if j not in partner.values() and overlaps[i, j] >= PAIRED_IOU]
        if free:
            partner[i] = max(free, key=lambda j: overlaps[i, j])
    lonely = 0
    for scores_here, paired in ((scores, set(partner)), (scores_wanted, set(partner.values()))):
        full = len(scores_here) == spec.nms.max_detections or len(scores_wanted) == spec.nms.max_detections
        ends = [side[-1] for side in (scores, scores_wanted) if full and len(side)]
        border = max([spec.nms.score_threshold, *ends]) + within.detection_scores
        lonely += sum(1 for i, score in enumerate(scores_here) if i not in paired and score > border)
    ours, theirs = list(partner), list(partner.values())
    return _Pairs(
        lonely,
        len(boxes_wanted) + lonely,
        float(np.abs(boxes[ours] - boxes_wanted[theirs]).max(initial=0)),
        float(np.abs(scores[ours] - scores_wanted[theirs]).max(initial=0)),
    )


def _ious(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """[n,m] of boxes [n,4] and [m,4]; equal boxes without area count as the same."""
    import numpy as np

    a, b = first[:, None], second[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inside = np.prod(np.maximum(sides, 0), -1)
    union = np.prod(a[..., 2:] - a[..., :2], -1) + np.prod(b[..., 2:] - b[..., :2], -1) - inside
    ious = np.divide(inside, union, out=np.zeros_like(inside), where=union > 0)
    return np.asarray(np.where((np.abs(a - b) < 1e-6).all(-1), 1.0, ious))


def _images(spec: Spec, pictures: datasets.Pictures | None, count: int) -> NDArray[np.uint8]:
    import numpy as np

    if pictures:
        return np.concatenate(list(datasets.arrays(pictures, spec.input, _ROWS)))
    size = (min(count, _ROWS), spec.input.height, spec.input.width, 3)
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)


def _copied(outputs: Arrays) -> dict[str, NDArray[Any]]:
    """Copies: a runner may write the next answer over its memory."""
    import numpy as np

    return {name: np.array(array) for name, array in outputs.items()}


def _different(first: Arrays, second: Arrays) -> list[str]:
    """The outputs whose bits differ."""
    import numpy as np

    return [name for name in first if first[name].tobytes() != np.asarray(second[name]).tobytes()]


def show(report: Report, console: Console) -> None:
    """Prints a report."""
    console.print(str(report), markup=False, highlight=False)
