"""Which layers do not bear INT8, and the smallest set to leave out so that the accuracy gate passes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import contract, files
from build import spec as specs
from build.errors import VerifyError
from build.gate import datasets, scoring
from build.graph.attach import attach, before_nms, load_source
from build.quantization import calibration, qdq
from build.session import runner
from build.spec import Spec

if TYPE_CHECKING:
    import onnx
    from rich.console import Console
    from rich.table import Table


def search(
    spec: Spec,
    artifacts: Path,
    *,
    budget: float = 0.0,
    count: int = 200,
    write: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Which Convs do not bear INT8, and the smallest set that a greedy search leaves out so that the gate passes.

    Every Conv is quantised alone, then every one but it; each time mAP on `count` held-out pictures and the heads'
    signal-to-quantisation-noise ratio are taken. The search starts from the spec's exclude_nodes, leaves out what loses
    most until the gate passes on all held-out pictures, then takes back in what is not needed. What was measured is
    kept in `<artifacts>/audit/sensitivity.json`, so that an interrupted or budgeted run goes on where it ended.

    Args:
        spec: the model.
        artifacts: where to write.
        budget: seconds after which to stop; 0 = none.
        count: held-out pictures for the ranking.
        write: whether the result goes into the spec.
        console: for progress and the table.

    Returns:
        {layers: {name: {alone_map, alone_loss, alone_sqnr_db, others_map, others_gain}}, exclude_nodes, ratio, done}.

    Raises:
        SSDError: as `audit`.
        VerifyError: even with every layer left out the gate does not pass.
    """
    from rich.console import Console

    show = console or Console(highlight=False)
    started = time.monotonic()
    folded = qdq.fold(load_source(spec))
    names = [conv.name for conv in qdq.convs(folded)]
    calibrator = spec.quantization.calibrator if spec.quantization.calibrator != "auto" else "minmax"
    measured = calibration.calibrate(spec, folded, artifacts, show)
    clips = measured.clips(calibrator, spec.quantization.percentile)
    pictures = datasets.held_out(spec, artifacts / "datasets")
    few = _first(pictures, count)
    file = artifacts / "audit" / "sensitivity.json"
    about = json.dumps([spec.model.name, calibrator, clips, len(few), pictures.digest()]).encode()
    key = hashlib.sha256(about + folded.SerializeToString(deterministic=True)).hexdigest()
    held = _resume(file, key)
    base = [name for name in names if name in spec.quantization.exclude_nodes]

    def map_of(what: str, exclude: Collection[str], on: datasets.Pictures) -> float:
        """mAP with all but `exclude` quantised, from the file where it is there."""
        if what not in held:
            if budget and time.monotonic() - started > budget:
                raise TimeoutError
            placed = qdq.quantize(folded, clips, exclude=exclude)
            runs = qdq.for_onnxruntime(attach(spec, qdq.quantize(folded, clips, exclude=exclude, sums=True).model))
            result = scoring.score(on, scoring.detector(spec, runner(runs)), what, show)
            held[what] = {"map": result.accuracy.map}
            if on is few:
                held[what]["sqnr_db"] = _sqnr(spec, folded, placed.model, few.paths[:8])
            files.write_json(file, {"key": key, "measured": held})
        return float(held[what]["map"])

    result: dict[str, Any] = {"layers": {}, "exclude_nodes": base, "ratio": None, "done": False}
    try:
        none, every = map_of("fp32 few", names, few), map_of("all few", (), few)
        for name in names:
            alone = map_of(f"alone {name}", [other for other in names if other != name], few)
            others = map_of(f"without {name}", [name], few)
            result["layers"][name] = {
                "alone_map": alone,
                "alone_loss": none - alone,
                "alone_sqnr_db": held[f"alone {name}"]["sqnr_db"],
                "others_map": others,
                "others_gain": others - every,
            }
        whole = map_of("fp32", names, pictures)
        layers = result["layers"]
        ranked = sorted(names, key=lambda name: (-layers[name]["alone_loss"], layers[name]["alone_sqnr_db"]))
        left = list(base)

        def ratio(exclude: Sequence[str]) -> float:
            what = "leaving " + " ".join(sorted(exclude)) if exclude else "leaving nothing"
            return map_of(what, exclude, pictures) / whole

        gate = spec.quantization.gate
        while ratio(left) < gate:
            worst = next((name for name in ranked if name not in left), None)
            if worst is None:
                raise VerifyError(
                    f"{spec.model.name}: with every Conv left out, INT8 still keeps less than {gate:.2%} of FP32's mAP",
                    why="the gate asks for more than FP32 has",
                )
            left.append(worst)
        for name in [name for name in left if name not in base]:
            fewer = [other for other in left if other != name]
            if ratio(fewer) >= gate:
                left = fewer
        result |= {"exclude_nodes": left, "ratio": ratio(left), "done": True}
        if write and set(left) != set(spec.quantization.exclude_nodes):
            specs.edit(spec.path, {"quantization.exclude_nodes": left})
    except TimeoutError:
        show.print(f"the budget of {budget:g} s is used up; run it again to go on ({file})", markup=False)
    show.print(_table(spec, result))
    return result


def _sqnr(spec: Spec, before: onnx.ModelProto, after: onnx.ModelProto, paths: Sequence[Path]) -> float:
    """10·log10 of signal over quantisation noise in the raw heads, both heads together by their geometric mean."""
    import numpy as np

    noise = {name: [0.0, 0.0] for name in contract.HEADS}
    first, second = (runner(before_nms(attach(spec, source))) for source in (before, after))
    for path in paths:
        feeds = {contract.IMAGES: datasets.load(path, spec.input)[0][None]}
        exact_heads, quantised_heads = first(feeds), second(feeds)
        for name in contract.HEADS:
            exact, quantised = exact_heads[name], quantised_heads[name]
            noise[name][0] += float(np.square(exact, dtype=np.float64).sum())
            noise[name][1] += float(np.square(exact.astype(np.float64) - quantised).sum())
    return statistics.mean(10 * float(np.log10(signal / max(error, 1e-30))) for signal, error in noise.values())


def _first(pictures: datasets.Pictures, count: int) -> datasets.Pictures:
    """The first `count` pictures with their part of the labels."""
    assert pictures.truth is not None
    ids = set(pictures.image_ids[:count])
    truth = {
        **pictures.truth,
        "images": [image for image in pictures.truth["images"] if image["id"] in ids],
        "annotations": [annotation for annotation in pictures.truth["annotations"] if annotation["image_id"] in ids],
    }
    ids_kept = pictures.image_ids[:count]
    return dataclasses.replace(pictures, paths=pictures.paths[:count], truth=truth, image_ids=ids_kept)


def _resume(file: Path, key: str) -> dict[str, dict[str, float]]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8-sig"))
        return dict(stored["measured"]) if stored["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _table(spec: Spec, result: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"{spec.model.name}: INT8 by layer, what loses most first")
    for column in ("Conv", "mAP lost alone", "SQNR alone, dB", "mAP gained without", "left out"):
        table.add_column(column, justify="left" if column == "Conv" else "right")
    for name, row in sorted(result["layers"].items(), key=lambda item: -item[1]["alone_loss"]):
        left = "yes" if name in result["exclude_nodes"] else ""
        values = (f"{row['alone_loss']:+.4f}", f"{row['alone_sqnr_db']:.1f}", f"{row['others_gain']:+.4f}")
        table.add_row(name, *values, left)
    return table
