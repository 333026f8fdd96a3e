"""The table of docs/precision.md: what networks lose and gain by precision, each figure from one run of this module."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import contract, files
from build.errors import DataError
from build.gate import datasets
from build.gate.verify import before_suppression
from build.graph.attach import before_nms
from build.quantization import noise, qdq, sensitivity
from build.quantization.candidates import Candidate, Quantiser, candidates
from build.quantization.judgement import Judged, Judgement
from build.reports import cpu
from build.session import runner
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console

DOCUMENT = files.ROOT / "docs" / "precision.md"
_BLOCK = re.compile(r"(<!-- table: \./invoke audit --table -->\n).*?(<!-- end of table -->)", re.S)
_NOISE = 8  # pictures
_WARM_UP = 3  # rounds
Row = dict[str, Any]


def measure(
    specs: Sequence[Spec],
    artifacts: Path,
    *,
    rounds: int = 40,
    document: Path | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Judges and times every precision of several models.

    INT8 and FP8 are shown with each calibrator. Where none passes the gate, a row more shows what comes of leaving out
    a few Convs; spec.toml stays as it is.

    Args:
        specs: the models; each names calibration and held-out pictures.
        artifacts: receives `audit/table.json` and `audit/table.md`.
        rounds: how often each graph is timed, in turn; the table has the medians.
        document: a Markdown file that receives the table between `<!-- table: ./invoke audit --table -->` and
            `<!-- end of table -->`; None = none.
        console: for progress.

    Returns:
        {model, precision, calibrator, pictures, share, forms: {form: share}, left_out, convolutions, passes, noise_db:
        in what the graph as written detects (`noise.decibels`), as_written_speed and onnxruntime_speed: before SSDNMS
        on one thread, as a multiple of FP32's}; a figure that was not taken is None.

    Raises:
        SSDError: nothing to judge on, a graph cannot be made, or the document has no such place.
    """
    from rich.console import Console

    show = console or Console(stderr=True, highlight=False)
    if document is not None and not _BLOCK.search(document.read_text(encoding="utf-8-sig")):
        raise DataError(
            f"{document}: has no place for the table", fix="<!-- table: ./invoke audit --table --> marks it"
        )
    rows: list[Row] = []
    for spec in specs:
        rows += _of_model(spec, artifacts, rounds, show)
        files.write_json(artifacts / "audit" / "table.json", {"cpu": cpu.int8(), "rows": rows})
    text = markdown(rows)
    files.write(artifacts / "audit" / "table.md", text)
    if document is not None:
        before = document.read_text(encoding="utf-8-sig")
        files.write(document, _BLOCK.sub(lambda block: f"{block[1]}{text}{block[2]}", before))
    return rows


def _of_model(spec: Spec, artifacts: Path, rounds: int, console: Console) -> list[Row]:
    judgement = Judgement(spec, artifacts, console)
    judged: list[tuple[Judged, Candidate | None]] = []
    for name in ("fp16", "bf16"):
        judged += [(judgement.of(each), None) for each in candidates(spec, name, artifacts)]
    for name in ("int8", "fp8"):
        quantiser = Quantiser(spec, name, artifacts, console)
        results = [judgement.of(each) for each in quantiser.candidates()]
        judged += [(result, result.candidate if name == "int8" else None) for result in results]
        best = max(results, key=lambda result: result.share)
        if not best.passes:
            found = sensitivity.search(
                spec,
                artifacts,
                precision=name,
                judgement=judgement,
                start=best,
                quantiser=quantiser,
                write=False,
                console=console,
            )
            if found.best is not None:
                judged.append((found.best, found.best.candidate if name == "int8" else None))
    (base,) = candidates(spec, contract.BASELINE, artifacts)
    pixels = list(datasets.arrays(judgement.pictures.spread(_NOISE), spec.input, 1))
    each = [picture for batch in pixels for picture in batch]
    exact = before_suppression(spec, runner(before_nms(base.graph)), each)
    first: Row = {"precision": contract.BASELINE, "calibrator": "", "share": 1.0, "forms": {}, "left_out": 0}
    rows = [{**first, "passes": True, "noise_db": None, "as_written_speed": 1.0, "onnxruntime_speed": 1.0}]
    for result, timed in judged:
        candidate = result.candidate
        quantised = candidate.kind.quantised
        run = runner(before_nms(candidate.graph if quantised else candidate.runs), literal=quantised)
        row: Row = {"precision": candidate.precision, "calibrator": candidate.calibrator, "share": result.share}
        row["forms"] = {form: value / judgement.baseline.accuracy.map for form, value in result.forms.items()}
        row["left_out"] = len(candidate.left)
        row |= {"passes": result.passes, "noise_db": noise.decibels(exact, before_suppression(spec, run, each))}
        rows.append(row | (_speeds(base, timed, pixels, rounds) if timed else _NO_SPEEDS))
    about = {"model": spec.model.name, "pictures": len(judgement.pictures)}
    about |= {"labels": "FP32's own detections" if judgement.pictures.labelled_by else "of the pictures"}
    return [{**about, "convolutions": len(qdq.convs(base.source)), **row} for row in rows]


_NO_SPEEDS: Row = {"as_written_speed": None, "onnxruntime_speed": None}


def _speeds(base: Candidate, other: Candidate, pixels: Sequence[NDArray[np.uint8]], rounds: int) -> Row:
    """FP32's time over that of both forms, before SSDNMS, one thread, in turn, medians of processor time."""
    runs = {"fp32": base.graph, "as_written_speed": other.graph, "onnxruntime_speed": other.runs}
    runners = {name: runner(before_nms(graph), threads=1) for name, graph in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-_WARM_UP, rounds):
        for name, run in runners.items():
            begun = time.process_time()
            run({contract.IMAGES: pixels[number % len(pixels)]})
            if number >= 0:
                times[name].append(time.process_time() - begun)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: medians["fp32"] / value for name, value in medians.items() if name != "fp32"}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""

    def figure(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [
        "| network | precision | of FP32's mAP | left out | noise | speed |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        forms = [row["forms"].get(form) for form in ("as written", "onnxruntime")]
        kept = "; ".join(figure(value, ".2%") for value in forms if value is not None) or "1"
        name = f"{row['precision']} {row['calibrator']}".strip()
        left = f"{row['left_out']} of {row['convolutions']}" if row["left_out"] else ""
        speeds = [row["as_written_speed"], row["onnxruntime_speed"]]
        fast = "; ".join(figure(value, ".2f") for value in speeds if value is not None)
        loss = f"{row['noise_db']:.1f} dB" if row["noise_db"] is not None else ""
        first = row["precision"] == contract.BASELINE
        about = f"{row['model']} ({row['pictures']} pictures, labels: {row['labels']})" if first else ""
        lines.append(f"| {about} | {name} | {kept} | {left} | {loss} | {fast} |")
    return "\n".join(lines) + "\n"
