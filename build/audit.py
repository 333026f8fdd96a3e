"""What a precision costs, in mAP on held-out pictures: the gate before anything is published.

`approved` is what the pipeline asks for a graph in a precision; `audit` compares all of them with FP32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from build import datasets, evaluate, graph, precision, quantize, ssd_nms
from build.errors import DataError, QuantizeError, RuntimeUnavailableError, VerifyError
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray
    from PIL import Image
    from pycocotools.cocoeval import COCOeval
    from rich.console import Console
    from rich.table import Table

    from build.evaluate import Accuracy

SCORE_THRESHOLD = 0.01  # COCO's mAP wants the whole precision-recall curve
SHOWN_THRESHOLD = 0.3  # of the boxes that are drawn and counted as seen
REPLICATES = 500
WORST = 8
UNTYPED = ("fp32", "tf32")  # their graph is the source's own: there is nothing to judge
_QUANTISED = ("int8", "fp8")


class Found(NamedTuple):
    """What was found in one picture: FP32 [n,4] x1,y1,x2,y2 in its pixels, scores [n], 0-based classes [n]."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int32]


# Pictures → what is in each: in process, or whatever stands for a server's client.
Detector = Callable[[Sequence[Path]], Sequence[Found]]


@dataclass(frozen=True)
class Candidate:
    """A graph to be judged.

    Attributes:
        precision: of precision.PRECISIONS.
        calibrator: how its activations are clipped; empty where nothing is.
        source: the typed source model.
        graph: the served graph as TensorRT gets it.
        runs: the same for ONNX Runtime: for INT8 with UINT8 Relus, for BF16 in FP32 with every result rounded.
        quantised: names of the quantised Convs.
    """

    precision: str
    calibrator: str
    source: onnx.ModelProto
    graph: onnx.ModelProto
    runs: onnx.ModelProto
    quantised: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For tables and files."""
        return f"{self.precision} {self.calibrator}".strip()


# -- graphs ------------------------------------------------------------------------------------------------------------


def candidates(
    spec: Spec,
    kind: str,
    cache: Path,
    *,
    calibrators: Sequence[str] = (),
    exclude: Collection[str] | None = None,
    console: Console | None = None,
) -> list[Candidate]:
    """The graphs of a precision: one, or for INT8 and FP8 one per calibrator.

    Args:
        spec: the spec.
        kind: of precision.PRECISIONS.
        cache: the artifacts' folder.
        calibrators: which to try; empty = the spec's, of which `auto` is all.
        exclude: Convs to leave unquantised; None = the spec's.
        console: for progress.

    Raises:
        SSDError: no such graph can be made.
    """
    source = graph.load_source(spec)
    if kind in UNTYPED:
        whole = graph.attach(spec, source)
        return [Candidate(kind, "", source, whole, whole)]
    folded = quantize.fold(source)
    if kind in ("fp16", "bf16"):
        typed = precision.half(folded, kind)
        whole = graph.attach(spec, typed)
        runs = graph.attach(spec, precision.rounded(folded)) if kind == "bf16" else whole
        return [Candidate(kind, "", typed, whole, runs)]
    settings = spec.quantization
    calibration = quantize.calibrate(spec, folded, cache, console)
    wanted = calibrators or (quantize.CALIBRATORS if settings.calibrator == "auto" else (settings.calibrator,))
    found = []
    for calibrator in wanted:
        clips = calibration.clips(calibrator, settings.percentile)
        left = settings.exclude_nodes if exclude is None else exclude
        placed = quantize.quantize(folded, clips, kind=kind, exclude=left)
        typed = precision.half(placed.model, "fp16") if settings.rest == "fp16" else placed.model
        whole = graph.attach(spec, typed)
        runs = quantize.for_onnxruntime(whole) if kind == "int8" else whole
        found.append(Candidate(kind, calibrator, typed, whole, runs, placed.nodes))
    return found


def approved(spec: Spec, kind: str, cache: Path, console: Console) -> Candidate:
    """The graph of a precision that keeps enough of FP32's mAP; of several calibrators the one that keeps most.

    FP32 and TF32 are not judged. Where the spec names no held-out pictures FP16 and BF16 pass with a warning.

    Raises:
        VerifyError: none keeps what the spec's gate asks.
        SSDError: no graph can be made, or nothing to judge it on.
    """
    found = candidates(spec, kind, cache, console=console)
    if kind in UNTYPED:
        return found[0]
    if kind not in _QUANTISED and not spec.data.held_out:
        console.print(f"warning: {spec.path}: [data] names no held-out pictures: {kind} was not audited", markup=False)
        return found[0]
    pictures = datasets.held_out(spec, cache / "datasets")
    reference, _ = _judged(spec, pictures, candidates(spec, "fp32", cache)[0], console)
    scores = [_judged(spec, pictures, one, console)[0] for one in found]
    best, score = max(zip(found, scores, strict=True), key=lambda pair: pair[1].accuracy.map)
    ratio = score.accuracy.map / reference.accuracy.map
    said = (
        f"{spec.model.name}: {best.name} keeps {ratio:.2%} of FP32's mAP on {len(pictures)} held-out pictures "
        f"({score.accuracy.map:.4f} of {reference.accuracy.map:.4f})"
    )
    if not ratio >= spec.quantization.gate:
        raise VerifyError(
            f"{said}, but the gate asks for {spec.quantization.gate:.2%}; it is not published",
            why="some layer does not bear the precision"
            + (", or the calibration pictures are unlike the held-out ones" if kind in _QUANTISED else ""),
            fix="find it: invoke audit --sensitivity"
            if kind in _QUANTISED
            else "build a precision with more range or more digits",
        )
    console.print(said, markup=False)
    return best


# -- accuracy ----------------------------------------------------------------------------------------------------------


def in_process(spec: Spec, model: onnx.ModelProto, *, literal: bool = False) -> Detector:
    """A detector that runs a served graph in ONNX Runtime here, one picture at a time, as the server's instances do.

    Args:
        spec: how pictures are brought to the input.
        model: the graph.
        literal: as for `session`.

    Raises:
        QuantizeError: ONNX Runtime has no kernels for it.
    """
    import numpy as np

    runs = session(model, literal=literal)
    thresholds = {
        "score_threshold": np.full((1, 1), SCORE_THRESHOLD, np.float32),
        "iou_threshold": np.full((1, 1), spec.nms.iou_threshold, np.float32),
    }
    feeds: dict[str, Any] = thresholds if spec.nms.runtime_thresholds else {}

    def detect(paths: Sequence[Path]) -> list[Found]:
        found = []
        for path in paths:
            picture = datasets.open_picture(path)
            pixels, back = datasets.to_input(picture, spec.input)
            number, boxes, scores, classes = runs.run(ssd_nms.OUTPUTS, {graph.IMAGES: pixels[None], **feeds})
            kept = int(number[0, 0])
            corners = boxes[0, :kept].reshape(-1, 2, 2) * back[0] + back[1]
            inside = np.clip(corners, 0, picture.size).reshape(-1, 4).astype(np.float32)
            found.append(Found(inside, scores[0, :kept], classes[0, :kept]))
        return found

    return detect


class Score(NamedTuple):
    """One candidate's result: COCO's figures, the matches for resampling, and what was found in each picture."""

    accuracy: Accuracy
    curves: Curves
    found: list[Found]


def score(pictures: datasets.Pictures, detector: Detector, title: str, console: Console | None = None) -> Score:
    """Runs a detector over labelled pictures; those that cannot be read count as pictures without detections.

    Raises:
        DataError: more than one in twenty pictures cannot be read.
    """
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    assert pictures.truth is not None
    nothing = Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    found: list[Found] = []
    unreadable = 0
    show = console or Console(stderr=True, soft_wrap=True)
    with Progress(console=show, transient=True, disable=not show.is_terminal) as progress:
        task = progress.add_task(title, total=len(pictures))
        for start in range(0, len(pictures), 8):
            part = pictures.paths[start : start + 8]
            try:
                found += detector(part)
            except DataError:
                for path in part:
                    try:
                        found += detector([path])
                    except DataError as error:
                        unreadable += 1
                        found.append(nothing)
                        if unreadable > datasets.MOST_UNREADABLE * len(pictures):
                            raise DataError(
                                f"{pictures.name}: {unreadable} of {start + len(part)} pictures cannot be read, the "
                                f"last one: {error.what}",
                                fix="mend or remove them",
                            ) from None
            progress.update(task, completed=len(found))
    rows = [
        {
            "image_id": image_id,
            "category_id": pictures.category_ids[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": value,
        }
        for image_id, one in zip(pictures.image_ids, found, strict=True)
        for (x1, y1, x2, y2), value, label in zip(
            one.boxes.astype(float).tolist(), one.scores.tolist(), one.classes.tolist(), strict=True
        )
    ]
    judge = evaluate.judge(pictures.truth, rows)
    return Score(evaluate.accuracy(judge), Curves(judge), found)


def _judged(
    spec: Spec, pictures: datasets.Pictures, candidate: Candidate, console: Console | None
) -> tuple[Score, dict[str, float]]:
    """The worse of a candidate's forms, and the mAP of each.

    `as written` is the graph that TensorRT gets, each Q/DQ pair computed for itself; `onnxruntime` what a CPU serves.
    """
    detectors = {}
    if candidate.precision in _QUANTISED:
        detectors["as written"] = in_process(spec, candidate.graph, literal=True)
    if candidate.precision != "fp8":
        detectors["onnxruntime"] = in_process(spec, candidate.runs)
    scores = {
        form: score(pictures, detector, f"{candidate.name} {form}: mAP on held-out pictures", console)
        for form, detector in detectors.items()
    }
    worse = min(scores.values(), key=lambda one: one.accuracy.map)
    return worse, {form: one.accuracy.map for form, one in scores.items()}


class Curves:
    """Every match that pycocotools found, kept so that mAP of any resampling of the pictures is a few sums.

    Args:
        judge: what `evaluate.judge` returned.
    """

    def __init__(self, judge: COCOeval) -> None:
        import numpy as np

        parameters = judge.params
        pictures, areas = len(parameters.imgIds), len(parameters.areaRng)
        most = parameters.maxDets[-1]
        self.pictures = pictures
        self._recalls = parameters.recThrs
        self._classes = []
        for k in range(len(parameters.catIds)):
            first = k * areas * pictures  # area "all" is the first
            held = [(i, one) for i, one in enumerate(judge.evalImgs[first : first + pictures]) if one is not None]
            positives = np.zeros(pictures)
            for i, one in held:
                positives[i] = np.count_nonzero(np.asarray(one["gtIgnore"]) == 0)
            if not positives.any():
                continue
            scores = np.concatenate([np.asarray(one["dtScores"][:most], float) for _, one in held])
            order = np.argsort(-scores, kind="mergesort")
            place = np.concatenate([np.full(len(one["dtScores"][:most]), i) for i, one in held])[order]
            ignored = np.concatenate([one["dtIgnore"][:, :most] for _, one in held], 1)[:, order].astype(bool)
            matched = np.concatenate([one["dtMatches"][:, :most] for _, one in held], 1)[:, order] > 0
            hit, miss = matched & ~ignored, ~matched & ~ignored
            self._classes.append((positives, scores[order], place.astype(int), hit, miss))

    def mean_average_precision(self, weights: NDArray[np.float64] | None = None) -> float:
        """mAP@[.5:.95] where picture i counts `weights[i]` times; without weights once each: pycocotools' figure."""
        import numpy as np

        each = np.ones(self.pictures) if weights is None else weights
        means = []
        for positives, _, place, hit, miss in self._classes:
            total = float(positives @ each)
            if total == 0:
                continue
            share = each[place]
            true, false = np.cumsum(hit * share, 1), np.cumsum(miss * share, 1)
            exact = true / np.maximum(true + false, np.spacing(1))
            best = np.maximum.accumulate(exact[:, ::-1], 1)[:, ::-1]
            best = np.concatenate([best, np.zeros((len(best), 1))], 1)
            at = [np.searchsorted(row, self._recalls, side="left") for row in true / total]
            means.append(np.take_along_axis(best, np.stack(at), 1).mean())
        return float(np.mean(means)) if means else float("nan")

    def seen(self) -> NDArray[np.float64]:
        """Per picture: right minus wrong boxes among those that a user would see, averaged over COCO's IoUs."""
        import numpy as np

        total = np.zeros(self.pictures)
        for _, scores, place, hit, miss in self._classes:
            shown = (hit.mean(0) - miss.mean(0)) * (scores >= SHOWN_THRESHOLD)
            total += np.bincount(place, shown, self.pictures)
        return total


def differences(reference: Curves, others: Sequence[Curves], replicates: int = REPLICATES) -> list[tuple[float, float]]:
    """95 % confidence interval of each other's mAP minus the reference's: paired bootstrap over pictures.

    All are scored on the same resampled pictures (Efron and Tibshirani 1993, chapters 8 and 13), with replacement,
    seeded; an interval reaches from the 2.5th to the 97.5th percentile of the replicates.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    count = reference.pictures
    found = np.empty((replicates, len(others)))
    for row in found:
        weights = np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
        base = reference.mean_average_precision(weights)
        row[:] = [other.mean_average_precision(weights) - base for other in others]
    return [(float(low), float(high)) for low, high in np.nanpercentile(found, [2.5, 97.5], axis=0).T]


def audit(
    spec: Spec,
    artifacts: Path,
    *,
    precisions: Sequence[str] = ("fp16", "bf16", "int8", "fp8"),
    served: tuple[str, Detector] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compares precisions and calibrators with FP32 on the held-out pictures.

    Writes `<artifacts>/audit/summary.json` ({precision: {calibrator, map, map50, ratio, ci95, passes}}, with the best
    calibrator of each), `report.json` (every one, by class and by size), `worst/` and, where something was calibrated,
    `histograms.png` and `scales.csv`.

    Args:
        spec: the model.
        artifacts: where to write, and where calibration and generated pictures are kept.
        precisions: beside fp32.
        served: (precision, detector) of a running server, judged in place of the graphs; the files' names then begin
            with served_.
        console: for progress and the table.

    Returns:
        What summary.json holds.

    Raises:
        SSDError: nothing to judge on, or no such graph.
    """
    from rich.console import Console

    from build.repository import explained

    say = console or Console(highlight=False)
    pictures = datasets.held_out(spec, artifacts / "datasets")
    reference, forms = _judged(spec, pictures, candidates(spec, "fp32", artifacts)[0], say)
    rows: list[dict[str, Any]] = [_row("fp32", "", reference, reference, (0.0, 0.0), forms)]
    worst: tuple[str, Score] | None = None
    out = artifacts / "audit"
    judged: list[tuple[str, str, Score, dict[str, float]]] = []
    if served is not None:
        result = score(pictures, served[1], "mAP through the server", say)
        judged.append((f"{served[0]} served", "", result, {"served": result.accuracy.map}))
    else:
        for kind in precisions:
            for one in candidates(spec, kind, artifacts, calibrators=all_calibrators(kind), console=say):
                judged.append((kind, one.calibrator, *_judged(spec, pictures, one, say)))
    with say.status("confidence intervals: resampling the pictures"):
        intervals = differences(reference.curves, [result.curves for _, _, result, _ in judged])
    for (kind, calibrator, result, forms), interval in zip(judged, intervals, strict=True):
        rows.append(_row(kind, calibrator, result, reference, interval, forms))
        if worst is None or result.accuracy.map < worst[1].accuracy.map:
            worst = (f"{kind} {calibrator}".strip(), result)
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["precision"] not in best or row["map"] > best[row["precision"]]["map"]:
            best[row["precision"]] = row
    summary = {
        kind: {key: value for key, value in row.items() if key not in ("precision", "by_class", "by_size")}
        | {"passes": row["ratio"] >= spec.quantization.gate}
        for kind, row in best.items()
    }
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        prefix = "" if served is None else "served_"
        write_json(out / f"{prefix}summary.json", summary)
        about = {"model": spec.model.name, "pictures": len(pictures), "gate": spec.quantization.gate, "rows": rows}
        write_json(out / f"{prefix}report.json", about)
        if worst is not None:
            draw_worst(out / f"{prefix}worst", spec, pictures, reference, *worst)
        if served is None and any(kind in _QUANTISED for kind in precisions):
            folded = quantize.fold(graph.load_source(spec))
            calibration = quantize.calibrate(spec, folded, artifacts, say)
            quantize.write_scales(out / "scales.csv", calibration, spec.quantization.percentile)
            try:
                quantize.draw_histograms(out / "histograms.png", calibration, spec.quantization.percentile)
            except RuntimeUnavailableError as missing:
                say.print(f"no {out / 'histograms.png'}: {missing.what}", markup=False)
    say.print(_table(spec, rows, summary))
    return summary


def all_calibrators(kind: str) -> tuple[str, ...]:
    """The calibrators that a precision can be made with."""
    return quantize.CALIBRATORS if kind in _QUANTISED else ()


def _row(
    kind: str, calibrator: str, result: Score, reference: Score, interval: tuple[float, float], forms: dict[str, float]
) -> dict[str, Any]:
    accuracy = result.accuracy
    return {
        "precision": kind,
        "calibrator": calibrator or None,
        "map": accuracy.map,
        "map50": accuracy.map50,
        "ratio": accuracy.map / reference.accuracy.map,
        "ci95": list(interval),
        "forms": forms,
        "by_class": accuracy.by_class,
        "by_size": {"small": accuracy.map_small, "medium": accuracy.map_medium, "large": accuracy.map_large},
    }


def _table(spec: Spec, rows: Iterable[dict[str, Any]], summary: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"{spec.model.name}: what each precision keeps (gate {spec.quantization.gate:g} of FP32's mAP)")
    for column in ("precision", "calibrator", "mAP", "mAP50", "of fp32", "95 % interval", "verdict"):
        table.add_column(column, justify="left" if column in ("precision", "calibrator", "verdict") else "right")
    for row in rows:
        best = summary[row["precision"]]["calibrator"] == row["calibrator"]
        passes = row["ratio"] >= spec.quantization.gate
        table.add_row(
            row["precision"],
            row["calibrator"] or "",
            f"{row['map']:.4f}",
            f"{row['map50']:.4f}",
            f"{row['ratio']:.2%}",
            f"{row['ci95'][0]:+.4f} .. {row['ci95'][1]:+.4f}",
            ("passes" if passes else "fails") + (", best" if best and row["calibrator"] else ""),
        )
    return table


def draw_worst(
    folder: Path, spec: Spec, pictures: datasets.Pictures, reference: Score, name: str, other: Score
) -> list[Path]:
    """The pictures on which `other` loses most: FP32's boxes on the left, `other`'s on the right."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    loss = reference.curves.seen() - other.curves.seen()
    written = []
    # pycocotools orders pictures by their ids.
    by_id = np.argsort(pictures.image_ids, kind="stable")
    for rank, position in enumerate(np.argsort(-loss, kind="stable")[:WORST], start=1):
        if loss[position] <= 0:
            break
        index = int(by_id[position])
        pair = [
            _drawn(datasets.open_picture(pictures.paths[index]), one.found[index], spec.labels, title)
            for title, one in (("fp32", reference), (name, other))
        ]
        sheet = Image.new("RGB", (pair[0].width * 2 + 4, pair[0].height), "white")
        sheet.paste(pair[0], (0, 0))
        sheet.paste(pair[1], (pair[0].width + 4, 0))
        written.append(folder / f"{rank}-{pictures.paths[index].stem}.png")
        sheet.save(written[-1])
    return written


def _drawn(picture: Image.Image, found: Found, labels: Sequence[str], title: str) -> Image.Image:
    from PIL import ImageDraw

    pen = ImageDraw.Draw(picture)
    for box, value, label in zip(found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True):
        if value >= SHOWN_THRESHOLD:
            pen.rectangle(box, outline="lime", width=2)
            pen.text(
                (box[0] + 3, box[1] + 2),
                f"{labels[label]} {value:.2f}",
                fill="white",
                stroke_width=1,
                stroke_fill="black",
            )
    pen.text((4, picture.height - 14), title, fill="yellow", stroke_width=1, stroke_fill="black")
    return picture


# -- for the neighbours: build/sensitivity.py, build/speed.py ----------------------------------------------------------


def session(model: onnx.ModelProto, threads: int = 0, *, literal: bool = False) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        model: the graph.
        threads: 0 = ONNX Runtime's choice.
        literal: compute every Q/DQ pair for itself in place of integer kernels.

    Raises:
        QuantizeError: it cannot run the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if literal:
        # ONNX Runtime 1.31's further optimisations take FP8 pairs for INT8 ones and give wrong answers.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no common type
        raise QuantizeError(f"ONNX Runtime cannot run this graph: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all.

    Raises:
        PublishError: the operating system refuses.
    """
    from build.repository import explained

    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps(value, indent=2) + "\n")
        unfinished.replace(path)
