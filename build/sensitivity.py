"""Which layers do not bear INT8, and the smallest set to leave out so that the accuracy gate passes."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import audit, datasets, graph, quantize
from build.errors import SpecError, VerifyError
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

    say = console or Console(highlight=False)
    started = time.monotonic()
    folded = quantize.fold(graph.load_source(spec))
    names = [conv.name for conv in quantize.convs(folded)]
    calibrator = spec.quantization.calibrator if spec.quantization.calibrator != "auto" else "minmax"
    clips = quantize.calibrate(spec, folded, artifacts, say).clips(calibrator, spec.quantization.percentile)
    pictures = datasets.held_out(spec, artifacts / "datasets")
    few = _first(pictures, count)
    file = artifacts / "audit" / "sensitivity.json"
    about = json.dumps([spec.model.name, calibrator, clips, len(few), pictures.digest()]).encode()
    key = hashlib.sha256(about + folded.SerializeToString(deterministic=True)).hexdigest()
    held = _resume(file, key)
    base = [name for name in names if name in spec.quantization.exclude_nodes]

    def measured(what: str, exclude: Collection[str], on: datasets.Pictures) -> float:
        """mAP with all but `exclude` quantised, from the file where it is there."""
        if what not in held:
            if budget and time.monotonic() - started > budget:
                raise TimeoutError
            placed = quantize.quantize(folded, clips, exclude=exclude)
            runs = quantize.for_onnxruntime(graph.attach(spec, placed.model))
            held[what] = {"map": audit.score(on, audit.in_process(spec, runs), what, say).accuracy.map}
            if on is few:
                held[what]["sqnr_db"] = _sqnr(spec, folded, placed.model, few.paths[:8])
            audit.write_json(file, {"key": key, "measured": held})
        return float(held[what]["map"])

    result: dict[str, Any] = {"layers": {}, "exclude_nodes": base, "ratio": None, "done": False}
    try:
        none, every = measured("fp32 few", names, few), measured("all few", (), few)
        for name in names:
            alone = measured(f"alone {name}", [other for other in names if other != name], few)
            others = measured(f"without {name}", [name], few)
            result["layers"][name] = {
                "alone_map": alone,
                "alone_loss": none - alone,
                "alone_sqnr_db": held[f"alone {name}"]["sqnr_db"],
                "others_map": others,
                "others_gain": others - every,
            }
        whole = measured("fp32", names, pictures)
        layers = result["layers"]
        ranked = sorted(names, key=lambda name: (-layers[name]["alone_loss"], layers[name]["alone_sqnr_db"]))
        left = list(base)

        def ratio(exclude: Sequence[str]) -> float:
            what = "leaving " + " ".join(sorted(exclude)) if exclude else "leaving nothing"
            return measured(what, exclude, pictures) / whole

        gate = spec.quantization.gate
        while ratio(left) < gate:
            worst = next((name for name in ranked if name not in left), None)
            if worst is None:
                raise VerifyError(
                    f"{spec.model.name}: with every Conv left out, INT8 still keeps less than {gate:.2%} of FP32's mAP",
                    why="the gate asks for more than FP32 has",
                )
            left.append(worst)
        for name in [one for one in left if one not in base]:
            fewer = [other for other in left if other != name]
            if ratio(fewer) >= gate:
                left = fewer
        result |= {"exclude_nodes": left, "ratio": ratio(left), "done": True}
        if write and set(left) != set(spec.quantization.exclude_nodes):
            write_exclude_nodes(spec.path, left)
    except TimeoutError:
        say.print(f"the budget of {budget:g} s is used up; run it again to go on ({file})", markup=False)
    say.print(_table(spec, result))
    return result


def _sqnr(spec: Spec, before: onnx.ModelProto, after: onnx.ModelProto, paths: Sequence[Path]) -> float:
    """10·log10 of signal over quantisation noise in the raw heads, both heads together by their geometric mean."""
    import numpy as np

    noise = {name: [0.0, 0.0] for name in graph.HEADS}
    first, second = (audit.session(graph.before_nms(graph.attach(spec, source))) for source in (before, after))
    for path in paths:
        pixels = datasets.to_input(datasets.open_picture(path), spec.input)[0][None]
        pairs = zip(*(one.run(graph.HEADS, {graph.IMAGES: pixels}) for one in (first, second)), strict=True)
        for name, (exact, quantised) in zip(graph.HEADS, pairs, strict=True):
            noise[name][0] += float(np.square(exact, dtype=np.float64).sum())
            noise[name][1] += float(np.square(exact.astype(np.float64) - quantised).sum())
    return statistics.mean(10 * float(np.log10(signal / max(error, 1e-30))) for signal, error in noise.values())


def _first(pictures: datasets.Pictures, count: int) -> datasets.Pictures:
    """The first `count` pictures with their part of the labels."""
    assert pictures.truth is not None
    ids = set(pictures.image_ids[:count])
    truth = {
        **pictures.truth,
        "images": [one for one in pictures.truth["images"] if one["id"] in ids],
        "annotations": [one for one in pictures.truth["annotations"] if one["image_id"] in ids],
    }
    return datasets.Pictures(
        pictures.name, pictures.paths[:count], truth, pictures.image_ids[:count], pictures.category_ids
    )


def _resume(file: Path, key: str) -> dict[str, dict[str, float]]:
    try:
        stored = json.loads(file.read_text())
        return dict(stored["measured"]) if stored["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_exclude_nodes(path: Path, names: Sequence[str]) -> None:
    """Sets [quantization] exclude_nodes in a spec.toml, leaving everything else, comments included, as it is.

    Raises:
        SpecError: the file has the key in a form that this cannot replace.
    """
    from build import spec as specs
    from build.repository import explained

    text = path.read_text(encoding="utf-8")
    value = "exclude_nodes = [\n" + "".join(f"    {json.dumps(name)},\n" for name in names) + "]\n"
    table = re.search(r"^\[quantization\][^\n]*\n", text, re.M)
    if table is None:
        text = f"{text.rstrip()}\n\n[quantization]\n{value}"
    else:
        following = re.search(r"^\[", text[table.end() :], re.M)
        end = table.end() + following.start() if following else len(text)
        body = text[table.end() : end]
        items = r"(?:\s*(?:\"[^\"]*\"|'[^']*'|#[^\n]*|,))*"
        pattern = rf"^exclude_nodes\s*=\s*\[{items}\s*\][^\n]*\n?"
        replaced, times = re.subn(pattern, lambda _: value, body, flags=re.M)
        if not times and "exclude_nodes" in body:
            raise SpecError(f"{path}: exclude_nodes cannot be replaced", fix=f"write it by hand: {value}")
        text = text[: table.end()] + (replaced if times else value + body) + text[end:]
    unfinished = path.with_suffix(".new.toml")
    with explained(path):
        unfinished.write_text(text, encoding="utf-8")
        try:
            written = specs.load(unfinished)
            if tuple(names) != written.quantization.exclude_nodes:
                raise SpecError(f"{path}: exclude_nodes cannot be replaced", fix=f"write it by hand: {value}")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


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
