"""The gate between a built model and its publishing; `invoke verify` puts what is published to it again.

It knows nothing of runtimes: a `Runner` takes inputs by name and gives outputs by name, be it a plan on a GPU, ONNX
Runtime in this process or a server. What is checked, each on its own line of the report:

- contract: shapes, types, order, padding and ranges of docs/design.md;
- repeatability: the same batch again gives the same bits;
- rows: a picture's bits do not depend on its place in the batch, nor on its neighbours and their thresholds;
- parity: against the reference's raw heads, one picture at a time, within build/gate/tolerances.json
  (build/gate/matching.py);
- mAP, where the pictures are labelled: at least [quantization] gate of what the FP32 graph has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import contract
from build.errors import VerifyError
from build.gate import datasets, matching
from build.gate.scoring import coco_results, detector
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from build.session import Arrays, Runner

    Judge = Callable[[dict[str, Any], list[dict[str, Any]]], float]

TOLERANCES = Path(__file__).with_name("tolerances.json")
PICTURES = 32
_ROWS = 8
_NEIGHBOURS = 3  # a fault that turns single bits shows with every second neighbour only
_LOWEST_THRESHOLD = 1e-6  # parity is looked at below the model's own, where that finds nothing


@dataclass(frozen=True)
class Tolerance:
    """How far outputs may be from the reference's, over all pictures.

    Each detection is paired with the reference's candidate of its class that is nearest in box and score (IoU at least
    0.5). One without a partner, and one that is missing, does not count where its score lies within the scores'
    tolerance of what decides whether it is kept: the threshold, or the last score of a full list.

    Attributes:
        num_detections: the most detections on one picture that are missing or should not be there.
        detection_boxes: the largest difference of a coordinate of a pair, in 0..1 of the image.
        detection_scores: the largest difference of the scores of a pair.
        detection_classes: the largest share among all of detections that are missing or should not be there.
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


def tolerance(target: contract.Target, path: Path = TOLERANCES) -> Tolerance:
    """The committed tolerance.

    Raises:
        VerifyError: there is none for this target, or the file is damaged.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
        row = table[target.runtime].get(target.precision)
        if row is not None and set(row) != {item.name for item in fields(Tolerance)}:
            raise ValueError(f"{target.runtime} {target.precision} has the keys {sorted(row)}")
    except (OSError, ValueError, KeyError) as error:
        raise VerifyError(f"{path}: cannot be used: {error!r}", fix="restore it from the repository") from None
    if row is None:
        known = ", ".join(table[target.runtime])
        raise VerifyError(
            f"{path.name} has no tolerance for {target.precision} on {target.runtime} (it has {known})",
            fix="measure how far it is from the reference, and add the line with the reason",
        )
    return Tolerance(**row)


def gate(
    spec: Spec,
    what: str,
    candidate: Runner,
    *,
    reference: Runner,
    heads: Runner,
    within: Tolerance,
    baseline: Runner | None = None,
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
        reference: the graph that it was built from, in ONNX Runtime as it is written.
        heads: the same graph before SSDNMS: `box_deltas` and `class_logits`.
        within: the tolerance of parity.
        baseline: the FP32 graph that mAP is measured against; None = `reference` is it.
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
    checks = [
        check_contract(spec, candidate, images[:rows]),
        check_repeatability(spec, candidate, images[:rows]),
        check_rows(spec, candidate, images[:rows]),
        check_parity(spec, candidate, heads, images, within, rows),
    ]
    if judge and pictures and pictures.truth:
        checks.append(check_accuracy(spec, candidate, baseline or reference, pictures, judge, rows))
    on = (
        f"{len(images)} pictures of {pictures.name}"
        + (", labelled by FP32's own detections" if pictures.labelled_by else "")
        if pictures
        else f"{len(images)} photographs of matplotlib's: [data] held_out names no pictures of this model's own, "
        "SO ITS ACCURACY WAS NOT MEASURED (docs/spec.md)"
    )
    return Report(what, on, tuple(checks))


def images_for(spec: Spec, cache: Path, count: int) -> tuple[NDArray[np.uint8], datasets.Pictures | None]:
    """UINT8 [n,H,W,3] of the first `count` held-out pictures, and these; photographs and None where there are none.

    Raises:
        DataError: the pictures that the spec names cannot be used.
    """
    pictures = None
    if spec.data.held_out:
        if spec.data.generator:  # it writes as many as it is asked for, and each takes its time
            few = replace(spec, data=replace(spec.data, held_out_count=min(count, spec.data.held_out_count)))
            pictures = datasets.held_out(few, cache)
        else:
            pictures = datasets.held_out(spec, cache).some(count)
    return _images(spec, pictures, count), pictures


def check_contract(spec: Spec, candidate: Runner, images: NDArray[np.uint8]) -> Check:
    """Names, shapes, types, order and padding of the outputs."""
    import numpy as np

    outputs = candidate(spec.nms.feeds(images))
    rows, most = len(images), spec.nms.max_detections
    wanted = {tensor.name: (tensor.dtype, (rows, *tensor.shape)) for tensor in spec.outputs}
    answered = {name: (str(array.dtype), array.shape) for name, array in outputs.items()}
    if answered != wanted:
        return Check("contract", False, f"it answers {answered}, not {wanted}", "compare the graph with docs/design.md")
    number, boxes, scores, classes = (outputs[name] for name in contract.OUTPUTS)
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
    first, given = _copied(candidate(spec.nms.feeds(images))), spec.nms.feeds(images)
    for _ in range(times - 1):
        different = differing(first, candidate(given))
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
    given = spec.nms.feeds(images, varied)
    first = _copied(candidate(given))
    for name, order in (("turned round", np.arange(rows)[::-1]), ("moved by one", np.roll(np.arange(rows), 1))):
        moved = candidate({key: np.ascontiguousarray(array[order]) for key, array in given.items()})
        different = differing({key: array[order] for key, array in first.items()}, moved)
        if different:
            return Check("rows", False, f"{', '.join(different)} changed when the rows were {name}", look)
    random = np.random.default_rng(1)
    for row in (0, rows - 1) * _NEIGHBOURS:
        other = {**given, contract.IMAGES: random.integers(0, 256, images.shape, dtype=np.uint8)}
        other[contract.IMAGES][row] = images[row]
        alone = candidate(other)
        different = [name for name in first if first[name][row].tobytes() != np.asarray(alone[name][row]).tobytes()]
        if different:
            return Check("rows", False, f"{', '.join(different)} of row {row} changed with its neighbours", look)
    return Check("rows", True, f"{rows} rows in 3 orders and with other neighbours, equal bits")


def check_parity(
    spec: Spec, candidate: Runner, heads: Runner, images: NDArray[np.uint8], within: Tolerance, rows: int
) -> Check:
    """Against the reference's raw heads, one picture at a time; the candidate sees it alone, then in batches."""
    threshold = spec.nms.score_threshold
    lowest = max(_LOWEST_THRESHOLD, spec.nms.lowest_score_threshold)
    wanted = before_suppression(spec, heads, images)
    best = max((float(found.scores.max(initial=0)) for found in wanted), default=0.0)
    while spec.nms.runtime_thresholds and best <= threshold > lowest:
        threshold = max(lowest, threshold / 4)  # pictures without its objects: something must be compared all the same
    if best <= threshold:
        detail = (
            f"NOT SHOWN: there is nothing to compare, since the reference detects nothing on {len(images)} pictures"
        )
        return Check(
            "parity", False, detail, "name pictures with the model's objects in them: [data] held_out in spec.toml"
        )
    batches = [
        range(start, min(start + size, len(images))) for size in {1, rows} for start in range(0, len(images), size)
    ]
    worst, lonely, total, boxes, scores, first = 0, 0, 0, 0.0, 0.0, ""
    for batch in batches:
        outputs = candidate(spec.nms.feeds(images[batch.start : batch.stop], threshold))
        for row, picture in enumerate(batch):
            answered = {name: values[row] for name, values in outputs.items()}
            differs = matching.compare(
                spec.nms, wanted[picture], answered, threshold, within.detection_boxes, within.detection_scores
            )
            worst, lonely, total = max(worst, differs.lonely), lonely + differs.lonely, total + differs.total
            boxes, scores = max(boxes, differs.boxes), max(scores, differs.scores)
            first = first or (differs.first and f"picture {picture}: {differs.first}")
    share = lonely / total if total else 0.0
    measured = Tolerance(worst, boxes, scores, share)
    beyond = [item.name for item in fields(Tolerance) if not getattr(measured, item.name) <= getattr(within, item.name)]
    figures = ", ".join(
        f"{item.name} {getattr(measured, item.name):.2g} (at most {getattr(within, item.name):.2g})"
        for item in fields(Tolerance)
    )
    lowered = "" if threshold == spec.nms.score_threshold else f" at the lower score threshold {threshold:.2g}"
    detail = f"{total} detections{lowered}; {figures}" + (f"; first: {first}" if beyond and first else "")
    look = f"beyond are {', '.join(beyond)}: " + (
        "look at suppression, thresholds and order of classes in the SSDNMS that answered"
        if lonely and "detection_boxes" not in beyond and "detection_scores" not in beyond
        else "compare the raw heads of both sides"
    )
    return Check("parity", not beyond, detail, look)


def before_suppression(spec: Spec, heads: Runner, images: Iterable[NDArray[np.uint8]]) -> list[matching.Candidates]:
    """What suppression has to choose from, for each picture alone.

    Args:
        spec: the model.
        heads: a graph before SSDNMS.
        images: UINT8 [H,W,3] each.
    """
    import numpy as np

    anchors = spec.load_anchors() if spec.nms.needs_anchors else None
    results = []
    for image in images:
        deltas, logits = (heads({contract.IMAGES: image[None]})[name][0] for name in contract.HEADS)
        own = np.zeros((len(deltas), 4), np.float32) if anchors is None else anchors
        results.append(matching.candidates(spec.nms, own, deltas, logits))
    return results


def check_accuracy(
    spec: Spec, candidate: Runner, baseline: Runner, pictures: datasets.Pictures, judge: Judge, rows: int
) -> Check:
    """mAP against that of the FP32 graph on the same labelled pictures."""
    assert pictures.truth is not None
    kept, wanted = (
        judge(pictures.truth, coco_results(pictures, detector(spec, runner, rows)(pictures.paths)))
        for runner in (candidate, baseline)
    )
    if math.isnan(kept) or math.isnan(wanted):
        return Check("mAP", False, f"it cannot be measured ({kept} against {wanted})", "label the pictures")
    least = spec.quantization.gate * wanted
    detail = f"{kept:.4f} against {wanted:.4f} of the FP32 graph (at least {least:.4f})"
    if not wanted:
        return Check("mAP", False, f"{detail}: {_NOTHING}", _COMPARE)
    return Check("mAP", kept >= least, detail, "take a higher precision, or leave sensitive layers in it")


_NOTHING = "the FP32 graph itself detects nothing of what is labelled"
_COMPARE = "compare [input], [nms] and the labels of spec.toml with how the model was trained"


def share_kept(spec: Spec, kept: float, baseline: float) -> float:
    """The share of the FP32 graph's mAP that another graph keeps.

    Raises:
        VerifyError: the FP32 graph detects nothing, so nothing can be compared with it.
    """
    if not baseline > 0:
        raise VerifyError(
            f"{spec.model.name}: FP32 has mAP {baseline:.4f} on the held-out pictures: {_NOTHING}", fix=_COMPARE
        )
    return kept / baseline


def _images(spec: Spec, pictures: datasets.Pictures | None, count: int) -> NDArray[np.uint8]:
    import numpy as np

    if pictures:
        return np.concatenate(list(datasets.arrays(pictures, spec.input, _ROWS)))
    photographs = datasets.photographs()[: min(count, _ROWS)]
    return np.stack([datasets.to_input(picture, spec.input)[0] for picture in photographs])


def _copied(outputs: Arrays) -> dict[str, NDArray[Any]]:
    """Copies: a runner may write the next answer over its memory."""
    import numpy as np

    return {name: np.array(array) for name, array in outputs.items()}


def differing(first: Arrays, second: Arrays) -> list[str]:
    """The outputs whose bits differ."""
    import numpy as np

    return [name for name in first if first[name].tobytes() != np.asarray(second[name]).tobytes()]
