"""The graphs of a precision: one, or one per calibrator where activations are calibrated."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from build.contract import CALIBRATORS, PRECISIONS, Precision
from build.graph import precision
from build.graph.attach import attach, load_source
from build.graph.precision import runnable
from build.quantization import qdq
from build.quantization.calibration import calibrate
from build.spec import Spec

if TYPE_CHECKING:
    import onnx
    from rich.console import Console


@dataclass(frozen=True)
class Candidate:
    """A graph to be judged.

    Attributes:
        precision: of contract.PRECISIONS.
        calibrator: how its activations are clipped; empty where nothing is calibrated.
        source: the typed source model.
        graph: the served graph as TensorRT gets it.
        runs: the served graph as ONNX Runtime runs it here: INT8 in a form of its own, BF16 widened to FP32, any other
            as it is.
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

    @property
    def kind(self) -> Precision:
        """The row of contract.PRECISIONS."""
        return PRECISIONS[self.precision]


def candidates(
    spec: Spec,
    name: str,
    artifacts: Path,
    *,
    calibrators: Sequence[str] = (),
    exclude: Collection[str] | None = None,
    console: Console | None = None,
) -> list[Candidate]:
    """The graphs of a precision.

    Args:
        spec: the spec.
        name: of contract.PRECISIONS.
        artifacts: the artifacts' folder, where calibrations are kept.
        calibrators: which to try; empty = the spec's, of which `auto` is all.
        exclude: Convs to leave unquantised; None = the spec's.
        console: for progress.

    Raises:
        SSDError: no such graph can be made.
    """
    kind = PRECISIONS[name]
    source = load_source(spec)
    if not kind.typed:
        graph = attach(spec, source)
        return [Candidate(name, "", source, graph, graph)]
    folded = qdq.fold(source)
    if not kind.quantised:
        typed = precision.half(folded, name)
        graph = attach(spec, typed)
        return [Candidate(name, "", typed, graph, runnable(graph, name))]
    settings = spec.quantization
    calibration = calibrate(spec, folded, artifacts, console)
    left = settings.exclude_nodes if exclude is None else exclude
    results = []
    for calibrator in calibrators or (CALIBRATORS if settings.calibrator == "auto" else (settings.calibrator,)):
        clips = calibration.clips(calibrator, settings.percentile)

        def quantised(*, sums: bool, clips: Mapping[str, float] = clips) -> qdq.Placed:
            placed = qdq.quantize(folded, clips, kind=name, exclude=left, sums=sums)
            return placed if settings.rest == "fp32" else replace(placed, model=precision.half(placed.model, "fp16"))

        placed = quantised(sums=False)
        graph = attach(spec, placed.model)
        form = qdq.for_onnxruntime(attach(spec, quantised(sums=True).model)) if name == "int8" else None
        runs = form or runnable(graph, name)
        results.append(Candidate(name, calibrator, placed.model, graph, runs, placed.nodes))
    return results


def all_calibrators(name: str) -> tuple[str, ...]:
    """The calibrators that a precision can be made with."""
    return CALIBRATORS if PRECISIONS[name].quantised else ()
