"""The original with its own post-processing beside the imported model, on the same pictures.

Where the file carries its post-processing, ONNX Runtime runs it as it is. Every detection of one side must have its
partner on the other: the class, IoU 0.9 and the score within 0.001, away from the threshold and from the end of a full
list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import GraphError, ImportModelError
from build.gate.matching import ious
from build.gate.scoring import Detected
from build.graph.attach import attach
from build.session import runner
from build.sources.decoding import CORNERS, to_corners
from build.sources.foreign import Foreign
from build.sources.reading import IN_PIXELS
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray
    from PIL import Image

PAIRED_IOU = 0.9
SCORES = 1e-3
SHOWN = 0.3
# Names of PriorBox's attributes as exporters write them → as Caffe has them.
_CAFFE = {"min_sizes": "min_size", "max_sizes": "max_size", "aspect_ratios": "aspect_ratio", "variances": "variance"}

Original = Callable[["NDArray[np.uint8]"], Detected]  # UINT8 [H,W,3] at the input's size → boxes in 0..1


@dataclass(frozen=True)
class Proof:
    """What a comparison showed.

    Attributes:
        proven: whether both sides have the same detections, of which there were some.
        how: what ran as the original, or why nothing could.
        pictures: how many were compared.
        detections: of the original, over all pictures.
        boxes, scores: the largest difference of a pair; boxes in 0..1.
    """

    proven: bool
    how: str
    pictures: int = 0
    detections: int = 0
    boxes: float = 0.0
    scores: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For import.json."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if not self.proven:
            return f"NOT PROVEN against the original: {self.how}"
        return (
            f"proven against the original ({self.how}): {self.detections} detections on {self.pictures} pictures, "
            f"each with its partner; boxes differ by at most {self.boxes:.1e}, scores by {self.scores:.1e}"
        )


def prove(foreign: Foreign, spec: Spec, pictures: Sequence[Image.Image], drawing: Path | None = None) -> Proof:
    """Compares the imported model with the original.

    Args:
        foreign: the file and what it was read as.
        spec: of the imported model.
        pictures: RGB, of any size.
        drawing: gets both sides, drawn; None = nothing is drawn.

    Raises:
        ImportModelError: they differ; says how, and what that is a sign of.
    """
    original, how = _original(foreign, spec)
    if original is None:
        return Proof(False, how)
    proof = _compare(foreign, spec, pictures, original, how, drawing)
    if proof.detections or "selected" not in foreign.reading.selection:
        return proof
    # Nothing reached the graph's own threshold, as with weights that were not trained: both again without one.
    bare = dataclasses.replace(spec, nms=dataclasses.replace(spec.nms, score_threshold=0.0, lowest_score_threshold=0.0))
    original, _ = _original(foreign, bare)
    assert original is not None
    try:
        return _compare(foreign, bare, pictures, original, f"{how}, with its score threshold at 0", drawing)
    except ImportModelError as error:
        return dataclasses.replace(proof, how=f"{proof.how}; with its score threshold at 0, {error.what}")


def _compare(
    foreign: Foreign, spec: Spec, pictures: Sequence[Image.Image], original: Original, how: str, drawing: Path | None
) -> Proof:
    """`prove` with an original that runs."""
    import numpy as np
    from ssd_client.preprocess import preprocess

    imported = _imported(spec)
    total, boxes, scores = 0, 0.0, 0.0
    sheets = []
    for picture in pictures:
        pixels = np.empty((spec.input.height, spec.input.width, 3), np.uint8)
        preprocess(picture, spec.input.preprocessing, pixels)
        theirs, ours = original(pixels), imported(pixels)
        sheets.append((pixels, theirs, ours))
        pairs, lonely = _pairs(spec, theirs, ours)
        if lonely:
            raise ImportModelError(
                f"{foreign.path}: the imported model does not detect what the original does: {lonely}",
                why=_symptom(spec, theirs, ours),
                fix="say how the file is to be read: --box-order, --boxes-are, --scores-are, --anchors",
            )
        total += len(theirs.boxes)
        for i, j in pairs:
            boxes = max(boxes, float(np.abs(np.clip(theirs.boxes[i], 0, 1) - np.clip(ours.boxes[j], 0, 1)).max()))
            scores = max(scores, float(abs(theirs.scores[i] - ours.scores[j])))
    if drawing is not None:
        draw(drawing, spec, sheets)
    if not total:
        return Proof(
            False, f"{how} detected nothing on {len(pictures)} pictures, so nothing could be compared", len(pictures)
        )
    return Proof(True, how, len(pictures), total, boxes, scores)


def _imported(spec: Spec) -> Original:
    run = runner(attach(spec))

    def detect(pixels: NDArray[np.uint8]) -> Detected:
        outputs = run(spec.nms.feeds(pixels[None]))
        count = int(outputs["num_detections"][0, 0])
        return Detected(
            *(outputs[name][0, :count] for name in ("detection_boxes", "detection_scores", "detection_classes"))
        )

    return detect


def _original(foreign: Foreign, spec: Spec) -> tuple[Original | None, str]:
    """The original as a detector, and what runs it, or why nothing does."""
    import onnx

    names = foreign.reading.selection
    if "detection_out" in names:
        return _opencv(foreign, spec)
    if not names:
        return None, "the file has no post-processing of its own that ONNX Runtime can run"
    model = onnx.ModelProto()
    model.CopyFrom(foreign.original)
    if "selected" in names and not spec.nms.score_threshold:
        _without_threshold(model, names["selected"])
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names.values() if name not in present)
    try:
        run = runner(model)
    except GraphError as error:
        return None, error.what
    if "rows" in names:
        return lambda pixels: _finished(foreign, spec, run, pixels), "its own TopK in ONNX Runtime"
    if "detection_boxes" in names:
        return lambda pixels: _tensorflow(foreign, spec, run, pixels), "its own post-processing in ONNX Runtime"
    return lambda pixels: _selected(foreign, spec, run, pixels), "its own NonMaxSuppression in ONNX Runtime"


def _opencv(foreign: Foreign, spec: Spec) -> tuple[Original | None, str]:
    """Caffe's DetectionOutput, which ONNX Runtime does not have, in OpenCV's dnn module, with its own PriorBox."""
    try:
        import cv2
    except ImportError:
        return (
            None,
            "ONNX Runtime has no DetectionOutput; OpenCV has one: "
            ".venv/bin/python -m pip install opencv-python-headless, and again",
        )
    import numpy as np
    import onnx
    from onnx import helper

    model = onnx.ModelProto()
    model.CopyFrom(foreign.original)
    for node in model.graph.node:
        if node.op_type == "PriorBox":  # OpenCV wants the picture as a second input, and Caffe's names
            attributes = {_CAFFE.get(a.name, a.name): helper.get_attribute_value(a) for a in node.attribute}
            steps = attributes.pop("steps", None)
            attributes.pop("img_sizes", None)
            if steps and steps[0]:
                attributes["step"] = float(steps[0])
            inputs = list(node.input) if len(node.input) > 1 else [node.input[0], foreign.front.names[1]]
            node.CopyFrom(helper.make_node("PriorBox", inputs, node.output, name=node.name, **attributes))
    try:
        network = cv2.dnn.readNetFromONNX(np.frombuffer(model.SerializeToString(), np.uint8))
    except cv2.error as error:
        return None, f"OpenCV {cv2.__version__} cannot read the file: {str(error).strip().splitlines()[-1]}"

    def detect(pixels: NDArray[np.uint8]) -> Detected:
        network.setInput(foreign.front.feeds(_normalised(spec, pixels))[foreign.front.names[0]])
        rows = network.forward().reshape(-1, 7)
        rows = rows[rows[:, 2] > spec.nms.score_threshold]
        labels = rows[:, 1].astype(np.int32) - (spec.nms.background_class == 0)
        return Detected(rows[:, 3:7], rows[:, 2], labels)

    return detect, f"OpenCV {cv2.__version__}'s DetectionOutput and PriorBox"


def _normalised(spec: Spec, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """UINT8 [H,W,3] as the original wants it: FP32 [1,H,W,3], in its channel order."""
    import numpy as np

    values = pixels[None].astype(np.float32)
    values = values[..., ::-1] if spec.input.color_order == "BGR" else values
    return np.asarray((values - np.array(spec.input.mean, np.float32)) / np.array(spec.input.std, np.float32))


def _tensorflow(foreign: Foreign, spec: Spec, run: Callable[[Any], Any], pixels: NDArray[np.uint8]) -> Detected:
    import numpy as np

    names, front = foreign.reading.selection, foreign.front
    answers = run({front.names[1]: pixels[None].astype(front.picture.dtype.numpy())})  # type: ignore[union-attr]
    count = int(answers[names["num_detections"]][0])
    boxes = answers[names["detection_boxes"]][0, :count][:, [1, 0, 3, 2]]
    scores = answers[names["detection_scores"]][0, :count]
    classes = answers[names["detection_classes"]][0, :count] - 1 if "detection_classes" in names else np.zeros(count)
    classes = classes - foreign.reading.sees_background
    kept = (scores > spec.nms.score_threshold) & (classes >= 0)
    return Detected(boxes[kept], scores[kept], classes[kept].astype(np.int32))


def _selected(foreign: Foreign, spec: Spec, run: Callable[[Any], Any], pixels: NDArray[np.uint8]) -> Detected:
    import numpy as np

    names, background = foreign.reading.selection, spec.nms.background_class
    answers = run(foreign.front.feeds(_normalised(spec, pixels)))
    rows = answers[names["selected"]]
    boxes, scores = answers[names["boxes"]], answers[names["scores"]]
    whole = scores.shape[1] == spec.classes  # else the export cut the background off
    if whole and background >= 0:
        rows = rows[rows[:, 1] != background]
    picked = _in_fractions(foreign, boxes[0], rows[:, 2])
    order = np.argsort(-scores[0, rows[:, 1], rows[:, 2]], kind="stable")[: spec.nms.max_detections]
    labels = rows[order, 1] - (whole and background >= 0 and rows[order, 1] > background)
    return Detected(
        picked[order].astype(np.float32), scores[0, rows[order, 1], rows[order, 2]], labels.astype(np.int32)
    )


def _finished(foreign: Foreign, spec: Spec, run: Callable[[Any], Any], pixels: NDArray[np.uint8]) -> Detected:
    """Rows of x1,y1,x2,y2, score, class."""
    import numpy as np

    rows = run(foreign.front.feeds(_normalised(spec, pixels)))[foreign.reading.selection["rows"]]
    rows = rows.reshape(-1, rows.shape[-1])[:, -6:]
    rows = rows[rows[:, 4] > spec.nms.score_threshold]
    boxes = _in_fractions(foreign, rows[:, :4], np.arange(len(rows)))
    return Detected(boxes.astype(np.float32), rows[:, 4], rows[:, 5].astype(np.int32))


def _in_fractions(foreign: Foreign, boxes: NDArray[Any], chosen: NDArray[Any]) -> NDArray[np.float64]:
    """The chosen rows as x1,y1,x2,y2 in 0..1, any two opposite corners put in order; all rows tell the unit."""
    import numpy as np

    picked = to_corners(boxes[chosen].astype(np.float64), foreign.reading.corners)
    if foreign.reading.corners in CORNERS:
        first, second = picked[:, :2], picked[:, 2:]
        picked = np.concatenate([np.minimum(first, second), np.maximum(first, second)], 1)
    in_pixels = boxes.size and np.abs(boxes).max() > IN_PIXELS
    return picked / np.array([foreign.front.width, foreign.front.height] * 2) if in_pixels else picked


def _without_threshold(model: onnx.ModelProto, selected: str) -> None:
    """Gives a NonMaxSuppression of the main graph the score threshold 0 (in place)."""
    import numpy as np
    from onnx import numpy_helper

    for node in model.graph.node:
        if selected in node.output and len(node.input) > 4:
            model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "ssd/threshold"))
            node.input[4] = "ssd/threshold"


def _pairs(spec: Spec, theirs: Detected, ours: Detected) -> tuple[list[tuple[int, int]], str]:
    """Pairs of the same detection, and the first that has no partner, in words."""
    import numpy as np

    clipped = [np.clip(side.boxes, 0, 1).astype(np.float64) for side in (theirs, ours)]
    overlaps = ious(*clipped) * (theirs.classes[:, None] == ours.classes)
    close = (overlaps >= PAIRED_IOU) & (np.abs(theirs.scores[:, None] - ours.scores) <= SCORES)
    pairs, free = [], set(range(len(ours.boxes)))
    for i in range(len(theirs.boxes)):
        fitting = [j for j in free if close[i, j]]
        if fitting:
            j = max(fitting, key=lambda j: overlaps[i, j])
            pairs.append((i, j))
            free.remove(j)
    full = max(len(theirs.boxes), len(ours.boxes)) >= spec.nms.max_detections
    ends = [float(side.scores.min()) for side in (theirs, ours) if full and len(side.scores)]
    border = max([spec.nms.score_threshold, *ends]) + SCORES
    matched = {i for i, _ in pairs}
    for side, name, missing in (
        (theirs, "the original", set(range(len(theirs.boxes))) - matched),
        (ours, "the import", free),
    ):
        for index in sorted(missing, key=lambda index: -side.scores[index]):
            if side.scores[index] > border:
                label = (
                    spec.labels[side.classes[index]] if side.classes[index] < len(spec.labels) else side.classes[index]
                )
                box = np.round(side.boxes[index], 3).tolist()
                return pairs, f"{name} alone detects {label!r} {side.scores[index]:.3f} at {box}"
    return pairs, ""


def _symptom(spec: Spec, theirs: Detected, ours: Detected) -> str:
    """What a difference is a sign of."""
    import numpy as np

    if not len(ours.boxes):
        return "the imported model detects nothing at all: the scores or their threshold are read wrongly"

    def agreeing(boxes: NDArray[Any]) -> float:
        return float((ious(theirs.boxes.astype(float), boxes.astype(float)).max(1, initial=0) > PAIRED_IOU).mean())

    size = np.array([spec.input.width, spec.input.height] * 2)
    if agreeing(ours.boxes[:, [1, 0, 3, 2]]) > 0.5:
        return "the coordinates stand in the order y,x: --box-order yxyx"
    if agreeing(ours.boxes / size) > 0.5 or agreeing(ours.boxes * size) > 0.5:
        return "boxes or anchors are in pixels, and the model was read as if they were in 0..1"
    if agreeing(ours.boxes) > 0.5:
        return "the boxes agree and the scores do not: an activation is applied twice or not at all (--scores-are)"
    return "the boxes differ: they are decoded twice or with other anchors (--boxes-are, --anchors)"


def draw(path: Path, spec: Spec, sheets: Sequence[tuple[NDArray[np.uint8], Detected, Detected]]) -> None:
    """One picture for people: the original's detections on the left, the imported model's on the right."""
    import numpy as np
    from PIL import Image, ImageDraw

    from build.files import replacing

    gap, title = 6, 18
    width, height = spec.input.width, spec.input.height
    sheet = Image.new("RGB", (2 * width + gap, len(sheets) * (height + gap) + title), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 3), "the original", fill="black")
    pen.text((width + gap + 4, 3), "imported", fill="black")
    for row, (pixels, *sides) in enumerate(sheets):
        for column, side in enumerate(sides):
            picture = Image.fromarray(pixels)
            pencil = ImageDraw.Draw(picture)
            for box, score, label in zip(side.boxes, side.scores, side.classes, strict=True):
                if score >= SHOWN:
                    ends = np.sort((box * [width, height, width, height]).reshape(2, 2), axis=0)
                    corners = ends.ravel().tolist()
                    pencil.rectangle(corners, outline="lime", width=2)
                    text = f"{spec.labels[label]} {score:.2f}"
                    pencil.text(
                        (corners[0] + 3, corners[1] + 2), text, fill="white", stroke_width=1, stroke_fill="black"
                    )
            sheet.paste(picture, (column * (width + gap), title + row * (height + gap)))
    with replacing(path) as unfinished:
        sheet.save(unfinished)
