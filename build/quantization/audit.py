"""What a precision costs, in mAP on held-out pictures: the gate before anything is published.

`approved` is what the pipeline asks for a graph in a precision; `audit` compares all of them with FP32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import contract, files
from build.errors import RuntimeUnavailableError, VerifyError
from build.gate import datasets
from build.gate.scoring import SHOWN_THRESHOLD, Detected, Detector, Score, differences, score
from build.quantization import calibration, sensitivity
from build.quantization.candidates import Candidate, Quantiser, all_calibrators, candidates
from build.quantization.judgement import Judgement
from build.spec import Spec

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console
    from rich.table import Table

WORST = 8
TYPED = tuple(name for name, kind in contract.PRECISIONS.items() if kind.typed)


def approved(spec: Spec, precision: str, artifacts: Path, console: Console) -> Candidate:
    """The graph of a precision that keeps enough of FP32's mAP; of several calibrators the one that keeps most.

    Where no quantised graph passes as the spec has it, the few Convs that cost most are left out: sensitivity.search
    finds them and writes them to the spec's exclude_nodes, so the caller reads the spec again.

    A precision that runs the source's own graph is not judged. Where the spec names no held-out pictures, one without
    calibration passes with a warning.

    Raises:
        VerifyError: none keeps what the spec's gate asks.
        SSDError: no graph can be made, or nothing to judge it on.
    """
    kind = contract.PRECISIONS[precision]
    quantiser = Quantiser(spec, precision, artifacts, console) if kind.quantised else None
    graphs = quantiser.candidates() if quantiser else candidates(spec, precision, artifacts, console=console)
    if not kind.typed:
        return graphs[0]
    if not kind.quantised and not spec.data.held_out:
        console.print(
            f"warning: {spec.path}: [data] names no held-out pictures: {precision} was not audited", markup=False
        )
        return graphs[0]
    if quantiser is not None and not any(graph.quantised for graph in graphs):
        others = " or ".join(name for name in ("fp16", "int8") if name != precision)
        reasons = sorted({reason for graph in graphs for reason in graph.left.values()})
        raise VerifyError(
            f"{spec.model.name}: none of its {len(graphs[0].left)} convolutions would be {precision}",
            why=" or ".join(reasons),
            fix=f"build {others}, or name fewer Convs in [quantization] exclude_nodes",
        )
    judgement = Judgement(spec, artifacts, console)
    best = max((judgement.of(candidate) for candidate in graphs), key=lambda result: result.share)
    if best.passes:
        console.print(judgement.sentence(best), markup=False)
        return best.candidate
    if quantiser is None:
        raise VerifyError(
            f"{judgement.sentence(best)}; it is not published",
            why="some layer does not bear the precision",
            fix="build a precision with more range or more digits",
        )
    found = sensitivity.search(
        spec, artifacts, precision=precision, judgement=judgement, start=best, quantiser=quantiser, console=console
    )
    if found.best is None or not found.passes:
        raise VerifyError(
            f"{found.verdict}; it is not published",
            why="too many layers do not bear the precision, or the calibration pictures are unlike the held-out ones",
            fix="calibrate on more pictures like those that will be sent ([data] calibration), build fp16, or lower "
            "[quantization] gate if that loss is acceptable",
        )
    return found.best.candidate


def audit(
    spec: Spec,
    artifacts: Path,
    *,
    precisions: Sequence[str] = TYPED,
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

    show = console or Console(highlight=False)
    judgement = Judgement(spec, artifacts, show)
    pictures, baseline = judgement.pictures, judgement.baseline
    forms = {"onnxruntime": baseline.accuracy.map}
    rows: list[dict[str, Any]] = [_row(contract.BASELINE, "", baseline, baseline, (0.0, 0.0), forms)]
    worst: tuple[str, Score] | None = None
    measured: calibration.Calibration | None = None  # of the first quantised precision
    out = artifacts / "audit"
    results: list[tuple[str, str, Score, dict[str, float]]] = []
    if served is not None:
        result = score(pictures, served[1], "mAP through the server", show)
        results.append((f"{served[0]} served", "", result, {"served": result.accuracy.map}))
    else:
        for name in precisions:
            if contract.PRECISIONS[name].quantised:
                quantiser = Quantiser(spec, name, artifacts, show)
                measured = measured or quantiser.calibration
                graphs = quantiser.candidates(all_calibrators(name))
            else:
                graphs = candidates(spec, name, artifacts)
            for graph in graphs:
                judged = judgement.of(graph)
                results.append((name, graph.calibrator, judged.score, judged.forms))
    with show.status("confidence intervals: resampling the pictures"):
        intervals = differences(baseline.curves, [result.curves for _, _, result, _ in results])
    for (name, calibrator, result, forms), interval in zip(results, intervals, strict=True):
        rows.append(_row(name, calibrator, result, baseline, interval, forms))
        if worst is None or result.accuracy.map < worst[1].accuracy.map:
            worst = (f"{name} {calibrator}".strip(), result)
    # A build takes the best of the calibrators that the spec allows, so a verdict counts these alone.
    asked = spec.quantization.calibrator
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["calibrator"] not in (None, asked) and asked != "auto":
            continue
        if row["precision"] not in best or row["map"] > best[row["precision"]]["map"]:
            best[row["precision"]] = row
    summary = {
        name: {key: value for key, value in row.items() if key not in ("precision", "by_class", "by_size")}
        | {"passes": row["ratio"] >= spec.quantization.gate}
        for name, row in best.items()
    }
    prefix = "" if served is None else "served_"
    files.write_json(out / f"{prefix}summary.json", summary)
    about = {"model": spec.model.name, "pictures": len(pictures), "gate": spec.quantization.gate, "rows": rows}
    about["labels"] = "FP32's own detections" if pictures.labelled_by else "of the pictures"
    files.write_json(out / f"{prefix}report.json", about)
    with files.explained(out):
        if worst is not None:
            draw_worst(out / f"{prefix}worst", spec, pictures, baseline, *worst)
        if measured is not None:
            calibration.write_scales(out / "scales.csv", measured, spec.quantization.percentile)
            try:
                calibration.draw_histograms(out / "histograms.png", measured, spec.quantization.percentile)
            except RuntimeUnavailableError as missing:
                show.print(f"no {out / 'histograms.png'}: {missing.what}", markup=False)
    show.print(_table(spec, rows, summary))
    return summary


def _row(
    precision: str,
    calibrator: str,
    result: Score,
    baseline: Score,
    interval: tuple[float, float],
    forms: dict[str, float],
) -> dict[str, Any]:
    accuracy = result.accuracy
    return {
        "precision": precision,
        "calibrator": calibrator or None,
        "map": accuracy.map,
        "map50": accuracy.map50,
        "ratio": accuracy.map / baseline.accuracy.map,
        "ci95": list(interval),
        "forms": forms,
        "by_class": accuracy.by_class,
        "by_size": {"small": accuracy.map_small, "medium": accuracy.map_medium, "large": accuracy.map_large},
    }


def _table(spec: Spec, rows: Iterable[dict[str, Any]], summary: Mapping[str, Any]) -> Table:
    from rich.table import Table

    own = ", labelled by FP32's own detections" if spec.data.labels_from == datasets.FP32 else ""
    table = Table(
        title=f"{spec.model.name}: what each precision keeps (gate {spec.quantization.gate:g} of FP32's mAP{own})"
    )
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
    folder: Path, spec: Spec, pictures: datasets.Pictures, baseline: Score, name: str, other: Score
) -> list[Path]:
    """The pictures on which `other` loses most: FP32's boxes on the left, `other`'s on the right."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    loss = baseline.curves.seen() - other.curves.seen()
    written = []
    # pycocotools orders pictures by their ids.
    by_id = np.argsort(pictures.image_ids, kind="stable")
    for rank, position in enumerate(np.argsort(-loss, kind="stable")[:WORST], start=1):
        if loss[position] <= 0:
            break
        index = int(by_id[position])
        pair = [
            _drawn(datasets.open_picture(pictures.paths[index]), result.detected[index], spec.labels, title)
            for title, result in ((contract.BASELINE, baseline), (name, other))
        ]
        sheet = Image.new("RGB", (pair[0].width * 2 + 4, pair[0].height), "white")
        sheet.paste(pair[0], (0, 0))
        sheet.paste(pair[1], (pair[0].width + 4, 0))
        written.append(folder / f"{rank}-{pictures.paths[index].stem}.png")
        sheet.save(written[-1])
    return written


def _drawn(picture: Image.Image, detected: Detected, labels: Sequence[str], title: str) -> Image.Image:
    from PIL import ImageDraw

    pen = ImageDraw.Draw(picture)
    for box, value, label in zip(
        detected.boxes.tolist(), detected.scores.tolist(), detected.classes.tolist(), strict=True
    ):
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
